"""One run from pairs to a record, in process, at a tiny size."""

import functools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

import benchmark
from benchmark.curve import SnapshotsGone, curve_of, forget_training, snapshot_names
from benchmark.errors import BenchError
from benchmark.evaluate.pictures import open_pictures
from benchmark.evaluate.predictions import read_predictions
from benchmark.matrix import open_cell
from benchmark.progress import silent
from benchmark.request import Request, plan
from benchmark.stages import Stages, seal
from benchmark.train.lab import drop_snapshots

TINY = ("data.n_pairs=256", "data.n_held_out=64", "data.n_clean=64", "data.n_test=100", "data.n_probe=200", "train.epochs=2", "evaluation.linear_probe=none")


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("shared")


def run(results: Path, attack="backdoor", defense="clip", **more):
    return benchmark.run(attack, defense, scale="smoke", sets=(*TINY, *more.pop("sets", ())), results=results, **more)


def values(record, name):
    return {entry["of"]: entry["value"] for entry in record["metrics"] if entry["name"] == name}


def test_a_run_twice_in_two_places_gives_the_same_record(shared, tmp_path):
    first = run(shared, sets=("evaluation.linear_probe=lbfgs",))
    assert run(tmp_path, sets=("evaluation.linear_probe=lbfgs",)) == first
    left, right = (next(folder.glob(f"runs/{first['run_id']}/record.json")) for folder in (shared, tmp_path))
    assert left.read_bytes() == right.read_bytes()


def test_a_changed_default_gives_another_run_id(shared):
    ids = {run(shared)["run_id"], run(shared, sets=("attack.rate=0.03",))["run_id"], run(shared, sets=("train.lr=0.001",))["run_id"], run(shared, seed=1)["run_id"]}
    assert len(ids) == 4


def test_a_second_defense_trains_nothing_twice(shared):
    run(shared)
    before = set((shared / "cache" / "pack").iterdir())
    record = run(shared, defense="random")
    assert set((shared / "cache" / "pack").iterdir()) == before
    assert record["told"] == "count"
    kept = {entry["name"]: entry["value"] for entry in record["metrics"] if entry["of"] == "filter"}
    assert kept["n_kept"] == record["data"]["n_pairs"] - record["poison"]["n_poison"]


def test_oracle_drops_exactly_the_poison(shared):
    record = run(shared, defense="oracle")
    kept = {entry["name"]: entry["value"] for entry in record["metrics"] if entry["of"] == "filter"}
    assert kept["n_poison_kept"] == 0
    assert kept["clean_lost"] == 0
    assert kept["recall_dropped"] == kept["precision_dropped"] == 1


def test_the_record_tells_how_much_poison_stood_among_the_neighbours_a_detector_looked_at(tmp_path):
    file = tmp_path / "looks.py"
    file.write_text(
        "import numpy as np\n\nfrom benchmark.contract import Defense\nfrom benchmark.train.lab import Neighbourhood\nfrom defenses.clip import Clip\n\n"
        "class Looks(Defense):\n    '''Looks.'''\n\n    def defend(self, lab):\n        model = lab.train(Clip()).model\n"
        "        raw, unit = lab.features(model, raw=True)[0], lab.features(model)[0]\n        assert np.allclose(raw / raw.norm(dim=1, keepdim=True), unit, atol=1e-6) and abs(raw.norm(dim=1) - 1).max() > 0.01\n"
        "        lab.warn('a line of the defense')\n        lab.scores('looks', np.arange(len(lab.pairs)), neighbourhood=Neighbourhood(4, (np.arange(len(lab.pairs)),)))\n        return model\n"
    )
    record = run(tmp_path / "r", defense=str(file))
    assert values(record, "expected_poison_over_k")["looks"] == record["poison"]["n_poison"] / 4
    assert "a line of the defense" in record["warnings"] and any("inverted regime" in line for line in record["warnings"])


def test_the_sum_of_asr_and_triggered_accuracy_is_at_most_one(shared):
    record = run(shared)
    assert values(record, "asr")["backdoor"] + values(record, "triggered_acc1")["backdoor"] <= 1
    assert record["poison"]["n_poison"] == record["poison"]["n_requested"] == 5


def test_the_targeted_record_counts_targets(shared):
    record = run(shared, attack="targeted", sets=("attack.captions_per_target=2",))
    (asr,) = (entry for entry in record["metrics"] if entry["name"] == "asr")
    assert (asr["n"], asr["units"]) == (4, "targets")
    assert record["poison"]["n_poison"] == 8
    assert len({target["id"] for target in record["poison"]["targets"]}) == 4


def test_a_curve_has_a_phase_and_cheap_metrics_for_every_epoch(shared):
    record = run(shared, defense="roclip", sets=("roclip.pool_fraction=0.3",))
    assert [(point["epoch"], point["phase"]) for point in record["curve"]] == [(1, "clip"), (2, "match")]
    assert all("asr/backdoor" in point["metrics"] for point in record["curve"])
    assert values(record, "auroc").keys() == {"own_caption_rank"}


def test_every_value_can_be_recomputed_from_saved_predictions(shared):
    import pandas as pd

    record = run(shared)
    folder = shared / "runs" / record["run_id"] / "predictions"
    attack = pd.read_parquet(folder / "attack-backdoor.parquet")
    counted = attack[attack.counted]
    assert (counted.true != counted.goal).all()
    assert values(record, "asr")["backdoor"] == pytest.approx((counted.rank_goal <= 1).mean())
    assert values(record, "asr_floor")["backdoor"] == pytest.approx((counted.rank_goal_untriggered <= 1).mean())
    for name, value in values(record, "zero_shot_acc1").items():
        assert value == pytest.approx((pd.read_parquet(folder / f"zero_shot-{name}.parquet").rank_true <= 1).mean())


def test_every_metric_refers_to_a_card_of_the_record(shared):
    record = run(shared)
    cards = {entry["card"] for entry in record["metrics"] if entry["card"]}
    assert cards
    assert cards <= set(record["cards"])


def test_the_record_holds_no_time_and_no_path(shared):
    text = json.dumps(run(shared))
    assert str(shared) not in text
    assert "seconds" not in text


def test_dropped_snapshots_are_trained_again_when_another_evaluation_needs_them(shared, tmp_path):
    record = run(tmp_path)
    (training,) = tmp_path.glob("cache/train/*/log.json")
    assert len(list(training.parent.glob("epoch-*.safetensors"))) == 1
    for folder in (tmp_path / "cache" / "evaluate").iterdir():
        if folder.is_dir():
            for path in sorted(folder.rglob("*"), reverse=True):
                path.unlink() if path.is_file() else path.rmdir()
            folder.rmdir()
    (tmp_path / "runs" / record["run_id"] / "done.json").unlink()
    assert run(tmp_path) == record


def test_sham_changes_no_image_and_is_another_run(shared):
    plain, sham = run(shared), run(shared, sham=True)
    assert sham["run_id"] != plain["run_id"]
    assert sham["label"]["scale"].endswith("+sham")


def test_the_cost_counts_what_went_through_the_towers(shared):
    record, told = run(shared, seed=7), run(shared, seed=7, defense="oracle")
    cost = json.loads((shared / "runs" / record["run_id"] / "cost.json").read_text())
    assert cost["pairs_trained"] == cost["passes"]["image_backward"] == cost["passes"]["text_backward"] > 0
    assert 0 <= cost["beside_seconds"] < cost["wall_seconds_now"]
    rows = read_predictions(shared / "runs" / told["run_id"])["rows-poisoned"]
    assert len(rows) == told["poison"]["n_poison"] and not rows["kept"].any()
    by_class = values(told, "dropped_by_class")
    assert len(by_class) > 5 and set(by_class.values()) == {0.0}


ODD = """
from benchmark.contract import Attack, Probe

class Odd(Attack):
    '''Asks for the twenty best of twenty classes.

    Source: this test.
    '''

    touches = ()

    def poison(self, pairs, lab):
        return []

    def probes(self, suite, kept):
        return [Probe("odd", "classify", suite.main.name, "test", None, 0, (1, 20))]
"""


def test_what_cannot_be_asked_is_said_before_anything_is_trained(tmp_path):
    file = tmp_path / "odd.py"
    file.write_text(ODD)
    with pytest.raises(BenchError, match="k = 20 of 20 classes is no success"):
        run(tmp_path / "r", attack=str(file))
    assert not (tmp_path / "r" / "cache" / "train").exists()


def test_a_clean_model_is_that_of_a_run_without_attack_measured_as_if_attacked(shared):
    plain, clean, none = run(shared), run(shared, clean_model=True), run(shared, attack="none")
    assert clean["run_id"] != plain["run_id"] and clean["label"]["scale"].endswith("+clean")
    assert clean["cards"] == plain["cards"] and clean["poison"]["n_poison"] == 0
    assert clean["poison"]["manifest_sha256"] == none["poison"]["manifest_sha256"] and clean["poison"]["targets"] == plain["poison"]["targets"]
    assert values(clean, "zero_shot_acc1") == values(none, "zero_shot_acc1") and values(clean, "asr")
    assert "clean_model" in clean["resolved"] and "clean_model" not in plain["resolved"], "records from before there was this control keep their ids"


def test_a_clean_model_trains_nothing_that_a_run_without_attack_has_trained(tmp_path):
    run(tmp_path, attack="none", keep_snapshots=True)
    before = {path.name for path in (tmp_path / "cache" / "train").iterdir()}
    run(tmp_path, clean_model=True, keep_snapshots=True)
    assert {path.name for path in (tmp_path / "cache" / "train").iterdir()} == before


@pytest.mark.parametrize(("more", "says"), [({"sham": True}, "do not go together"), ({"attack": "none"}, "attack none asks for nothing")])
def test_a_clean_model_wants_an_attack_and_no_sham(tmp_path, more, says):
    with pytest.raises(BenchError, match=says):
        run(tmp_path, clean_model=True, **more)


def test_a_run_asks_each_snapshot_about_its_pairs_and_keeps_pictures_of_the_poison(shared):
    record = run(shared)
    names = {"poisoned_similarity/pairs", "clean_similarity/pairs", "pool_true_class/pairs", "pool_goal_class/pairs"}
    assert record["curve"]
    assert all(names <= set(point["metrics"]) for point in record["curve"])
    assert open_pictures(shared, record)["queries"]["backdoor"]


def test_results_load_as_a_long_table(shared):
    run(shared)
    table = benchmark.load_results(shared)
    assert {"asr", "asr_floor", "zero_shot_acc1"} <= set(table.metric)


def test_a_lab_leads_to_no_poison_label_attack_or_record(tmp_path):
    seen = []
    file = tmp_path / "nosy.py"
    file.write_text(
        "from benchmark.contract import Defense\n\nclass Nosy(Defense):\n    '''Looks.'''\n\n    def defend(self, lab):\n        import nosy_log\n        nosy_log.seen.append(lab)\n        return lab.train(self).model\n"
    )
    import sys
    import types

    log = types.ModuleType("nosy_log")
    log.seen = seen
    sys.modules["nosy_log"] = log
    try:
        run(tmp_path / "r", defense=str(file))
    finally:
        del sys.modules["nosy_log"]
    visited, queue = set(), [seen[0]]
    while queue:
        thing = queue.pop()
        if id(thing) in visited or isinstance(thing, (str, int, float, bytes, type)):
            continue
        visited.add(id(thing))
        assert type(thing).__name__ not in ("SealedRecord", "AttackLab", "Suite", "EvalSet", "Backdoor", "Poisoned", "Cell", "Evaluator", "Source"), type(thing)
        if isinstance(thing, Path):
            assert not list(thing.rglob("*.record")) or thing.name == "cache"
        queue += list(getattr(thing, "__dict__", {}).values())
        if isinstance(thing, functools.partial):
            queue += [thing.func, *thing.args, *thing.keywords.values()]
        queue += [cell.cell_contents for cell in getattr(thing, "__closure__", None) or ()] + [getattr(thing, "__self__", None)]
        queue += list(thing.values()) if isinstance(thing, dict) else list(thing)[:50] if isinstance(thing, (list, tuple)) else []


@pytest.mark.parametrize("target", ["record", "evaluation set"])
def test_a_defense_that_opens_what_it_may_not_see_fails_its_run(target, tmp_path):
    pattern = "poison/*/poisoned.record/record.json" if target == "record" else "eval_sets/*/suite.json"
    file = tmp_path / "spy.py"
    file.write_text(
        f"from pathlib import Path\n\nfrom benchmark.contract import Defense\n\nclass Spy(Defense):\n    '''Spies.'''\n\n    def defend(self, lab):\n        next(Path({str(tmp_path / 'r' / 'cache')!r}).glob({pattern!r})).read_text()\n"
    )
    with pytest.raises(benchmark.errors.PluginError, match="a defense must not open"):
        run(tmp_path / "r", defense=str(file))


def test_options_reach_the_plugins_that_have_them_and_no_other():
    request = Request(("none", "backdoor"), ("clip", "roclip+aug"), sets=("attack.rate=0.1", "defense.every=3"), baseline=False)
    cells = {(cell.attack, cell.defense): cell for cell in plan(request)}
    assert cells["backdoor", "clip"].attack_options == {"rate": 0.1}
    assert cells["none", "clip"].attack_options == {}
    assert cells["none", "roclip+aug"].defense_options == {"every": 3}
    assert cells["none", "clip"].defense_options == {}


def test_baselines_come_along_once():
    def names(*defenses):
        return [cell.defense for cell in plan(Request(("none",), defenses))]

    assert names("roclip") == ["clip", "roclip"]
    assert names("roclip+aug") == ["clip", "clip+aug", "roclip+aug"]
    assert names("clip+aug", "clip") == ["clip+aug", "clip"]


def test_labels_name_what_differs_from_the_scale(tmp_path):
    request = Request(("backdoor",), ("roclip+aug",), scale="smoke", sets=(*TINY, "attack.trigger=white", "defense.every=3"), results=tmp_path, baseline=False)
    label = open_cell(plan(request)[0], silent()).label
    assert label["attack"] == "backdoor[trigger=white]"
    assert label["defense"] == "roclip+aug[every=3]"
    assert label["scale"].startswith("smoke[data.n_clean=64")


def test_data_without_an_evaluation_set_is_refused():
    with pytest.raises(BenchError, match="--data needs --eval"):
        plan(Request(data=Path("pairs.tsv")))


@pytest.mark.parametrize("options", [{"attack": "backdoor"}, {"attack": "targeted", "sets": ("attack.captions_per_target=2",)}], ids=lambda one: one["attack"])
def test_a_fresh_record_agrees_with_its_predictions_value_for_value(shared, tmp_path, options):
    from benchmark.report.verification import verify

    record = run(shared, **{**options, "sets": (*options.get("sets", ()), "evaluation.linear_probe=lbfgs")})
    shutil.copytree(shared / "runs" / record["run_id"], tmp_path / "runs" / record["run_id"])
    found = verify(tmp_path)
    assert found.problems == []
    assert found.without.keys() <= {"n_ties", "linear_probe_lambda"}


def test_a_training_that_was_stopped_before_its_marker_is_not_trained_again(tmp_path, monkeypatch):
    first = run(tmp_path)
    (folder,) = (path for path in (tmp_path / "cache" / "train").iterdir() if path.is_dir())
    shutil.rmtree(tmp_path / "runs")
    shutil.rmtree(tmp_path / "cache" / "evaluate")
    shutil.rmtree(tmp_path / "cache" / "trained_pairs")
    run(tmp_path, sets=("train.lr=0.001",), keep_snapshots=True)
    (other,) = (path for path in (tmp_path / "cache" / "train").iterdir() if path.is_dir() and path != folder)
    part = other.rename(other.with_name(other.name + ".part"))
    (part / "done.json").unlink()
    (part / ".state.pt.1").write_bytes(b"half")
    for record in (tmp_path / "runs").iterdir():
        if record.is_dir():
            shutil.rmtree(record)

    def trains(*_):
        raise AssertionError("it was trained again")

    monkeypatch.setattr("benchmark.train.lab.train", trains)
    second = run(tmp_path, sets=("train.lr=0.001",))
    assert second["run_id"] != first["run_id"]
    assert not list(other.glob(".*"))


def test_snapshots_of_a_training_that_was_made_again_are_not_those_before(tmp_path):
    (tmp_path / "key").mkdir()
    for epoch in (1, 2):
        (tmp_path / "key" / f"epoch-{epoch:03d}.safetensors").write_bytes(b"old %d" % epoch)
    seal(tmp_path / "key", {})
    first = snapshot_names(tmp_path / "key")
    drop_snapshots(tmp_path / "key")
    assert snapshot_names(tmp_path / "key") == first
    assert set(first) == {"1", "2"}
    (tmp_path / "key" / "epoch-002.safetensors").write_bytes(b"new 2")
    seal(tmp_path / "key", {})
    assert snapshot_names(tmp_path / "key").keys() == {"2"}
    assert snapshot_names(tmp_path / "key")["2"] != first["2"]


def test_a_training_is_forgotten_only_if_snapshots_are_missing(tmp_path):
    cell = SimpleNamespace(stages=Stages(tmp_path))
    folder = tmp_path / "train" / "key"
    folder.mkdir(parents=True)
    for epoch in (1, 2):
        (folder / f"epoch-{epoch:03d}.safetensors").write_bytes(b"%d" % epoch)
    seal(folder, {})
    snapshot_names(folder)
    forget_training(cell, folder)
    assert folder.is_dir()
    drop_snapshots(folder)
    forget_training(cell, folder)
    assert not folder.exists()
    assert not folder.with_name("key.snapshots.json").exists()
    forget_training(cell, folder)  # another process was first
    with pytest.raises(SnapshotsGone):  # what a third one finds meanwhile
        curve_of(cell, SimpleNamespace(trainings=[folder], splits=[]), None, None)
