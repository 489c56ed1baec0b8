"""RN50 at 224 px from JPEG files on the CPU: the way that a million pairs would go, with a few hundred."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from benchmark.data import world

ROOT = Path(__file__).parents[1]
SMALLER = (
    "train.epochs=2",
    "train.batch_size=32",
    "train.warmup_steps=2",
    "train.precision=fp32",
    "train.threads=2",
    "train.snapshots=all",
    "augment.synonyms=none",
)
SETS = [word for value in SMALLER for word in ("--set", value)]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory):
    """A TSV of 260 drawn pairs as JPEG files, and an ImageFolder of objects."""
    folder = tmp_path_factory.mktemp("jpegs")
    (folder / "images").mkdir()
    lines = ["filepath\ttitle"]
    for row in range(260):
        name = f"images/{row:05d}.jpg"
        Image.fromarray(world.drawn_row(0, "train", row, 256).image).resize((300, 240)).save(folder / name, quality=92)
        lines.append(f"{name}\t{world.scene(0, 'train', row).captions[0]}")
    (folder / "pairs.tsv").write_text("\n".join(lines) + "\n")
    wanted = world.OBJECTS[:4]
    for split, n in (("train", 4), ("test", 3)):
        counts, row = dict.fromkeys(wanted, 0), 0
        while min(counts.values()) < n:
            what = world.scene(0, "probe" if split == "train" else "test", row)
            if what.object in counts and counts[what.object] < n:
                path = folder / "objects" / split / what.object / f"{row}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(world.drawn_row(0, "probe" if split == "train" else "test", row, 224).image).save(path, quality=92)
                counts[what.object] += 1
            row += 1
    return folder


def bench(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "benchmark", *arguments], cwd=cwd, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)})


@pytest.mark.parametrize("codec", ["pixels", "bytes"])
def test_rn50_trains_and_is_measured(jpegs, codec, request):
    options = ("--set", "attack.rate=0.05", "--set", "attack.captions=templates", "--set", f"attack.target_class={world.OBJECTS[0]}", "--set", f"pack.codec={codec}")
    done = bench(
        *("run", "--scale", "paper", "--data", "pairs.tsv", "--eval", "objects", "--attack", "backdoor", "--defense", "clip+aug", "--no-baseline"),
        *(*SETS, *options, "--results", f"results-{codec}"),
        cwd=jpegs,
    )
    assert done.returncode == 0, done.stderr
    (path,) = (jpegs / f"results-{codec}").glob("runs/*/record.json")
    record = json.loads(path.read_text())
    names = {metric["name"] for metric in record["metrics"]}
    assert {"asr", "asr_floor", "zero_shot_acc1", "linear_probe_acc1"} <= names
    assert record["resolved"]["model"]["name"] == "RN50-quickgelu"
    assert [point["steps"] for point in record["curve"]] == [(260 - 2 * 32) // 32] * 2
    earlier = request.config.stash.setdefault(_RECORDS, [])
    earlier.append(path.read_bytes())
    assert len(set(earlier)) == 1, "both codecs make one record"


_RECORDS = pytest.StashKey[list[bytes]]()


def test_a_recipe_starts_on_a_stand_in_of_the_same_layout(jpegs, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # published numbers in one piece
    grid = tmp_path / "grid.toml"
    text = (ROOT / "results" / "recipes" / "roclip2023-targeted" / "grid.toml").read_text()
    text = text.replace(', "defense.preset=official"', "")  # an option of the defenses that are left out here
    grid.write_text(text.replace('"clip", "clip+aug", "roclip", "roclip+aug"', '"clip"').replace('"clip", "roclip+aug"', '"clip"'))
    smaller = ("attack.n_targets=2", "attack.captions_per_target=3", "attack.caption_source=templates", "train.epochs=1")
    done = bench("matrix", str(grid), "--data", "pairs.tsv", "--eval", "objects", *SETS, *[word for value in smaller for word in ("--set", value)], "--jobs", "1", cwd=jpegs)
    assert done.returncode == 0, done.stderr
    assert "93.8 % [71.7, 98.9]" in done.stdout
    assert len(list(tmp_path.glob("runs/*/record.json"))) == 2
