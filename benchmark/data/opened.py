"""Pairs as they lie on disk, opened row by row so that one broken image does not hide the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmark.data.dialects import choose_layout, columns
from benchmark.data.export import CARD, TABLES
from benchmark.data.image import decode_bytes, read_ref
from benchmark.data.manifest import make_ids
from benchmark.data.pairs import Source
from benchmark.data.poison_folder import POISONED, RECORD, REQUEST, RowImages, open_folder, read_json
from benchmark.data.reading import Findings, Reading
from benchmark.data.shards import find_shards, read_shards
from benchmark.data.table import Choose, read_parquet, read_text
from benchmark.errors import BenchError
from benchmark.progress import Progress

OpenSource = Callable[[dict[str, Any]], Source]
# Everything that can be read is, whatever its share; what cannot is listed in `broken`.
_TOLERANT = Reading(skip_broken=True, max_broken=1.0)


@dataclass(frozen=True)
class Opened:
    """Pairs in file order.

    Attributes:
        ids: as written, or None where there are none.
        images: paths, references or keys as written.
        read: what lies at a row: the bytes of its image file, or the pixels where there is no file.
        place: names the very image of a row; rows of equal places show one image.
        side: images are looked at in this size, if it is known.
        n_lines: physical lines of the table; None for shards.
        broken: rows of the table that cannot be read, and why.
        keyed: whether `images` are keys of shards, which name rows.
    """

    path: Path
    ids: list[str] | None
    images: list[str]
    captions: list[str]
    read: Callable[[int], bytes | NDArray[np.uint8]]
    place: Callable[[int], str]
    side: int | None
    n_lines: int | None = None
    broken: list[tuple[str, str]] = field(default_factory=list)
    keyed: bool = False

    def __len__(self) -> int:
        return len(self.images)

    def pixels(self, row: int, side: int) -> NDArray[np.uint8]:
        """The image of a row, uint8 (side, side, 3).

        Raises:
            BenchError: it is missing or broken.
        """
        found = self.read(row)
        if isinstance(found, bytes):
            return decode_bytes(found, self.images[row], side)
        if found.shape[0] != side:
            raise BenchError(f"the images of {self.path} are {found.shape[0]} pixels wide, not {side}")
        return found

    def names(self) -> list[str]:
        """The ids that reading these pairs with `--data` gives, whether they are written or not."""
        if self.ids is not None:
            return self.ids
        return self.images if self.keyed else make_ids(self.images, self.captions)

    def name(self, row: int, by_id: bool) -> str:
        """What a row is called in messages."""
        return self.ids[row] if by_id and self.ids is not None else self.images[row]


def open_pairs(path: Path, image_root: Path | None, source: OpenSource, progress: Progress) -> Opened:
    """Pairs of any kind: a poison folder, an export, a manifest, tars.

    Raises:
        BenchError: nothing of that kind is there.
    """
    folder = is_poison_folder(path)
    if folder is not None:
        return open_poison_folder(folder, source)
    if is_export(path):
        return open_export(path, progress)
    if path.is_dir() or path.suffix == ".tar":
        return open_shards(path, None, progress)
    return open_manifest(path, image_root)


def is_poison_folder(path: Path) -> Path | None:
    """The folder that `bench poison` wrote, from its own path or that of its `poisoned/`."""
    for folder in (path, path.parent) if path.name == POISONED else (path,):
        if (folder / RECORD / REQUEST).is_file():
            return folder
    return None


def is_export(path: Path) -> bool:
    """Whether `bench export` wrote this folder."""
    return (path / CARD).is_file()


def open_poison_folder(path: Path, source: OpenSource) -> Opened:
    """The manifest of a poison folder; images that its own store does not hold come from the source."""
    folder = open_folder(path)
    manifest = folder.poisoned.manifest / "manifest.tsv"
    found, n_lines, broken = _table(manifest, "\t", lambda header: _named(manifest, header, ("id", "image", "caption")))
    images = RowImages(folder.poisoned.manifest, folder.side, lambda: source(folder.request))
    refs = found["image"]

    def read(row: int) -> bytes | NDArray[np.uint8]:
        stored = images.stored(refs[row])
        return images.read(refs[row]) if stored is None else read_ref(str(stored))

    def place(row: int) -> str:
        stored = images.stored(refs[row])
        return f"{folder.header.get('source')} {refs[row]}" if stored is None else str(stored.resolve())

    return Opened(path, found["id"], refs, found["caption"], read, place, folder.side, n_lines, broken)


def open_export(path: Path, progress: Progress) -> Opened:
    """The pairs of an export, in whichever layout."""
    card = read_json(path / CARD)
    to, side = card.get("export", {}).get("to"), card.get("side")
    if not isinstance(side, int):
        raise BenchError(f"{path / CARD} does not say how large the images are; it has been changed")
    if to == "webdataset":
        return open_shards(path, side, progress)
    if to not in TABLES:
        raise BenchError(f"{path / CARD} names no known layout; it has been changed")
    return open_manifest(path / TABLES[to], None, side)


def open_manifest(path: Path, image_root: Path | None, side: int | None = None) -> Opened:
    """The pairs of a TSV, CSV or Parquet file; images must lie in its folder or in `image_root`."""
    if not path.is_file():
        raise BenchError(f"no manifest at {path}")
    layout = choose_layout(path, _TOLERANT)
    chosen: list[str] = []

    def choose(header: list[str]) -> list[str]:
        chosen[:] = [*columns(path, header, layout, _TOLERANT), *(["id"] if "id" in header else [])]
        return chosen

    table, n_lines, broken = _table(path, layout.separator, choose)
    files, root = table[chosen[0]], (image_root or path.parent).resolve()

    def file(row: int) -> Path:
        found = (root / files[row]).resolve()
        if not found.is_relative_to(root):
            raise BenchError(f"{files[row]!r} leaves {root}")
        return found

    return Opened(path, table.get("id"), files, table[chosen[1]], lambda row: read_ref(str(file(row))), lambda row: str(root / files[row]), side, n_lines, broken)


def open_shards(path: Path, side: int | None, progress: Progress) -> Opened:
    """The pairs of tars; `ids.tsv` beside them gives ids, and keys stand for images."""
    findings = Findings(str(path), _TOLERANT)
    table, _ = read_shards(find_shards(str(path.absolute())), findings, progress)
    keys, refs, captions = (table[name].to_pylist() for name in ("id", "image", "caption"))
    ids = None
    listed = path / "ids.tsv"
    if listed.is_file():
        named, _, _ = _table(listed, "\t", lambda header: _named(listed, header, ("key", "id")))
        known = dict(zip(named["key"], named["id"], strict=True))
        ids = [known.get(key, "") for key in keys]
    return Opened(path, ids, keys, captions, lambda row: read_ref(refs[row]), lambda row: str(refs[row]), side, None, _broken(findings), keyed=True)


def _named(path: Path, header: list[str], needed: tuple[str, ...]) -> list[str]:
    for name in needed:
        if name not in header:
            raise BenchError(f"{path} has no column {name!r}")
    return list(needed)


def _table(path: Path, separator: str | None, choose: Choose) -> tuple[dict[str, list[str]], int | None, list[tuple[str, str]]]:
    """Columns as text, physical lines, and rows that cannot be read."""
    findings = Findings(str(path), _TOLERANT)
    try:
        if separator is None:
            table, _ = read_parquet(path, choose, findings)
        else:
            table, _, _ = read_text(path, separator, "minimal", choose, findings)
        n_lines = None if separator is None else _lines(path)
    except OSError as error:
        raise BenchError(f"cannot read {path}: {error.strerror}") from None
    return {name: table.column(name).to_pylist() for name in table.column_names}, n_lines, _broken(findings)


def _lines(path: Path) -> int:
    """Physical lines; a last one without an end counts."""
    n, last = 0, b"\n"
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            n, last = n + block.count(b"\n"), block[-1:]
    return n + (last != b"\n")


def _broken(findings: Findings) -> list[tuple[str, str]]:
    return [(row, problem) for kind in findings.skipped.values() for row, problem in kind]
