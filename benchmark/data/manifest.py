"""Reading and writing manifests so that captions stay captions."""

import csv
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pandas as pd

from benchmark.errors import BenchError

Dialect = Literal["own", "open_clip", "cyclip"]
_COLUMNS: dict[str, tuple[tuple[str, ...], str]] = {
    "own": (("image",), "caption"),
    "open_clip": (("filepath",), "title"),
    "cyclip": (("image", "path"), "caption"),
}
_BY_SUFFIX: dict[str, tuple[str, tuple[str, ...]]] = {".tsv": ("\t", ("own", "open_clip")), ".csv": (",", ("cyclip",))}


@dataclass(frozen=True)
class Manifest:
    """The table of pairs, in file order.

    Attributes:
        ids: stable names of the rows.
        images: paths as absolute, checked files, or references to drawn rows.
        captions: verbatim.
        sha256: hash of the file's bytes, or of the canonical table for made manifests.
    """

    ids: list[str]
    images: list[str]
    captions: list[str]
    sha256: str
    counts: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def set_hash(self) -> str:
        """The same for the same pairs in any order."""
        rows = sorted(f"{row_id}\0{hashlib.sha256(caption.encode()).hexdigest()}" for row_id, caption in zip(self.ids, self.captions, strict=True))
        return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def make_ids(images: Sequence[str], captions: Sequence[str]) -> list[str]:
    """Ids from content: 16 hex digits of SHA-256 of image path, NUL, caption, with -1, -2 ... for repeats."""
    seen: dict[str, int] = {}
    ids = []
    for image, caption in zip(images, captions, strict=True):
        row_id = hashlib.sha256(f"{image}\0{caption}".encode()).hexdigest()[:16]
        repeat = seen.get(row_id, 0)
        seen[row_id] = repeat + 1
        ids.append(row_id if repeat == 0 else f"{row_id}-{repeat}")
    return ids


def read_manifest(path: Path, image_root: Path | None = None) -> Manifest:
    """The pairs of a TSV (`image`/`caption` or open_clip's `filepath`/`title`) or a CSV (`image` or `path`, `caption`).

    Image paths are relative to the manifest's folder, or to `image_root`, and must stay inside it.

    Raises:
        BenchError: names file and row: wrong columns, bytes that are no UTF-8, rows of another length, a stray quote,
            duplicate ids, an empty path, a path that leaves its folder, a missing file.
    """
    if not path.is_file():
        raise BenchError(f"no manifest at {path}")
    if path.suffix not in _BY_SUFFIX:
        raise BenchError(f"a manifest ends in .tsv or .csv, got {path.name!r}")
    separator, dialects = _BY_SUFFIX[path.suffix]
    raw = path.read_bytes()
    table = _read_table(path, raw, separator)
    _check_quotes(path, table, separator)
    image_column, caption_column = _columns(path, list(table.columns), dialects)
    images, captions = table[image_column].tolist(), table[caption_column].tolist()
    root = (image_root or path.parent).resolve()
    files = _resolve(path, images, root)
    ids = table["id"].tolist() if "id" in table.columns else make_ids(images, captions)
    _check_ids(path, ids)
    counts = {"empty_captions": sum(not caption.strip() for caption in captions), "duplicate_pairs": len(ids) - len(set(zip(images, captions, strict=True)))}
    return Manifest(ids, files, captions, hashlib.sha256(raw).hexdigest(), counts)


def write_manifest(path: Path, ids: Sequence[str], images: Sequence[str], captions: Sequence[str]) -> str:
    """Writes the canonical TSV and returns the SHA-256 of its bytes."""
    text = canonical_tsv(ids, images, captions)
    path.write_bytes(text)
    return hashlib.sha256(text).hexdigest()


def canonical_tsv(ids: Sequence[str], images: Sequence[str], captions: Sequence[str]) -> bytes:
    """The bytes of our own TSV: header, LF, fields quoted only where they hold tab, line end or quote."""
    lines = ["id\timage\tcaption"]
    lines += ["\t".join(map(_field, row)) for row in zip(ids, images, captions, strict=True)]
    return ("\n".join(lines) + "\n").encode()


def read_own(path: Path) -> tuple[list[str], list[str], list[str]]:
    """Ids, image references and captions of a TSV that `write_manifest` wrote, with nothing resolved or checked."""
    table = _read_table(path, path.read_bytes(), "\t")
    return table["id"].tolist(), table["image"].tolist(), table["caption"].tolist()


def _field(value: str) -> str:
    return '"' + value.replace('"', '""') + '"' if any(mark in value for mark in '\t\n\r"') else value


def _read_table(path: Path, raw: bytes, separator: str) -> pd.DataFrame:
    try:
        text = raw.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        number = raw[: error.start].count(b"\n")
        raise BenchError(f"{path} row {number}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    if "\0" in text:
        raise BenchError(f"{path} row {text[: text.index(chr(0))].count(chr(10))}: holds a NUL character")
    if not text.strip():
        raise BenchError(f"{path} is empty")
    lines = csv.reader(_lines(text), delimiter=separator, strict=True)
    try:
        rows = list(lines)
    except csv.Error as error:
        where = f"{path} near row {lines.line_num - 1}"
        if "new-line character" in str(error):
            raise BenchError(f"{where}: a carriage return within a field; quote the field") from None
        raise BenchError(f"{where}: {error}; a quote that is part of a caption must be doubled and its field quoted") from None
    header, body = rows[0], [row for row in rows[1:] if row]
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise BenchError(f"{path}: column {repeated[0]!r} stands twice in the header")
    for number, row in enumerate(body, start=1):
        if len(row) != len(header):
            raise BenchError(f"{path} row {number}: {len(row)} fields, the header has {len(header)}; starts with {row[0][:60]!r}")
    return pd.DataFrame(body, columns=header, dtype=str)


def _check_quotes(path: Path, table: pd.DataFrame, separator: str) -> None:
    """Whole rows within a quoted field mean that its first quote was a stray one."""
    for column in table.columns:
        for number, value in enumerate(table[column].tolist(), start=1):
            if "\n" in value and any(line.count(separator) == len(table.columns) - 1 for line in value.split("\n")[1:]):
                raise BenchError(f"{path} row {number}: a quoted field swallows the next row; starts with {value[:60]!r}. Double the stray quote and quote its field")


def _lines(text: str) -> list[str]:
    """Physical lines with their ends; a lone CR is part of its line, whatever Python thinks."""
    lines = text.split("\n")
    crlf = lines[0].endswith("\r")
    ended = [(line[:-1] if crlf and line.endswith("\r") else line) + "\n" for line in lines[:-1]]
    return [*ended, lines[-1]] if lines[-1] else ended


def _columns(path: Path, header: list[str], dialects: tuple[str, ...]) -> tuple[str, str]:
    fitting = [(image, caption) for dialect in dialects for images, caption in [_COLUMNS[dialect]] for image in images if image in header and caption in header]
    if len(fitting) == 1:
        return fitting[0]
    known = "; ".join(f"{dialect}: {' or '.join(_COLUMNS[dialect][0])}, {_COLUMNS[dialect][1]}" for dialect in dialects)
    problem = "fits no dialect" if not fitting else "fits more than one dialect"
    raise BenchError(f"{path}: the header {', '.join(header[:8])} {problem}. Columns of a {path.suffix} manifest: {known}")


def _resolve(path: Path, images: list[str], root: Path) -> list[str]:
    files, missing = [], []
    known: dict[Path, bool] = {}
    for number, image in enumerate(images, start=1):
        if not image:
            raise BenchError(f"{path} row {number}: the image path is empty")
        file = root / image
        parent = file.parent
        if parent not in known:
            known[parent] = parent.resolve().is_relative_to(root)
        if not known[parent] or Path(image).is_absolute() or (os.path.islink(file) and not file.resolve().is_relative_to(root)):
            raise BenchError(f"{path} row {number}: {image!r} leaves {root}; image paths are relative to the manifest or to --image-root")
        if not os.path.isfile(file):  # unlike Path.is_file, no exception for a name that is too long
            missing.append((number, image))
        files.append(str(file))
    if missing:
        number, image = missing[0]
        more = f", and {len(missing) - 1} more rows" if len(missing) > 1 else ""
        raise BenchError(f"{path} row {number}: no file at {image}{more}. Paths are relative to the manifest; --image-root changes that")
    return files


def _check_ids(path: Path, ids: list[str]) -> None:
    seen: dict[str, int] = {}
    for number, row_id in enumerate(ids, start=1):
        if not row_id:
            raise BenchError(f"{path} row {number}: the id is empty; fill the column or leave it out")
        if row_id in seen:
            raise BenchError(f"{path} row {number}: id {row_id!r} is also that of row {seen[row_id]}")
        seen[row_id] = number
