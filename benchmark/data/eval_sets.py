"""Evaluation sets: each owns its images, labels, class names, synonyms and prompt templates."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmark.data import world
from benchmark.data.eval_names import known_name, not_a_set
from benchmark.data.eval_readers import Listing, Pool, read_folder
from benchmark.data.eval_torchvision import data_root, read_named
from benchmark.data.image import pixels_sha256
from benchmark.data.prompts import chosen
from benchmark.errors import BenchError, unknown
from benchmark.progress import Progress
from benchmark.settings import DataSettings, canonical, digest
from benchmark.stages import Stages

VERSION = 1


@dataclass(frozen=True)
class Split:
    """Images uint8 (n, S, S, 3), labels int64 (n,) and ids of one split.

    Attributes:
        pool: names the stored images that the split is taken from; ids are unique in one pool.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    ids: tuple[str, ...]
    pool: str = ""

    @property
    def name(self) -> str:
        """A name for these very images; splits that share images share it."""
        return digest([self.pool, *self.ids] if self.pool else list(self.ids))[:16]


@dataclass(frozen=True)
class EvalSet:
    """One labelled set.

    Attributes:
        templates: prompts with `{c}` where the class name goes.
        synonyms: further words for a class, by display name.
        default_target: target class of attacks that are given none.
        about: what a number measured on this set should say about it, such as the metric that publications give.
        captions: captions of test images by id, for a set of one's own that has some.
    """

    name: str
    classnames: tuple[str, ...]
    templates: tuple[str, ...]
    synonyms: dict[str, tuple[str, ...]]
    default_target: str | None
    train: Split
    validation: Split
    test: Split
    about: dict[str, Any] = field(default_factory=dict)
    captions: dict[str, tuple[str, ...]] = field(default_factory=dict)

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
    def no_probe(self) -> str | None:
        """Why a linear probe cannot be trained on this set, or None if it can."""
        if len(self.train.labels) == 0:
            return f"evaluation set {self.name!r} has no train split, and its test images are not used for training"
        if len(self.validation.labels) == 0:
            return f"evaluation set {self.name!r} has too few training images to set some apart for validation"
        return None

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
            **self.about,
        }


@dataclass(frozen=True)
class Suite:
    """The evaluation sets of a run; attacks choose targets from `main`.

    Attributes:
        folder: everything that is stored of the sets; a defense may not open it.
        synonyms: words of the data's own vocabulary with their synonyms; empty where there is no such table.
        world_seed: seed of the drawn world that the sets belong to; None for sets of other data.
    """

    sets: dict[str, EvalSet]
    content: str
    folder: Path
    synonyms: dict[str, tuple[str, ...]]
    warnings: tuple[str, ...] = ()
    world_seed: int | None = None

    @property
    def main(self) -> EvalSet:
        """The first set."""
        return next(iter(self.sets.values()))

    def get(self, name: str) -> EvalSet:
        """The set with this name, or an error with the nearest match."""
        if name not in self.sets:
            raise unknown("evaluation set", name, self.sets)
        return self.sets[name]


def open_suite(
    settings: DataSettings,
    wanted: Sequence[str | Path] | Path | None,
    stages: Stages,
    progress: Progress,
    root: Path | None = None,
    templates: str = "set",
) -> Suite:
    """The drawn world's sets, or those that are asked for.

    Args:
        wanted: folders and names of known data sets, the main one first; nothing for the drawn world.
        root: where the data of named sets lie. Default: BENCH_EVAL_ROOT, else ~/.cache/bench/eval.
        templates: `set`, `openai` or a file, as `--templates` takes them.

    Raises:
        BenchError: a set that is not there or is in no known layout, two sets of one name, prompts without `{c}`.
    """
    if not wanted:
        facts = {
            "stage": "eval_sets",
            "version": VERSION,
            "world": world.VERSION,
            "side": settings.side,
            "seed": settings.seed,
            "n_test": settings.n_test,
            "n_probe": settings.n_probe,
        }
        return replace(_load(stages.make("eval_sets", facts, partial(_draw, settings, progress))), world_seed=settings.seed)
    prompts = chosen(templates)
    suites: list[Suite] = []
    for one in [wanted] if isinstance(wanted, Path) else wanted:
        listing = read_set(str(one), root)
        if any(listing.name in suite.sets for suite in suites):
            raise BenchError(f"two evaluation sets are named {listing.name!r}; metrics go by the name, so rename one of the folders")
        facts = {"stage": "eval_sets", "version": VERSION, "side": settings.side, **listing.facts}
        suites.append(_load(stages.make("eval_sets", facts, partial(_decode, listing, settings.side, progress))))
    return _joined(suites, prompts, stages)


def read_set(wanted: str, root: Path | None = None) -> Listing:
    """The evaluation set in a folder, or the known one of this name, not yet decoded."""
    name = known_name(wanted)
    if name is not None:
        return read_named(name, data_root(root))
    if not Path(wanted).is_dir():
        raise not_a_set(wanted)
    return read_folder(Path(wanted))


def _joined(suites: Sequence[Suite], prompts: tuple[str, ...] | None, stages: Stages) -> Suite:
    """One suite of several; the main set is that of the first."""
    first = suites[0]
    if len(suites) == 1 and prompts is None:
        return first
    sets = {name: one if prompts is None else replace(one, templates=prompts) for suite in suites for name, one in suite.sets.items()}
    content = digest({"suites": [suite.content for suite in suites], "templates": prompts})
    folder = first.folder if len(suites) == 1 else stages.root / "eval_sets"
    warnings = [*first.warnings, *(line for suite in suites[1:] for line in suite.warnings if _NO_TARGET not in line)]
    return Suite(sets, content, folder, {}, tuple(warnings))


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


_NO_TARGET = "declares no default target"


def _decode(listing: Listing, side: int, progress: Progress, out: Path) -> None:
    """Stores the images of a set, and how they fall into splits that do not overlap."""
    hashes = {}
    for split, pool in listing.pools.items():
        with progress.bar(f"decoding {listing.name}/{split}", len(pool.ids), "images") as advance:
            hashes[split] = _store(out, split, pool, side, advance)
    warnings = list(listing.warnings)
    target = listing.target
    if target is None:
        target = listing.classes[0]
        warnings.append(f"evaluation set {listing.name!r} {_NO_TARGET} (default_target.txt); its first class {target!r} is used")
    repeated = sorted({name for name in listing.classes if listing.classes.count(name) > 1})
    if repeated:
        warnings.append(f"evaluation set {listing.name!r} has classes that share a name: {', '.join(repeated[:10])}")
    splits = _splits(listing, hashes, warnings)
    about = _about(listing.name, listing.classes, listing.templates, listing.synonyms, target, splits)
    if listing.about:
        about["about"] = listing.about
    if listing.captions:
        about["captions"] = {row_id: list(captions) for row_id, captions in listing.captions.items()}
    _finish(out, [about], {}, warnings)


def _splits(listing: Listing, hashes: dict[str, list[str]], warnings: list[str]) -> dict[str, tuple[Any, ...]]:
    """Pool, labels and, where it is not the whole pool, rows of each split.

    A set of one's own whose train and test share images is refused. A published one is what it is: its test split stays
    whole, and what it shares with others is left out there.
    """
    found: dict[str, tuple[Any, ...]] = {"train": ("test", [], []), "validation": ("test", [], []), "test": ("test", listing.pools["test"].labels)}
    if "train" not in listing.pools:
        warnings.append(f"evaluation set {listing.name!r} has no train split, so no linear probe is trained on it")
    taken = set(hashes["test"])
    for split in [name for name in ("validation", "train") if name in listing.pools]:
        shared = set(hashes["test"]) & set(hashes[split])
        if shared and not listing.published:
            such = listing.pools["test"].ids[hashes["test"].index(min(shared))].rpartition("/")[2]
            raise BenchError(f"{listing.where}: {len(shared)} test images also stand in {split}/, such as {such}; the probe must not be tested on what it was trained on")
        labels = listing.pools[split].labels
        rows = [row for row, image in enumerate(hashes[split]) if image not in taken]
        if not rows:
            raise BenchError(f"{listing.where}: every {split} image also stands in another split; the probe must not be tested on what it was trained on")
        if len(rows) < len(labels):
            warnings.append(f"{len(labels) - len(rows)} {split} images of evaluation set {listing.name!r} stand in another of its splits too and were left out of {split}")
        if split == "train" and "validation" not in listing.pools:
            apart = set(listing.apart)
            for name, part in (("train", [row for row in rows if row not in apart]), ("validation", [row for row in rows if row in apart])):
                found[name] = ("train", [labels[row] for row in part], part)
        else:
            found[split] = (split, [labels[row] for row in rows], rows) if len(rows) < len(labels) else (split, labels)
        taken |= set(hashes[split])
    return found


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


def _store(folder: Path, name: str, pool: Pool, side: int, advance: Callable[..., None]) -> list[str]:
    """Decodes a pool one image at a time; the hash of each."""
    stored = np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=np.uint8, shape=(len(pool.ids), side, side, 3))
    whole, hashes = hashlib.sha256(), []
    for row, image in enumerate(pool.images(side)):
        stored[row] = image
        whole.update(image.tobytes())
        hashes.append(pixels_sha256(image))
        advance(1)
    stored.flush()
    (folder / f"{name}.json").write_text(json.dumps({"ids": pool.ids, "pixels": whole.hexdigest()}))
    return hashes


def _finish(folder: Path, sets: list[dict[str, Any]], synonyms: dict[str, list[str]], warnings: list[str]) -> None:
    pools = {path.stem: json.loads(path.read_text())["pixels"] for path in sorted(folder.glob("*.json"))}
    content = digest({"sets": sets, "pools": pools})
    (folder / "suite.json").write_text(canonical({"sets": sets, "content": content, "synonyms": synonyms, "warnings": warnings}))


def _load(folder: Path) -> Suite:
    about = json.loads((folder / "suite.json").read_text())
    pools = {path.stem: (np.load(path, mmap_mode="r", allow_pickle=False), json.loads(path.with_suffix(".json").read_text())) for path in folder.glob("*.npy")}

    def split(pool: str, labels: list[int], rows: list[int] | None = None) -> Split:
        images, stored = pools[pool]
        ids = stored["ids"]
        if rows is not None:
            # Rows that follow each other stay on disk; others are copied.
            together = rows == list(range(rows[0], rows[-1] + 1)) if rows else False
            images, ids = images[slice(rows[0], rows[-1] + 1) if together else rows], [ids[row] for row in rows]
        return Split(images, np.array(labels, dtype=np.int64), tuple(ids), stored["pixels"])

    sets = {}
    for one in about["sets"]:
        parts = {name: split(*facts) for name, facts in one["splits"].items()}
        synonyms = {word: tuple(others) for word, others in one["synonyms"].items()}
        captions = {row_id: tuple(texts) for row_id, texts in one.get("captions", {}).items()}
        classes, templates, about_it = tuple(one["classes"]), tuple(one["templates"]), one.get("about", {})
        sets[one["name"]] = EvalSet(one["name"], classes, templates, synonyms, one["default_target"], parts["train"], parts["validation"], parts["test"], about_it, captions)
    return Suite(sets, about["content"], folder, {word: tuple(others) for word, others in about["synonyms"].items()}, tuple(about["warnings"]))
