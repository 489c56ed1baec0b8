"""A checkpoint is measured exactly as the run that made it, and stands beside the runs in the tables."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import benchmark
from benchmark import cli
from benchmark.errors import BenchError
from benchmark.external import Evaluation, evaluate_checkpoint
from benchmark.progress import silent
from benchmark.report.comparisons import differences
from benchmark.report.markdown import to_markdown
from benchmark.report.page import html
from benchmark.report.records import load, select, superseded
from benchmark.report.tables import groups, long_table, to_csv
from benchmark.report.wide import wide_table
from benchmark.train.checkpoints import load_checkpoint

DATA = ("data.n_pairs=256", "data.n_held_out=64", "data.n_clean=64", "data.n_test=100", "data.n_probe=200")
EVALUATED = (*DATA, "evaluation.linear_probe=none")
TINY = (*EVALUATED, "train.epochs=2")


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def run(shared):
    return benchmark.run("backdoor", "clip", scale="smoke", sets=TINY, results=shared, keep_snapshots=True)


@pytest.fixture(scope="module")
def training(shared, run) -> Path:
    (log,) = shared.glob("cache/train/*/log.json")
    return log.parent


@pytest.fixture(scope="module")
def snapshot(training) -> Path:
    assert sorted(path.name for path in training.glob("epoch-*")) == ["epoch-001.safetensors", "epoch-002.safetensors"]
    return training / "epoch-002.safetensors"


@pytest.fixture(scope="module")
def alone(snapshot, tmp_path_factory) -> Path:
    """The same weights where nothing says whose they are."""
    return Path(shutil.copy(snapshot, tmp_path_factory.mktemp("elsewhere") / "theirs.safetensors"))


def evaluate(results: Path, checkpoint: Path | None, **more):
    sets = (*EVALUATED, *more.pop("sets", ()))
    return evaluate_checkpoint(Evaluation(checkpoint=checkpoint, scale="smoke", sets=sets, results=results, **more), silent()).record


def values(record, name):
    return {entry["of"]: entry["value"] for entry in record["metrics"] if entry["name"] == name}


def test_the_last_snapshot_of_a_run_has_exactly_the_metrics_and_cards_of_the_run(shared, snapshot, tmp_path):
    probed = "evaluation.linear_probe=lbfgs"
    run = benchmark.run("backdoor", "clip", scale="smoke", sets=(*TINY, probed), results=shared, keep_snapshots=True)
    here, there = (evaluate(results, snapshot, attack="backdoor", sets=(probed,)) for results in (shared, tmp_path))
    assert {"zero_shot_acc1", "linear_probe_acc1", "asr"} <= {metric["name"] for metric in run["metrics"]}
    assert here["metrics"] == there["metrics"] == run["metrics"]
    assert here["cards"] == run["cards"]
    assert here["poison"] == run["poison"]
    assert here["data"] == run["data"]
    assert here == there
    left, right = (next(folder.glob(f"runs/{here['run_id']}/record.json")).read_bytes() for folder in (shared, tmp_path))
    assert left == right
    assert here["run_id"] != run["run_id"]


def test_an_earlier_snapshot_has_the_metrics_of_its_point_on_the_curve(shared, run, training):
    record = evaluate(shared, training / "epoch-001.safetensors", attack="backdoor")
    for name, value in run["curve"][0]["metrics"].items():
        metric, _, of = name.partition("/")
        if of != "pairs":  # a checkpoint is measured without the pairs that it was trained on
            assert values(record, metric)[of] == value
    assert record["metrics"] != run["metrics"]


def test_weights_of_unknown_origin_have_the_same_metrics_and_say_that_they_are_unknown(shared, run, snapshot, alone):
    record = evaluate(shared, alone, attack="backdoor", model="bench-small")
    assert record["metrics"] == run["metrics"]
    assert record["label"]["defense"].startswith("checkpoint:theirs@")
    assert record["checkpoint"]["trained_on_this_poison"] is None
    assert record["resolved"]["train"] == "unknown"
    assert any("trained elsewhere" in line for line in record["warnings"])
    assert any("are assumed" in line for line in record["warnings"])
    ours = evaluate(shared, snapshot, attack="backdoor")
    assert ours["checkpoint"]["trained_on_this_poison"] is True
    assert ours["resolved"]["defense"]["options"]["role"] == "poisoned"
    assert not any("trained" in line for line in ours["warnings"])


def test_a_snapshot_measured_with_another_attack_says_so(shared, snapshot):
    record = evaluate(shared, snapshot, attack="backdoor", sets=("attack.rate=0.1",))
    assert record["checkpoint"]["trained_on_this_poison"] is False
    assert any("trained on other pairs" in line for line in record["warnings"])


def test_the_sealed_record_of_a_poison_gives_the_same_numbers_as_making_it(shared, run, snapshot, tmp_path):
    (sealed,) = [
        path.parent
        for path in shared.glob("cache/poison/*/poisoned.record/record.json")
        if json.loads(path.read_text())["poisoned_manifest_sha256"] == run["poison"]["manifest_sha256"]
    ]
    copied = Path(shutil.copytree(sealed, tmp_path / "poisoned.record"))
    for given in (copied, tmp_path):
        record = evaluate(tmp_path / "results", snapshot, record=given)
        assert record["metrics"] == run["metrics"]
        assert record["cards"] == run["cards"]
        assert record["poison"] == run["poison"]
        assert {name: record["label"][name] for name in ("attack", "dataset", "model")} == {name: run["label"][name] for name in ("attack", "dataset", "model")}
    assert not list((tmp_path / "results" / "cache").glob("poison/*")), "the poison was not made again"


def test_a_targeted_record_brings_its_images_along(shared, tmp_path):
    run = benchmark.run("targeted", "clip", scale="smoke", sets=(*TINY, "attack.captions_per_target=2"), results=tmp_path / "r")
    (sealed,) = tmp_path.glob("r/cache/poison/*/poisoned.record")
    (training,) = (path.parent for path in tmp_path.glob("r/cache/train/*/log.json"))
    record = evaluate(tmp_path / "r", training, record=sealed)
    assert record["metrics"] == run["metrics"]
    assert record["label"]["attack"] == run["label"]["attack"]


def test_what_does_not_fit_a_record_is_refused(shared, snapshot, run, tmp_path):
    sealed = next(path.parent for path in shared.glob("cache/poison/*/poisoned.record/record.json"))
    for more, sentence in (
        ({"attack": "targeted"}, "made with attack 'backdoor', and --attack says 'targeted'"),
        ({"seed": 1}, "--seed and --record do not go together"),
        ({"sham": True}, "--sham and --record do not go together"),
        ({"attack": "backdoor", "sets": ("attack.rate=0.1",)}, "the record holds the attack's options"),
    ):
        with pytest.raises(BenchError, match=sentence):
            evaluate(tmp_path, snapshot, record=sealed, **more)
    with pytest.raises(BenchError, match="--attack all: one measurement asks for what one attack wants"):
        evaluate(tmp_path, snapshot, attack="all")
    with pytest.raises(BenchError, match="no poison record at"):
        evaluate(tmp_path, snapshot, record=tmp_path)
    broken = Path(shutil.copytree(sealed, tmp_path / "poisoned.record"))
    header = json.loads((broken / "record.json").read_text())
    (broken / "record.json").write_text(json.dumps({**header, "attack": "mine"}))
    with pytest.raises(BenchError, match=r"unknown attack 'mine'.*give it with --attack"):
        evaluate(tmp_path, snapshot, record=broken)
    (broken / "record.json").write_text(json.dumps({**header, "kept": {**header["kept"], "targets": [{**header["kept"]["targets"][0], "index": 3}]}}))
    with pytest.raises(BenchError, match="has another number in evaluation set"):
        evaluate(tmp_path, snapshot, record=broken)
    (broken / "empty.npy").write_bytes(b"")
    with pytest.raises(BenchError, match="is no poison record: EOFError"):
        evaluate(tmp_path, snapshot, record=broken)
    (broken / "empty.npy").unlink()
    (broken / "record.json").write_text(json.dumps({name: value for name, value in header.items() if name != "kept"}))
    with pytest.raises(BenchError, match="is no poison record"):
        evaluate(tmp_path, snapshot, record=broken)


def poison_to(out: Path, results: Path, *more: str) -> Path:
    arguments = ["poison", "--attack", "backdoor", "--scale", "smoke", "--out", str(out), "--results", str(results), *(part for one in DATA for part in ("--set", one)), *more]
    done = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return out


def test_a_folder_that_bench_poison_wrote_says_what_it_was_made_of(shared, run, snapshot, tmp_path):
    folder = poison_to(tmp_path / "made", shared)
    for given in (folder, folder / "poisoned.record"):
        record = evaluate_checkpoint(Evaluation(checkpoint=snapshot, record=given, sets=("evaluation.linear_probe=none",), results=tmp_path / "r"), silent()).record
        assert record["metrics"] == run["metrics"]
        assert record["label"]["scale"] == "smoke[" + ",".join(sorted(EVALUATED)) + "]"
        assert (record["label"]["attack"], record["label"]["dataset"]) == ("backdoor", "drawn")
        assert record["poison"] == run["poison"]


def test_a_record_of_another_image_side_is_refused(shared, snapshot, tmp_path):
    folder = poison_to(tmp_path / "made", shared) / "poisoned.record"
    request = json.loads((folder / "request.json").read_text())
    (folder / "request.json").write_text(json.dumps({**request, "data_settings": {**request["data_settings"], "side": 64}}))
    with pytest.raises(BenchError, match="was made for images of 64 px, and the model takes 32 px"):
        evaluate(tmp_path, snapshot, record=folder)
    (folder / "request.json").write_text(json.dumps({**request, "scale": "huge"}))
    with pytest.raises(BenchError, match=r"request\.json cannot be read: ValueError: scale 'huge'"):
        evaluate(tmp_path, snapshot, record=folder)


def test_no_plugin_file_that_a_record_names_is_run(shared, snapshot, tmp_path):
    folder = poison_to(tmp_path / "made", shared) / "poisoned.record"
    plugin = tmp_path / "mine.py"
    plugin.write_text(f"from pathlib import Path\nPath({str(tmp_path / 'canary')!r}).touch()\n")
    for name, key in (("request.json", "attack"), ("record.json", "attack")):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, key: str(plugin)}))
    with pytest.raises(BenchError, match="names an attack by its file"):
        evaluate(tmp_path, snapshot, record=folder)
    assert not (tmp_path / "canary").exists()


def test_the_report_shows_a_checkpoint_beside_the_runs(shared, run, snapshot, alone):
    evaluate(shared, snapshot, attack="backdoor")
    label = evaluate(shared, alone, attack="backdoor", model="bench-small")["label"]["defense"]
    recorded, old = superseded(load(shared))
    assert not old
    runs = [one for one in recorded if one.label("attack") == "backdoor" and one.record["metrics"] == run["metrics"]]
    table = wide_table(runs).set_index("defense")
    (own,) = [name for name in table.index if name.startswith("checkpoint:epoch-002@")]
    for column in ("asr", "asr_low", "asr_high", "asr_n", "asr_floor", "zero_shot_acc1", "triggered_acc1", "n_poison", "n_pairs", "dataset", "model"):
        assert table.loc[own, column] == table.loc["clip", column] == table.loc[label, column], column
    assert np.isnan(table.loc[own, "train_seconds"])
    text = to_markdown(runs)
    assert label.replace("_", "\\_") in text
    assert "trained elsewhere" in text
    assert "<dt>clean pairs used</dt><dd>unknown</dd>" in html(recorded)
    assert {"asr", "zero_shot_acc1"} <= set(long_table(runs).query("defense == @own").metric)
    assert label in to_csv(wide_table(runs))
    assert [one.label("defense") for one in select(runs, defenses=["checkpoint:theirs"])] == [label]
    assert len(select(runs, where=["train.epochs=2"])) == 1, "what is not known equals nothing"
    assert (differences(runs, own, "clip").difference == 0).all()


def test_one_checkpoint_measured_with_two_poisons_is_not_averaged_over_them(tmp_path, alone):
    for seed in (0, 1):
        evaluate(tmp_path, alone, attack="backdoor", model="bench-small", seed=seed)
    found, notes = groups(load(tmp_path))
    assert [len(group.runs) for group in found] == [1, 1]
    assert "measured_with" in notes[0]


def test_a_second_start_reads_the_record(shared, snapshot, alone, monkeypatch):
    first = evaluate(shared, alone, attack="backdoor", model="bench-small")
    monkeypatch.setattr("benchmark.external.evaluate.Evaluator", None)
    assert evaluate(shared, alone, attack="backdoor", model="bench-small") == first


def test_another_normalisation_is_another_row_with_other_numbers(shared, run, alone):
    record = evaluate(shared, alone, attack="backdoor", model="bench-small", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    assert record["label"]["defense"].endswith("[mean=0 0 0,std=1 1 1]")
    assert record["metrics"] != run["metrics"]
    assert record["resolved"]["defense"]["options"]["preprocessing"]["source"] == "given"
    assert not any("are assumed" in line for line in record["warnings"])
    plain = evaluate(shared, alone, attack="backdoor", model="bench-small")
    assert plain["metrics"] == run["metrics"]


def test_changing_one_weight_gives_another_row_and_misses_the_cache(shared, alone, tmp_path):
    model = load_checkpoint(alone, torch.device("cpu"), benchmark.train.checkpoints.Ask(model="bench-small")).model
    with torch.no_grad():
        model.net.visual.head.proj.weight[0, 0] += 1.0
    changed = tmp_path / "theirs.pt"
    torch.save(model.state(), changed)
    before = {path.name for path in (shared / "cache" / "evaluate").iterdir()}
    record = evaluate(shared, changed, attack="backdoor", model="bench-small")
    assert {path.name for path in (shared / "cache" / "evaluate").iterdir()} > before
    assert record["label"]["defense"] != evaluate(shared, alone, attack="backdoor", model="bench-small")["label"]["defense"]


def test_without_an_attack_there_is_no_asr(shared, run, snapshot):
    record = evaluate(shared, snapshot)
    assert record["label"]["attack"] == "none"
    assert values(record, "asr") == {}
    assert values(record, "zero_shot_acc1") == values(run, "zero_shot_acc1")
    assert record["checkpoint"]["trained_on_this_poison"] is False


def test_an_evaluation_set_alone_needs_no_pairs(tmp_path, snapshot):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("boat", "tree"):
            (tmp_path / "mine" / split / name).mkdir(parents=True)
            for index in range(10):
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / "mine" / split / name / f"{index}.png")
    record = evaluate(tmp_path / "r", snapshot, eval=(str(tmp_path / "mine"),))
    assert list(values(record, "zero_shot_acc1")) == ["mine"]
    assert (record["data"]["n_pairs"], record["label"]["dataset"]) == (0, "none")
    assert to_markdown(load(tmp_path / "r"))
    with pytest.raises(BenchError, match="--attack backdoor with --eval needs --data"):
        evaluate(tmp_path / "r", snapshot, eval=(str(tmp_path / "mine"),), attack="backdoor")


def test_an_exported_checkpoint_says_what_it_was_trained_on_and_is_measured_alike(shared, run, snapshot, tmp_path):
    evaluate(shared, snapshot, attack="backdoor", export=tmp_path / "final")
    about = json.loads((tmp_path / "final" / "checkpoint.json").read_text())
    assert (about["role"], about["manifest_sha256"]) == ("poisoned", run["poison"]["manifest_sha256"])
    assert about["about"]["attack"]["name"] == "backdoor"
    assert about["about"]["defense"] == "Clip"
    record = evaluate(shared, tmp_path / "final", attack="backdoor")
    assert record["metrics"] == run["metrics"]
    assert record["checkpoint"]["trained_on_this_poison"] is True
    assert record["resolved"]["defense"]["options"]["role"] == "poisoned"
    with pytest.raises(BenchError, match="exists; name another folder"):
        evaluate(shared, snapshot, attack="backdoor", export=tmp_path / "final")


def test_the_side_of_the_images_follows_the_checkpoint(shared, snapshot, tmp_path):
    record = evaluate(tmp_path, snapshot, sets=("evaluation.linear_probe=none",))
    assert record["label"]["scale"].endswith(",evaluation.linear_probe=none]")
    with pytest.raises(BenchError, match=r"is of side 32, and --set data\.side says 48"):
        evaluate(tmp_path, snapshot, sets=("data.side=48",))
    alone = Path(shutil.copy(snapshot, tmp_path / "theirs.safetensors"))
    large = evaluate(tmp_path, alone, model="bench-small", sets=("data.side=48", "evaluation.linear_probe=none"))
    assert large["resolved"]["data"]["side"] == 48
    assert "data.side=48" in large["label"]["scale"]
    assert set(large["not_run"]) == set()


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"checkpoint": None}, "give one of --checkpoint FILE and --pretrained TAG"),
        ({"pretrained": "cc12m"}, "give one of --checkpoint FILE and --pretrained TAG"),
        ({"sets": ("train.epochs=3",)}, "--set train.epochs: a checkpoint is trained already"),
        ({"sets": ("defense.every=3",)}, "--set defense.every: a checkpoint is trained already"),
        ({"sets": ("model.name=RN50",)}, "use --model here"),
        ({"sets": ("attack.rate=0.1",)}, "there is no --attack"),
        ({"sets": ("dat.side=3",)}, "there is no such section"),
        ({"sets": ("data.sides=3",)}, "Did you mean 'side'"),
        ({"attack": "backdor"}, "Did you mean 'backdoor'"),
        ({"attack": "backdoor", "sets": ("attack.rat=0.1",)}, "Did you mean 'rate'"),
        ({"scale": "smal"}, "Did you mean 'small'"),
        ({"data": Path("pairs.tsv")}, "--data needs --eval"),
    ],
)
def test_a_bad_request_is_one_sentence(more, sentence, snapshot, tmp_path):
    asked = {"checkpoint": snapshot, "scale": "smoke", "results": tmp_path, **more}
    with pytest.raises(BenchError, match=sentence):
        evaluate_checkpoint(Evaluation(**asked), silent())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--mean", "0,0"], "expected --mean with three numbers, as 0,0,0, got '0,0'"),
        (["--std", "1,1,nan"], "expected --std with three numbers"),
        (["--precision", "fp16"], "expected --precision fp32 or bf16, got 'fp16'"),
        (["--writer", "clip"], "expected --writer auto, open_clip or cyclip, got 'clip'"),
        (["--checkpoint", "nowhere.pt", "--scale", "smoke"], "no checkpoint at nowhere.pt"),
    ],
)
def test_a_bad_option_of_the_command_is_one_sentence(arguments, sentence, tmp_path):
    done = CliRunner().invoke(cli.app, ["eval", *arguments, "--results", str(tmp_path)])
    assert isinstance(done.exception, BenchError)
    assert sentence in str(done.exception)


def test_the_command_prints_the_row_and_leaves_the_record(shared, run, alone, tmp_path):
    sets = [part for one in EVALUATED for part in ("--set", one)]
    arguments = ["eval", "--checkpoint", str(alone), "--model", "bench-small", "--attack", "backdoor", "--scale", "smoke", "--mean", "0,0,0", "--std", "1,1,1", "--device", "cpu"]
    done = CliRunner().invoke(cli.app, [*arguments, *sets, "--results", str(shared)], catch_exceptions=False, env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert "checkpoint:theirs@" in done.output
    assert f"bench report --results {shared}" in done.output


def test_bf16_is_on_the_label(shared, run, alone):
    record = evaluate(shared, alone, attack="backdoor", model="bench-small", precision="bf16")
    assert record["label"]["defense"].endswith("[precision=bf16]")
    assert record["metrics"] != run["metrics"]
