"""Recorded runs on disk for tests of the report: committed ones under other labels, so that everything in them is real."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from benchmark.evaluate.pictures import gallery_key
from benchmark.report.controls import without_controls
from benchmark.report.records import Run, load
from benchmark.stages import seal

REFERENCE = Path(__file__).parents[1] / "results" / "reference" / "main"
HOSTILE = "<script>window.hacked = 1</script>[red]=cmd()\"'&{{7*7}}"


def committed(attack: str, defense: str) -> list[Path]:
    """Folders of the committed runs of a cell, by seed, without its controls."""
    found = {run.seed: run.folder for run in attacked() if (run.label("attack"), run.label("defense")) == (attack, defense)}
    return [found[seed] for seed in sorted(found)]


def attacked() -> list[Run]:
    """The committed runs of the README's table, without those of a clean model and of sham poison."""
    return without_controls(load(REFERENCE))


def put(results: Path, folder: Path, run_id: str, change=lambda record: None) -> None:
    """Copies a run with its pictures under another id, its record changed."""
    record = json.loads((folder / "record.json").read_text())
    pictures = REFERENCE / "gallery" / gallery_key(record)
    change(record)
    record["run_id"] = run_id
    copy = results / "runs" / run_id
    shutil.copytree(folder, copy)
    (copy / "record.json").write_text(json.dumps(record))
    gallery = results / "gallery" / gallery_key(record)
    if pictures.is_dir() and not gallery.is_dir():
        shutil.copytree(pictures, gallery)


def matrix(results: Path, n_attacks: int = 6, n_defenses: int = 8, n_seeds: int = 5) -> Path:
    """A results folder of that many cells and seeds; every attack has pictures of its own."""
    for number in range(n_attacks):
        kind = ("targeted", "backdoor")[number % 2]
        for seed, folder in enumerate(committed(kind, "clip")[:n_seeds]):
            for defense in range(n_defenses):

                def change(record, number=number, defense=defense, kind=kind):
                    record["label"] |= {"attack": f"{kind}[variant={number}]", "defense": f"defense{defense}" if defense else "clip"}
                    record["poison"]["manifest_sha256"] += str(number)
                    record["curve"][-1]["loss_mean"] += defense * 1e-6

                put(results, folder, f"a{number}d{defense}s{seed}", change)
            _recoloured(results, f"a{number}d0s{seed}", number)
    return results


def hostile(results: Path) -> Path:
    """A results folder whose labels, captions and warnings try to be run."""

    def change(record):
        record["label"] |= {"attack": HOSTILE, "defense": "=cmd()"}
        record["warnings"].append(HOSTILE)
        record["curve"][-1]["loss_mean"] += 1e-6

    for attack, number in (("backdoor", 0), ("targeted", 1)):
        put(results, committed(attack, "clip")[0], f"hostile{number}", change)
        put(results, committed(attack, "clip")[0], f"plain{number}")
        put(results, committed(attack, "roclip")[0], f"matched{number}")
    for folder in (results / "gallery").iterdir():
        found = json.loads((folder / "gallery.json").read_text())
        for edit in found["edits"]:
            edit["caption_after"] = f"a boat {HOSTILE}"
        (folder / "gallery.json").write_text(json.dumps(found))
        (folder / "done.json").unlink()
        seal(folder, {})
    return results


def _recoloured(results: Path, run_id: str, number: int) -> None:
    """Other pixels in the pictures of a run, so that attacks share none."""
    record = json.loads((results / "runs" / run_id / "record.json").read_text())
    folder = results / "gallery" / gallery_key(record)
    order = list(itertools.permutations(range(3)))[number % 6]
    for path in folder.glob("*.png"):
        Image.fromarray(np.asarray(Image.open(path).convert("RGB"))[..., list(order)]).save(path)
    (folder / "done.json").unlink()
    seal(folder, {})
