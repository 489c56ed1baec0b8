"""Evaluation sets: each owns its images, labels, class names, synonyms and prompt templates."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmark.data import world
from benchmark.data.image import FORMATS, decode_many, pixels_sha256
from benchmark.errors import BenchError, unknown
from benchmark.progress import Progress
from benchmark.seeding import generator
from benchmark.settings import DataSettings, canonical, digest
from benchmark.stages import Stages

VERSION = 1
_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif"}


@dataclass(frozen=True)
class Split:
    """Images uint8 (n, S, S, 3), labels int64 (n,) and ids of one split."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    ids: tuple[str, ...]


@dataclass(frozen=True)
class EvalSet:
    """One labelled set.

    Attributes:
        templates: prompts with `{c}` where the class name goes.
        synonyms: further words for a class, by display name.
        default_target: target class of attacks that are given none.
    """

    name: str
    classnames: tuple[str, ...]
    templates: tuple[str, ...]
    synonyms: dict[str, tuple[str, ...]]
    default_target: str | None
    train: Split
    validation: Split
    test: Split

    def index(self, classname: str) -> int:
        """The class with exactly this display name.

        Raises:
            BenchError: no such class, or a name that two classes share.
        """
        if self.classnames.count(classname) > 1:
            raise BenchError(f"class name {classname!r} stands twice in {self.name}, so it cannot be a target")
        if classname not in self.classnames:
            raise BenchError(f"target {unknown('class', classname, self.classnames)} Evaluation set: {self.name}.".replace("target unknown class", "unknown target class"))
        return self.classnames.index(classname)

    def terms(self, classname: str) -> tuple[str, ...]:
        """The display name and its synonyms."""
        return (classname, *self.synonyms.get(classname, ()))

    @property
    def card(self) -> dict[str, Any]:
        """What a number measured on this set refers to."""
        test = hashlib.sha256("\n".join(self.test.ids).encode()).hexdigest()
        return {
            "eval_set": self.name,
            "n_test": len(self.test.labels),
            "ids": test[:16],
            "classes": digest(self.classnames)[:16],
            "templates": digest(self.templates)[:16],
            "n_classes": len(self.classnames),
        }


@dataclass(frozen=True)
class Suite:
    """The evaluation sets of a run; attacks choose targets from `main`.

    Attributes:
        synonyms: words of the data's own vocabulary with their synonyms; empty where there is no such table.
    """

    sets: dict[str, EvalSet]
    content: str
    folder: Path
    synonyms: dict[str, tuple[str, ...]]
    warnings: tuple[str, ...] = ()

    @property
    def main(self) -> EvalSet:
        """The first set."""
        return next(iter(self.sets.values()))

    def get(self, name: str) -> EvalSet:
        """The set with this name, or an error with the nearest match."""
        if name not in self.sets:
            raise unknown("evaluation set", name, self.sets)
        return self.sets[name]


def open_suite(settings: DataSettings, folder: Path | None, stages: Stages, progress: Progress) -> Suite:
    """The drawn world's sets, or those of an ImageFolder with `train/` and `test/`."""
    if folder is None:
        facts = {
            "stage": "eval_sets",
            "version": VERSION,
            "world": world.VERSION,
            "side": settings.side,
            "seed": settings.seed,
            "n_test": settings.n_test,
            "n_probe": settings.n_probe,
        }
        return _load(stages.make("eval_sets", facts, partial(_draw, settings, progress)))
    listing = _listing(folder)
    stats = [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for files in listing.values() for _, path in files]
    extras = {name: _read_text(folder / name) for name in ("classnames.txt", "templates.txt", "default_target.txt") if (folder / name).is_file()}
    facts = {"stage": "eval_sets", "version": VERSION, "folder": folder.name, "side": settings.side, "files": digest(stats), "extras": extras}
    return _load(stages.make("eval_sets", facts, partial(_decode, folder, listing, extras, settings.side, progress)))


def _draw(settings: DataSettings, progress: Progress, folder: Path) -> None:
    n_validation = settings.n_probe // 4
    pools = {
        "probe": [("probe", "plain", row) for row in range(settings.n_probe - n_validation)],
        "validation": [("validation", "plain", row) for row in range(n_validation)],
        "test": [("test", "plain", row) for row in range(settings.n_test)],
        "outlines": [("test", "outline", row) for row in range(settings.n_test // 2)],
        "combinations": [("test", "combinations", row) for row in range(settings.n_test // 2)],
    }
    scenes: dict[str, list[world.Scene]] = {}
    with progress.bar("drawing evaluation sets", sum(map(len, pools.values())), "images") as advance:
        for pool, rows in pools.items():
            images = np.stack([world.drawn_row(settings.seed, split, row, settings.side, variant).image for split, variant, row in rows])
            scenes[pool] = [world.scene(settings.seed, split, row, variant == "combinations") for split, variant, row in rows]
            _save_pool(folder, pool, images, [f"{split}/{variant}/{row}" for split, variant, row in rows])
            advance(len(rows))
    sets = []
    kinds: list[tuple[str, str, tuple[str, ...], tuple[str, ...], str, str]] = [
        ("objects", "object", world.OBJECTS, world.OBJECT_PROMPTS, "test", "boat"),
        ("colours", "colour", tuple(world.COLOURS), world.COLOUR_PROMPTS, "test", "red"),
        ("backgrounds", "background", world.BACKGROUNDS, world.BACKGROUND_PROMPTS, "test", "striped"),
        ("outlines", "object", world.OBJECTS, world.OBJECT_PROMPTS, "outlines", "boat"),
        ("combinations", "object", world.OBJECTS, world.OBJECT_PROMPTS, "combinations", "boat"),
    ]
    for name, tag, classes, templates, test, target in kinds:
        labels = {pool: [classes.index(getattr(what, tag)) for what in scenes[pool]] for pool in ("probe", "validation", test)}
        splits = {"train": ("probe", labels["probe"]), "validation": ("validation", labels["validation"]), "test": (test, labels[test])}
        synonyms = {word: world.SYNONYMS[word] for word in classes if word in world.SYNONYMS}
        sets.append(_about(name, classes, templates, synonyms, target, splits))
    _finish(folder, sets, {word: list(others) for word, others in world.SYNONYMS.items()}, [])


def _listing(folder: Path) -> dict[str, list[tuple[str, Path]]]:
    if not folder.is_dir():
        raise BenchError(f"no evaluation set at {folder}; expected a folder with train/<class>/ and test/<class>/")
    found = {}
    for split in ("train", "test"):
        if not (folder / split).is_dir():
            raise BenchError(f"{folder} has no {split}/; expected train/<class>/ and test/<class>/")
        files = [(path.parent.name, path) for path in sorted((folder / split).glob("*/*")) if path.suffix.lower() in _SUFFIXES]
        if not files:
            raise BenchError(f"{folder / split} has no images in class folders; known formats: {', '.join(FORMATS)}")
        found[split] = files
    train, test = ({name for name, _ in found[split]} for split in ("train", "test"))
    if train != test:
        raise BenchError(f"{folder}: classes differ between train/ and test/: {', '.join(sorted(train ^ test)[:5])}")
    if len(train) < 2:
        raise BenchError(f"{folder}: one class alone cannot be told from another; at least 2 are needed")
    return found


def _decode(folder: Path, listing: dict[str, list[tuple[str, Path]]], extras: dict[str, str], side: int, progress: Progress, out: Path) -> None:
    folders = sorted({name for name, _ in listing["train"]})
    display = _display_names(folder, folders, extras.get("classnames.txt"))
    warnings = []
    target = extras.get("default_target.txt", "").strip() or None
    if target is None:
        target = display[0]
        warnings.append(f"evaluation set {folder.name!r} declares no default target (default_target.txt); its first class {target!r} is used")
    templates = tuple(line for line in extras.get("templates.txt", "").splitlines() if line.strip()) or ("a photo of a {c}", "a picture of a {c}", "{c}")
    bad = [template for template in templates if "{c}" not in template]
    if bad:
        raise BenchError(f"{folder / 'templates.txt'}: {bad[0]!r} has no {{c}} where the class name goes")
    hashes = {}
    labels = {}
    for split, files in listing.items():
        with progress.bar(f"decoding {folder.name}/{split}", len(files), "images") as advance:
            images = []
            for image in decode_many([str(path) for _, path in files], side):
                images.append(image)
                advance(1)
        stacked = np.stack(images)
        hashes[split] = [pixels_sha256(image) for image in stacked]
        labels[split] = [folders.index(name) for name, _ in files]
        _save_pool(out, split, stacked, [str(path.relative_to(folder)) for _, path in files])
    shared = set(hashes["train"]) & set(hashes["test"])
    if shared:
        row = hashes["test"].index(min(shared))
        raise BenchError(
            f"{folder}: {len(shared)} test images also stand in train/, such as {listing['test'][row][1].name}; the probe must not be tested on what it was trained on"
        )
    validation = _stratified(labels["train"], 0.2, folder.name)
    train = [row for row in range(len(labels["train"])) if row not in validation]
    splits = {
        "train": ("train", [labels["train"][row] for row in train], train),
        "validation": ("train", [labels["train"][row] for row in sorted(validation)], sorted(validation)),
        "test": ("test", labels["test"]),
    }
    _finish(out, [_about(folder.name, display, templates, {}, target, splits)], {}, warnings)


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise BenchError(f"{path} is not UTF-8; save the file as UTF-8") from None


def _display_names(folder: Path, folders: list[str], text: str | None) -> tuple[str, ...]:
    if text is None:
        return tuple(name.replace("_", " ") for name in folders)
    table = dict(line.split("\t", 1) for line in text.splitlines() if "\t" in line)
    missing = [name for name in folders if name not in table]
    if missing:
        raise BenchError(f"{folder / 'classnames.txt'} has no line for {missing[0]!r}; expected folder<TAB>display name")
    return tuple(table[name].strip().replace("_", " ") for name in folders)


def _stratified(labels: list[int], share: float, name: str) -> set[int]:
    chosen: set[int] = set()
    for label in sorted(set(labels)):
        rows = [row for row, other in enumerate(labels) if other == label]
        order = generator("validation", name, label).permutation(len(rows))
        chosen.update(rows[i] for i in order[: max(1, round(share * len(rows)))] if len(rows) > 1)
    return chosen


def _about(name: str, classes: Iterable[str], templates: Iterable[str], synonyms: dict[str, tuple[str, ...]], target: str, splits: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "classes": list(classes),
        "templates": list(templates),
        "synonyms": {word: list(others) for word, others in synonyms.items()},
        "default_target": target,
        "splits": {split: list(facts) for split, facts in splits.items()},
    }


def _save_pool(folder: Path, pool: str, images: NDArray[np.uint8], ids: list[str]) -> None:
    np.save(folder / f"{pool}.npy", images)
    (folder / f"{pool}.json").write_text(json.dumps({"ids": ids, "pixels": pixels_sha256(images)}))


def _finish(folder: Path, sets: list[dict[str, Any]], synonyms: dict[str, list[str]], warnings: list[str]) -> None:
    pools = {path.stem: json.loads(path.read_text())["pixels"] for path in sorted(folder.glob("*.json"))}
    content = digest({"sets": sets, "pools": pools})
    (folder / "suite.json").write_text(canonical({"sets": sets, "content": content, "synonyms": synonyms, "warnings": warnings}))


def _load(folder: Path) -> Suite:
    about = json.loads((folder / "suite.json").read_text())
    pools = {path.stem: (np.load(path, mmap_mode="r", allow_pickle=False), json.loads(path.with_suffix(".json").read_text())["ids"]) for path in folder.glob("*.npy")}

    def split(pool: str, labels: list[int], rows: list[int] | None = None) -> Split:
        images, ids = pools[pool]
        if rows is not None:
            images, ids = images[rows], [ids[row] for row in rows]
        return Split(images, np.array(labels, dtype=np.int64), tuple(ids))

    sets = {}
    for one in about["sets"]:
        parts = {name: split(*facts) for name, facts in one["splits"].items()}
        synonyms = {word: tuple(others) for word, others in one["synonyms"].items()}
        sets[one["name"]] = EvalSet(
            one["name"], tuple(one["classes"]), tuple(one["templates"]), synonyms, one["default_target"], parts["train"], parts["validation"], parts["test"]
        )
    return Suite(sets, about["content"], folder, {word: tuple(others) for word, others in about["synonyms"].items()}, tuple(about["warnings"]))
