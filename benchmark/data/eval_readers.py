"""Reads evaluation sets from folders: ImageFolder layout, clip_benchmark's tars, labels.csv with classes.py."""

from __future__ import annotations

import csv
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmark.data.image import FORMATS, decode_bytes, decode_many
from benchmark.data.prompts import GENERIC, read_classes, read_text, template_lines
from benchmark.data.shards import DAMAGE, check_end
from benchmark.errors import BenchError
from benchmark.seeding import generator
from benchmark.settings import digest

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif"}
LAYOUTS = "train/<class>/ and test/<class>/ images, clip_benchmark's tars, or labels.csv with classes.py"
CAPTIONS = "captions.tsv"
_VALIDATION = 0.2
_MAX_MEMBER = 64 << 20
_CAPTIONS_LIMIT = 1 << 26  # bytes; five captions each of 5,000 images are two million

ImagesOf = Callable[[int], Iterator[NDArray[np.uint8]]]


@dataclass(frozen=True)
class Pool:
    """Images of one split, in order: an id and a label each, and their pixels at a given side, uint8 (side, side, 3)."""

    ids: list[str]
    labels: list[int]
    images: ImagesOf


@dataclass(frozen=True)
class Listing:
    """An evaluation set that was found and not yet decoded.

    Attributes:
        classes: display names in label order.
        pools: `test`, perhaps `train` and `validation`.
        apart: rows of `train` that are the validation split, where there is no pool of that name.
        facts: what the pixels, labels and names depend on.
        target: default target class; None where the set declares none.
        about: what a number measured on this set should say about it.
        captions: captions of test images by id, for retrieval.
        published: whether a test image that also stands in train is dropped from train, instead of refused.
    """

    name: str
    where: str
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    pools: dict[str, Pool]
    apart: tuple[int, ...]
    facts: dict[str, Any]
    target: str | None = None
    synonyms: dict[str, tuple[str, ...]] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    captions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    published: bool = False
    warnings: tuple[str, ...] = ()


def read_folder(folder: Path) -> Listing:
    """The evaluation set in a folder, by what lies in it.

    Raises:
        BenchError: nothing there, or something that is in no known layout; the sentence says what is missing.
    """
    if not folder.is_dir():
        raise BenchError(f"no evaluation set at {folder}; expected a folder with {LAYOUTS}")
    if any((folder / part / "labels.csv").is_file() for part in (".", "test")):
        listing = _labels_csv(folder)
    elif (folder / "zeroshot_classification_templates.txt").is_file() or any((folder / "test").glob("*.tar")) or (folder / "test" / "nshards.txt").is_file():
        listing = _clip_benchmark(folder)
    else:
        listing = _image_folder(folder)
    if not (folder / CAPTIONS).is_file():
        return listing
    captions = read_captions(folder / CAPTIONS, listing.pools["test"].ids)
    return replace(listing, captions=captions, facts={**listing.facts, "captions": digest(captions)})


def read_captions(file: Path, ids: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Captions of test images by id, from lines of image, tab, caption; an image may have several.

    Raises:
        BenchError: a line without a tab or a caption, or of an image that is not in the test split.
    """
    found: dict[str, list[str]] = {}
    known = set(ids)
    for number, line in enumerate(read_text(file, _CAPTIONS_LIMIT).split("\n"), 1):  # a caption may hold other ends of lines
        if not line.strip():
            continue
        image, tab, caption = line.partition("\t")
        if not tab or not caption.strip():
            raise BenchError(f"{file} row {number}: expected image<TAB>caption, got {line[:60]!r}")
        if image not in known:
            raise BenchError(f"{file} row {number}: {image!r} is no test image of this set; they are named like {ids[0]!r}")
        found.setdefault(image, []).append(caption.strip())
    if not found:
        raise BenchError(f"{file} has no captions; expected lines of image<TAB>caption")
    return {image: tuple(captions) for image, captions in found.items()}


def files_pool(root: Path, split: str, files: Sequence[Path], labels: Sequence[int]) -> tuple[Pool, list[tuple[str, int, int]]]:
    """A pool of image files and the size and time of each, which change when an image is replaced under its name."""
    stats = []
    for path in files:
        try:
            stat = path.stat()
        except OSError:
            raise BenchError(f"{root}: no file at {path}, which the {split} split lists") from None
        stats.append((str(path.relative_to(root)), stat.st_size, stat.st_mtime_ns))
    return Pool([name for name, _, _ in stats], list(labels), partial(decode_many, [str(path) for path in files])), stats


def stratified(labels: Sequence[int], name: str) -> tuple[int, ...]:
    """A fifth of the rows of every class, at least one, seeded by the set's name; none of a class with one row."""
    rows: dict[int, list[int]] = {}
    for row, label in enumerate(labels):
        rows.setdefault(label, []).append(row)
    chosen: list[int] = []
    for label, mine in sorted(rows.items()):
        order = generator("validation", name, label).permutation(len(mine))
        if len(mine) > 1:
            chosen += [mine[i] for i in order[: max(1, round(_VALIDATION * len(mine)))]]
    return tuple(sorted(chosen))


def set_apart(labels: Sequence[int], name: str) -> tuple[list[int], tuple[int, ...]]:
    """An order of the rows with the validation split at the end, and where that stands: a slice needs no copy."""
    chosen = set(stratified(labels, name))
    order = [*(row for row in range(len(labels)) if row not in chosen), *sorted(chosen)]
    return order, tuple(range(len(labels) - len(chosen), len(labels)))


def _image_folder(folder: Path) -> Listing:
    name = _name(folder)
    found = _class_folders(folder)
    extras = _texts(folder, "classnames.txt", "templates.txt", "default_target.txt")
    folders = sorted({path.parent.name for path in found["test"]})
    classes = _display_names(folder, folders, extras.get("classnames.txt"))
    pools, stats = {}, []
    index = {one: label for label, one in enumerate(folders)}
    for split, files in found.items():
        pools[split], of_split = files_pool(folder, split, files, [index[path.parent.name] for path in files])
        stats += of_split
    return Listing(
        name=name,
        where=str(folder),
        classes=classes,
        templates=template_lines(extras.get("templates.txt", ""), folder / "templates.txt") or GENERIC,
        pools=pools,
        apart=stratified(pools["train"].labels, name) if "train" in pools else (),
        facts={"folder": name, "files": digest(stats), "extras": extras},
        target=_target(extras),
    )


def _class_folders(folder: Path) -> dict[str, list[Path]]:
    if not (folder / "test").is_dir():
        raise BenchError(f"{folder} has no test/; expected {LAYOUTS}")
    found = {}
    for split in ("train", "test"):
        if not (folder / split).is_dir():
            continue
        files = [path for path in sorted((folder / split).glob("*/*")) if path.suffix.lower() in SUFFIXES]
        if not files:
            raise BenchError(f"{folder / split} has no images in class folders; known formats: {', '.join(FORMATS)}")
        found[split] = files
    classes = {split: {path.parent.name for path in files} for split, files in found.items()}
    differing = classes["test"] ^ classes.get("train", classes["test"])
    if differing:
        raise BenchError(f"{folder}: classes differ between train/ and test/: {', '.join(sorted(differing)[:5])}")
    if len(classes["test"]) < 2:
        raise BenchError(f"{folder}: one class alone cannot be told from another; at least 2 are needed")
    return found


def _display_names(folder: Path, folders: list[str], text: str | None) -> tuple[str, ...]:
    if text is None:
        if all(re.fullmatch(r"n\d{8}", name) for name in folders):
            raise BenchError(f"{folder}: {folders[0]!r} is a WordNet id and no name; classnames.txt must say what each means, as {folders[0]}<TAB>name")
        return tuple(name.replace("_", " ") for name in folders)
    table = dict(line.split("\t", 1) for line in text.splitlines() if "\t" in line)
    missing = [name for name in folders if name not in table]
    if missing:
        raise BenchError(f"{folder / 'classnames.txt'} has no line for {missing[0]!r}; expected folder<TAB>display name")
    return tuple(table[name].strip().replace("_", " ") for name in folders)


def _clip_benchmark(folder: Path) -> Listing:
    """A data set as clip_benchmark writes it: `<split>/nshards.txt` and `<split>/0.tar` ..., names and templates beside."""
    name = _name(folder)
    kind = read_text(folder / "dataset_type.txt").strip() if (folder / "dataset_type.txt").is_file() else "classification"
    if kind != "classification":
        raise BenchError(f"{folder} is a {kind} set; classification sets can be measured on")
    lists = _texts(folder, "default_target.txt")
    for file, holds in (("classnames.txt", "one class name a line"), ("zeroshot_classification_templates.txt", "one prompt a line, {c} for the class name")):
        if not (folder / file).is_file():
            raise BenchError(f"{folder} has no {file}; a clip_benchmark folder holds it, {holds}")
        lists[file] = read_text(folder / file)
    classes = tuple(line.strip().replace("_", " ") for line in lists["classnames.txt"].splitlines() if line.strip())
    templates = template_lines(lists["zeroshot_classification_templates.txt"], folder / "zeroshot_classification_templates.txt") or GENERIC
    pools: dict[str, Pool] = {}
    stats: list[tuple[Any, ...]] = []
    apart: tuple[int, ...] = ()
    for split, spellings in (("train", ("train",)), ("validation", ("validation", "val", "valid")), ("test", ("test",))):
        part = next((folder / spelling for spelling in spellings if (folder / spelling).is_dir()), None)
        if part is None:
            continue
        tars = _tars(part)
        members = [member for tar in tars for member in _members(tar, part.name, len(classes))]
        if split == "train" and not any((folder / other).is_dir() for other in ("validation", "val", "valid")):
            order, apart = set_apart([label for _, label, _, _ in members], name)
            members = [members[row] for row in order]
        pools[split] = Pool([row_id for row_id, _, _, _ in members], [label for _, label, _, _ in members], partial(_decode_members, [(tar, at) for _, _, tar, at in members]))
        stats += [(f"{part.name}/{tar.name}", tar.stat().st_size, tar.stat().st_mtime_ns) for tar in tars]
    if "test" not in pools:
        raise BenchError(f"{folder} has no test/ with tars; its test split is what is measured on")
    return Listing(name, str(folder), classes, templates, _with_train(pools), apart, {"clip_benchmark": name, "files": digest(stats), "lists": lists}, _target(lists))


def _tars(part: Path) -> list[Path]:
    if not (part / "nshards.txt").is_file():
        raise BenchError(f"{part} has no nshards.txt, which says how many tars there are")
    text = read_text(part / "nshards.txt").strip()
    if not (text.isascii() and text.isdigit() and len(text) < 6) or int(text) < 1:
        raise BenchError(f"{part / 'nshards.txt'}: expected a number of tars, got {text[:40]!r}")
    tars = [part / f"{number}.tar" for number in range(int(text))]
    missing = [tar for tar in tars if not tar.is_file()]
    if missing:
        raise BenchError(f"no file at {missing[0]}; nshards.txt says that there are {text} tars")
    return tars


def _members(tar: Path, split: str, n_classes: int) -> list[tuple[str, int, Path, tuple[int, int, str]]]:
    """Id, label, tar and place of each image; a row is a key with an image and a `.cls`."""
    images: dict[str, tuple[int, int, str]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(tar, "r:") as opened:
            for member in opened:
                if not member.isreg() or member.issparse():
                    continue
                parent, _, base = member.name.removeprefix("./").rpartition("/")
                stem, _, suffix = base.partition(".")
                key = f"{parent}/{stem}" if parent else stem
                where = f"{tar}:{member.name}"
                if f".{suffix.lower()}" in SUFFIXES:
                    if key in images:
                        raise BenchError(f"{where}: {key!r} has two images")
                    if member.size > _MAX_MEMBER:
                        raise BenchError(f"{where} has {member.size} bytes; an image has at most {_MAX_MEMBER}")
                    images[key] = (member.offset_data, member.size, member.name)
                elif suffix == "cls":
                    handle = opened.extractfile(member)
                    labels[key] = _label((handle.read(20) if handle else b"").decode("ascii", "replace"), n_classes, where)
            check_end(opened.fileobj, opened.offset)
    except DAMAGE as error:
        raise BenchError(f"{tar} is not a whole tar: {error}") from None
    odd = sorted(set(images) ^ set(labels))
    if odd:
        raise BenchError(f"{tar}: {odd[0]!r} has {'no label (.cls)' if odd[0] in images else 'no image'}")
    return [(f"{split}/{tar.stem}/{key}", labels[key], tar, at) for key, at in images.items()]


def _decode_members(members: Sequence[tuple[Path, tuple[int, int, str]]], side: int) -> Iterator[NDArray[np.uint8]]:
    for tar, (offset, size, name) in members:
        with open(tar, "rb") as handle:
            handle.seek(offset)
            raw = handle.read(size)
        yield decode_bytes(raw, f"{tar}:{name}", side)


def _labels_csv(folder: Path) -> Listing:
    """A folder as CyCLIP and its successors read it: `labels.csv` (`image` or `path`, `label`) and `classes.py`.

    Either the folder is one split, for testing, or it holds `test/` and perhaps `train/`.
    """
    whole = not (folder / "test" / "labels.csv").is_file()
    parts = {"test": folder} if whole else {split: folder / split for split in ("train", "test") if (folder / split / "labels.csv").is_file()}
    places = [folder / "classes.py", *(part / "classes.py" for part in parts.values())]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise BenchError(f"{folder} has labels.csv and no classes.py; it names the classes in label order and the prompts")
    names, templates = read_classes(file)
    classes = tuple(name.replace("_", " ") for name in names)
    name = _name(folder.resolve().parent) if whole and folder.name.lower() in ("test", "val", "validation") else _name(folder)
    pools: dict[str, Pool] = {}
    stats: list[tuple[Any, ...]] = []
    apart: tuple[int, ...] = ()
    for split, part in parts.items():
        files, labels = _labelled(part, len(classes))
        if split == "train":
            order, apart = set_apart(labels, name)
            files, labels = [files[row] for row in order], [labels[row] for row in order]
        pools[split], of_split = files_pool(folder, split, files, labels)
        stats += [(*stat, label) for stat, label in zip(of_split, labels, strict=True)]
    extras = _texts(folder, "default_target.txt")
    facts = {"labels_csv": name, "files": digest(stats), "classes": [classes, templates], "extras": extras}
    return Listing(name, str(folder), classes, templates, _with_train(pools), apart, facts, _target(extras))


def _labelled(part: Path, n_classes: int) -> tuple[list[Path], list[int]]:
    table = part / "labels.csv"
    try:
        with open(table, encoding="utf-8-sig", newline="") as handle:
            rows = list(csv.reader(handle, strict=True))
    except UnicodeDecodeError:
        raise BenchError(f"{table} is not UTF-8; save the file as UTF-8") from None
    except csv.Error as error:
        raise BenchError(f"{table}: {error}") from None
    header = rows[0] if rows else []
    column = next((name for name in ("image", "path") if name in header), None)
    if column is None or "label" not in header:
        raise BenchError(f"{table}: expected the columns image (or path) and label, got {', '.join(header[:8]) or 'an empty file'}")
    root = part.resolve()
    files, labels = [], []
    for number, row in enumerate((row for row in rows[1:] if row), start=1):
        if len(row) != len(header):
            raise BenchError(f"{table} row {number}: {len(row)} fields, the header has {len(header)}")
        image = row[header.index(column)]
        file = part / image
        if not image or Path(image).is_absolute() or not file.resolve().is_relative_to(root):
            raise BenchError(f"{table} row {number}: {image!r} leaves {part}; paths are relative to labels.csv")
        if not file.is_file():
            raise BenchError(f"{table} row {number}: no file at {image}; paths are relative to labels.csv")
        files.append(file)
        labels.append(_label(row[header.index("label")], n_classes, f"{table} row {number}"))
    if not files:
        raise BenchError(f"{table} has no rows")
    return files, labels


def _label(text: str, n_classes: int, where: str) -> int:
    text = text.strip()
    if not (text.isascii() and text.isdigit() and len(text) < 10) or int(text) >= n_classes:
        raise BenchError(f"{where}: expected a label from 0 to {n_classes - 1}, got {text[:20]!r}")
    return int(text)


def _with_train(pools: dict[str, Pool]) -> dict[str, Pool]:
    """Without the validation split of a set that has nothing to train a probe on."""
    return pools if "train" in pools else {"test": pools["test"]}


def _texts(folder: Path, *names: str) -> dict[str, str]:
    return {name: read_text(folder / name) for name in names if (folder / name).is_file()}


def _target(texts: dict[str, str]) -> str | None:
    return texts.get("default_target.txt", "").strip() or None


def _name(folder: Path) -> str:
    return folder.name or folder.resolve().name
