"""The command line: what a person types, what comes back, and with which exit status."""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmark.cli import main
from benchmark.data import world
from benchmark.report.wide import DETECTION, WIDE

SMALL = ("data.n_pairs=256", "data.n_held_out=64", "data.n_clean=64", "data.n_test=100", "data.n_probe=200", "train.epochs=2", "evaluation.linear_probe=none")
TINY = tuple(f"--set={one}" for one in SMALL)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"}


def bench(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "benchmark", *map(str, arguments)], check=False, capture_output=True, text=True, cwd=cwd, env=ENVIRONMENT, timeout=600)


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """The command in this process, which has imported torch already."""

    def one(*arguments: object) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("COLUMNS", "160")
        monkeypatch.setattr(sys, "argv", ["bench", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, ended.value.code or 0, printed.out, printed.err)

    return one


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "--defense", "rocilp"], "unknown defense 'rocilp'. Did you mean 'roclip'?"),
        (["run", "--attack", "backdor"], "unknown attack 'backdor'. Did you mean 'backdoor'?"),
        (["run", "--scale", "smal"], "unknown scale 'smal'. Did you mean 'small'?"),
        (["run", "--set", "attack.rate=3.0"], "expected attack.rate in [0, 0.5], got 3.0. A rate is a fraction: 3 % is 0.03."),
        (["run", "--set", "attack.rate=0"], "use --attack none"),
        (["run", "--set", "attack.rat=0.1"], "unknown option attack.rat. Did you mean 'rate'?"),
        (["run", "--set", "defense.evry=3"], "unknown option defense.evry. Did you mean 'every'?"),
        (["run", "--set", "train.epoch=3"], "unknown option train.epoch. Did you mean 'epochs'?"),
        (["run", "--set", "trian.epochs=3"], "unknown section 'trian'. Did you mean 'train'?"),
        (["run", "--set", "attack.trigger=cheker"], "Did you mean 'checker'?"),
        (["run", "--set", "rate"], "expected --set section.option=value"),
        (["run", "--data", "pairs.tsv"], "--data needs --eval"),
        (["run", "--seeds", "a-b"], "expected --seeds like 0,1,2 or 0-4"),
        (["run", "--seeds", "\u00b2"], "expected --seeds like 0,1,2 or 0-4"),
        (["run", "--set", "augment.crop_min=0.9", "--set", "augment.crop_max=0.8"], "augment: crop_min 0.9 is above crop_max 0.8"),
        (["run", "--seeds", "4-0"], "--seeds 4-0 goes from a larger seed to a smaller one; write 0-4"),
        (["run", "--attack", "none", "--sham"], "attack none has none; leave --sham or that attack out"),
        (["run", "--device", "tpu"], "expected --device cpu or cuda"),
        (["run", "--defense", "./nowhere.py"], "no defense file at ./nowhere.py"),
        (["report", "--fit", "dose", "--format", "html"], "ask for one at a time"),
        (["report", "--fit", "dose", "--against", "clip"], "ask for one at a time"),
        (["report", "--results", "nowhere"], "no runs in nowhere"),
        (["show", "rocilp"], "Did you mean 'roclip'?"),
        (["new", "defense", "Bad-Name"], "a plugin's name is a Python name in lower case"),
        (["matrix", "nowhere.toml"], "no grid at nowhere.toml"),
    ],
)
def test_a_bad_request_is_one_sentence_and_exit_2(arguments, sentence, call, tmp_path):
    done = call(*arguments)
    assert done.returncode == 2, done.stderr
    assert sentence in done.stderr
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert not (tmp_path / "results" / "runs").exists()


def test_help_and_unknown_names_import_no_torch():
    code = "import sys\nfrom benchmark.cli import app\nfrom benchmark.request import Request, plan\ntry:\n    plan(Request(defenses=('rocilp',)))\nexcept Exception as error:\n    print(error)\nprint('torch' in sys.modules, 'pandas' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False False"


def test_a_target_class_that_the_evaluation_set_does_not_have_is_refused_before_training(tmp_path):
    done = bench("run", "--scale", "smoke", "--defense", "clip", "--set", "attack.target_class=boatt", *TINY, "--results", tmp_path / "r")
    assert done.returncode == 2
    assert "unknown target class 'boatt'. Did you mean 'boat'?" in done.stderr
    assert not list((tmp_path / "r" / "cache").glob("train/*"))


def test_an_unwritable_results_folder_is_named(call, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    done = call("run", "--scale", "smoke", *TINY, "--jobs", "1", "--results", blocked / "r")
    assert done.returncode == 2
    assert "cannot write to" in done.stderr


def test_a_matrix_runs_and_reports_and_a_second_start_trains_nothing(call, tmp_path):
    arguments = (
        "run",
        "--attack",
        "none",
        "--attack",
        "targeted",
        "--defense",
        "roclip+aug",
        "--scale",
        "smoke",
        *TINY,
        "--set",
        "targeted.captions_per_target=2",
        "--results",
        tmp_path / "r",
    )
    first = bench(*arguments)
    assert first.returncode == 0, first.stderr
    trained = sorted((tmp_path / "r" / "cache" / "train").iterdir())
    records = {path: path.read_bytes() for path in (tmp_path / "r" / "runs").glob("*/record.json")}
    assert len(records) == 2 * 3  # attacks, defenses with clip and clip+aug
    assert bench(*arguments).returncode == 0
    assert sorted((tmp_path / "r" / "cache" / "train").iterdir()) == trained
    assert {path: path.read_bytes() for path in (tmp_path / "r" / "runs").glob("*/record.json")} == records

    table = list(csv.DictReader(io.StringIO(call("report", "--format", "csv", "--results", tmp_path / "r").stdout)))
    assert tuple(table[0]) == WIDE + DETECTION, "roclip reveals the rank of each pair's own caption"
    assert {row["attack"] for row in table} == {"none", "targeted[captions_per_target=2]"}
    for row in table:
        assert row["seeds"] == "1"
        assert (row["asr"] == "") == (row["attack"] == "none")
        assert (row["asr_floor"] == "") == (row["asr"] == ""), "no ASR without its floor"
        assert 0 <= float(row["zero_shot_acc1"]) <= 1
    markdown = call("report", "--results", tmp_path / "r").stdout
    assert markdown.startswith("| attack | defense |")
    long = list(csv.DictReader(io.StringIO(call("report", "--format", "long", "--results", tmp_path / "r").stdout)))
    assert {"asr", "asr_floor", "zero_shot_acc1", "asr_last_clip"} <= {row["metric"] for row in long}
    without = call("report", "--results", tmp_path / "r", "--defense", "roclip+aug").stdout
    assert "There is no `clip+aug` beside the augmented defenses" in without


def test_new_check_and_run_of_a_plugin_file(call, tmp_path):
    assert call("new", "defense", "mine").returncode == 0
    assert call("new", "defense", "mine").returncode == 2, "an existing file is never overwritten"
    checked = call("check", "./mine.py")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    run = ("run", "--attack", "backdoor", "--defense", "./mine.py", "--scale", "smoke", *TINY, "--no-baseline", "--jobs", "1")
    assert bench(*run, cwd=tmp_path).returncode == 0
    file = tmp_path / "mine.py"
    file.write_text(file.read_text().replace("0.9, gt=0", "0.8, gt=0"))
    assert bench(*run, cwd=tmp_path).returncode == 0
    assert len(list((tmp_path / "results" / "cache" / "train").glob("*/log.json"))) == 2, "an edited plugin trains anew"
    report = call("report", "--format", "csv")
    assert "older source" in report.stderr
    assert len(report.stdout.splitlines()) == 2


def test_an_exception_in_a_plugin_prints_its_own_frames_and_the_matrix_goes_on(tmp_path):
    (tmp_path / "broken.py").write_text(
        "from benchmark.contract import Defense\n\nclass Broken(Defense):\n    '''Breaks.'''\n\n    def loss(self, model, batch, now):\n        return 1 / 0\n"
    )
    done = bench("run", "--attack", "none", "--defense", "./broken.py", "--scale", "smoke", *TINY, cwd=tmp_path)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    assert "broken.py" in done.stderr
    assert "site-packages" not in done.stderr
    assert len(list((tmp_path / "results" / "runs").glob("*/record.json"))) == 1, "clip beside it is done"


@pytest.fixture
def folder_data(tmp_path):
    """Image files on disk: an open_clip TSV and an ImageFolder."""
    rng = np.random.default_rng(0)
    lines = ["filepath\ttitle"]
    (tmp_path / "images").mkdir()
    for row in range(300):
        drawing = Image.fromarray(world.drawn_row(1, "train", row, 48).image)
        drawing = drawing.resize((60, 48)) if row % 2 else drawing
        name = f"images/{row:05d}.{'jpg' if row % 3 else 'png'}"
        drawing.save(tmp_path / name)
        lines.append(f"{name}\t{world.scene(1, 'train', row).captions[0]}")
    (tmp_path / "pairs.tsv").write_text("\n".join(lines) + "\n")
    for split, n in (("train", 8), ("test", 4)):
        for colour, value in (("red", (200, 0, 0)), ("green", (0, 200, 0)), ("blue", (0, 0, 200))):
            folder = tmp_path / "folder" / split / colour
            folder.mkdir(parents=True)
            for index in range(n):
                noise = rng.integers(0, 55, (40, 40, 3)).astype(np.uint8)
                Image.fromarray(noise + np.array(value, dtype=np.uint8)).save(folder / f"{index}.png")
    return tmp_path


def test_image_files_on_disk_go_the_same_way_as_the_drawn_world(folder_data):
    arguments = (
        "run",
        "--data",
        "pairs.tsv",
        "--eval",
        "folder",
        "--attack",
        "backdoor",
        "--defense",
        "roclip",
        "--scale",
        "smoke",
        "--set",
        "train.epochs=2",
        "--set",
        "evaluation.linear_probe=none",
        "--set",
        "attack.captions=templates",
        "--set",
        "defense.pool_fraction=0.3",
        "--jobs",
        "1",
    )
    done = bench(*arguments, cwd=folder_data)
    assert done.returncode == 0, done.stderr
    record = json.loads(next((folder_data / "results" / "runs").glob("*/record.json")).read_text())
    assert record["data"]["name"] == "pairs"
    assert {metric["of"] for metric in record["metrics"] if metric["name"] == "zero_shot_acc1"} == {"folder"}
    assert any("declares no default target" in warning for warning in record["warnings"])
    (path,) = [path for path in (folder_data / "results" / "runs").glob("*/record.json") if '"roclip"' in path.read_text()]
    other = bench(*arguments, "--set", "pack.codec=bytes", "--no-baseline", "--results", "other", cwd=folder_data)
    assert other.returncode == 0, other.stderr
    assert (folder_data / "other" / "runs" / path.parent.name / "record.json").read_bytes() == path.read_bytes(), "images kept as bytes give the same record"
    (folder_data / "images" / "00001.jpg").write_bytes(b"\xff\xd8\xff truncated")
    broken = bench(*arguments, cwd=folder_data)
    assert broken.returncode == 2
    assert "00001.jpg" in broken.stderr


def test_synonyms_of_foreign_data_need_a_source(folder_data, monkeypatch):
    monkeypatch.setitem(ENVIRONMENT, "BENCH_WORDNET", str(folder_data / "nowhere"))
    done = bench("run", "--data", "pairs.tsv", "--eval", "folder", "--attack", "none", "--defense", "clip+aug", "--scale", "smoke", "--no-baseline", cwd=folder_data)
    assert done.returncode == 2
    assert "augment.synonyms=none" in done.stderr


def test_list_show_doctor_dry_run_and_clean(call, tmp_path):
    assert "roclip" in call("list", "defenses").stdout
    assert "blended-stripes, triangles" in call("list", "triggers").stdout
    assert "imagenet " in call("list", "eval-sets").stdout
    assert "watermark" in call("list").stdout
    shown = call("show", "roclip").stdout
    assert "arXiv 2303.06854" in shown
    assert "first_matched_epoch" in shown
    doctor = call("doctor", "--results", tmp_path / "r")
    assert doctor.returncode == 0, doctor.stdout
    assert doctor.stdout.rstrip().endswith("ready")
    dry = bench("run", "--scale", "smoke", *TINY, "--dry-run", "--results", tmp_path / "r")
    assert dry.returncode == 0, dry.stderr
    assert "2 cells, 2 to do" in dry.stdout
    assert not (tmp_path / "r" / "cache" / "train").exists()
    assert call("clean", "--yes", "--results", tmp_path / "r").returncode == 0
    assert not (tmp_path / "r" / "cache").exists()
