"""Reading and writing manifests so that captions stay captions."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from benchmark.data.dialects import Layout, choose_layout, columns
from benchmark.data.reading import Findings, Reading
from benchmark.data.table import ROWS, read_parquet, read_text
from benchmark.errors import BenchError
from benchmark.settings import canonical

_REMEDY = ". Paths are relative to the manifest; --image-root changes that"


@dataclass(frozen=True)
class Manifest:
    """The table of pairs, in file order.

    Attributes:
        rows: columns `id` (stable names of the rows), `image` (absolute, checked paths, or places in shards) and
            `caption` (verbatim), all large_string.
        sha256: hash of the file's bytes, or of the canonical table for pairs that stand in no one text file.
        stamp: changes when an image file is replaced under its name.
        counts: facts about the rows, and how many were left out.
        numbers: where each row stands in the file, from 1; int64 (n,).
        warnings: what was left out.
    """

    rows: pa.Table
    sha256: str
    stamp: str
    numbers: NDArray[np.int64]
    counts: dict[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def ids(self) -> list[str]:
        """Ids as a new list; three million take 200 MB."""
        return _list(self.rows["id"])

    @property
    def images(self) -> list[str]:
        """Image references as a new list."""
        return _list(self.rows["image"])

    @property
    def captions(self) -> list[str]:
        """Captions as a new list."""
        return _list(self.rows["caption"])

    @property
    def set_hash(self) -> str:
        """The same for the same pairs in any order."""
        rows = sorted(f"{row_id}\0{hashlib.sha256(caption.encode()).hexdigest()}" for row_id, caption in pairs_of(self.rows, "id", "caption"))
        return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def make_ids(images: Sequence[str], captions: Sequence[str]) -> list[str]:
    """Ids from content: 16 hex digits of SHA-256 of image path, NUL, caption, with -1, -2 ... for repeats."""
    return _list(_named(_digests(zip(images, captions, strict=True))))


def read_manifest(path: Path, image_root: Path | None = None, reading: Reading | None = None) -> Manifest:
    """The pairs of a TSV (`image`/`caption` or open_clip's `filepath`/`title`), a CSV (`image` or `path`, `caption`) or a Parquet file.

    Image paths are relative to the manifest's folder, or to `image_root`, and must stay inside it. A column `id` names
    the rows; further columns may stand there and are not read.

    Raises:
        BenchError: names file and row: wrong columns, bytes that are no UTF-8, rows of another length, a stray quote,
            duplicate ids, an empty path, a path that leaves its folder, a missing file.
    """
    reading = reading or Reading()
    if not path.is_file():
        raise BenchError(f"no manifest at {path}")
    layout = choose_layout(path, reading)
    findings = Findings(str(path), reading)
    try:
        table, numbers, sha256 = _read(path, layout, reading, findings)
    except OSError as error:
        raise BenchError(f"cannot read {path}: {error.strerror}") from None
    n_rows = len(table) + findings.n
    findings.settle(n_rows)
    root = (image_root or path.parent).resolve()
    return build(table, numbers, root, findings, n_rows, sha256, _REMEDY)


def _read(path: Path, layout: Layout, reading: Reading, findings: Findings) -> tuple[pa.Table, NDArray[np.int64], str]:
    """Columns `image`, `caption` and perhaps `id`."""

    def choose(header: list[str]) -> list[str]:
        return [*columns(path, header, layout, reading), *(["id"] if "id" in header else [])]

    if layout.separator is None:
        table, numbers = read_parquet(path, choose, findings)
        sha256 = ""
    else:
        table, numbers, sha256 = read_text(path, layout.separator, reading.quoting, choose, findings)
    return table.rename_columns(["image", "caption", "id"][: table.num_columns]), numbers, sha256


def build(table: pa.Table, numbers: NDArray[np.int64], root: Path, findings: Findings, n_rows: int, sha256: str, remedy: str = "") -> Manifest:
    """A manifest of rows whose images have been looked for.

    Args:
        table: `image` as paths relative to `root`, `caption`, perhaps `id`.
        n_rows: all rows, with those that `findings` holds already.
        sha256: of the file; empty to take the hash of the canonical table.
        remedy: how a missing file can come about.

    Raises:
        BenchError: nothing to read, or rows that `findings` does not let pass.
    """
    files, present, stamp = _locate(table["image"], numbers, root, findings, remedy)
    findings.settle(n_rows)
    table, numbers = table.filter(pa.array(present)), numbers[present]
    digests = _digests(pairs_of(table, "image", "caption"))
    counts = {
        "empty_captions": sum(not caption.strip() for (caption,) in pairs_of(table, "caption")),
        "duplicate_pairs": len(digests) - len(np.unique(digests)),
    }
    table = table.append_column("file", files)
    if "id" in table.column_names:
        whole = _check_ids(table["id"].combine_chunks(), numbers, findings)
        findings.settle(n_rows)
        table, numbers = table.filter(pa.array(whole)), numbers[whole]
    else:
        table = table.append_column("id", _named(digests))
    if len(table) == 0:
        raise BenchError(f"{findings.where} holds no pairs")
    rows = table.select(["id", "file", "caption"]).rename_columns(["id", "image", "caption"])
    sha256 = sha256 or canonical_sha256(pairs_of(table, "id", "image", "caption"))
    return Manifest(rows, sha256, stamp, numbers, counts | findings.as_counts(), tuple(findings.warnings()))


def write_manifest(path: Path, ids: Sequence[str], images: Sequence[str], captions: Sequence[str]) -> str:
    """Writes the canonical TSV and returns the SHA-256 of its bytes."""
    text = canonical_tsv(ids, images, captions)
    path.write_bytes(text)
    return hashlib.sha256(text).hexdigest()


def save_manifest(manifest: Manifest, folder: Path) -> None:
    """Puts a manifest down for `load_manifest`."""
    from pyarrow import parquet

    parquet.write_table(manifest.rows, folder / "rows.parquet", compression="zstd", use_dictionary=False)
    about = {"sha256": manifest.sha256, "stamp": manifest.stamp, "counts": manifest.counts, "warnings": manifest.warnings}
    (folder / "manifest.json").write_text(canonical(about))
    np.save(folder / "numbers.npy", manifest.numbers, allow_pickle=False)


def load_manifest(folder: Path) -> Manifest:
    """The manifest that `save_manifest` put into a folder."""
    from pyarrow import parquet

    about = json.loads((folder / "manifest.json").read_text())
    rows, numbers = parquet.read_table(folder / "rows.parquet"), np.load(folder / "numbers.npy", allow_pickle=False)
    return Manifest(rows, about["sha256"], about["stamp"], numbers, about["counts"], tuple(about["warnings"]))


def canonical_tsv(ids: Sequence[str], images: Sequence[str], captions: Sequence[str]) -> bytes:
    """The bytes of our own TSV: header, LF, fields quoted only where they hold tab, line end or quote."""
    return b"".join(_lines(zip(ids, images, captions, strict=True)))


def canonical_sha256(rows: Iterable[tuple[str, ...]]) -> str:
    """SHA-256 of the canonical TSV of rows of id, image and caption."""
    hasher = hashlib.sha256()
    for block in _lines(rows):
        hasher.update(block)
    return hasher.hexdigest()


def read_own(path: Path) -> tuple[list[str], list[str], list[str]]:
    """Ids, image references and captions of a TSV that `write_manifest` wrote, with nothing resolved or checked."""
    findings = Findings(str(path), Reading())
    table, _, _ = read_text(path, "\t", "minimal", lambda header: ["id", "image", "caption"], findings)
    findings.settle(len(table) + findings.n)
    return _list(table["id"]), _list(table["image"]), _list(table["caption"])


def _lines(rows: Iterable[tuple[str, ...]]) -> Iterator[bytes]:
    yield b"id\timage\tcaption\n"
    rest = iter(rows)
    while some := list(itertools.islice(rest, ROWS)):
        yield "".join("\t".join(map(_field, row)) + "\n" for row in some).encode()


def _field(value: str) -> str:
    return '"' + value.replace('"', '""') + '"' if any(mark in value for mark in '\t\n\r"') else value


def _digests(pairs: Iterable[tuple[str, ...]]) -> NDArray[np.uint64]:
    """The first 8 bytes of SHA-256 of image, NUL, caption of each pair."""
    rest = iter(pairs)
    parts = [np.zeros(0, dtype=np.uint64)]
    while some := list(itertools.islice(rest, ROWS)):
        raw = b"".join([hashlib.sha256(f"{image}\0{caption}".encode()).digest()[:8] for image, caption in some])
        parts.append(np.frombuffer(raw, dtype=">u8").astype(np.uint64))
    return np.concatenate(parts)


def _named(digests: NDArray[np.uint64]) -> pa.Array:
    """Digests in hex, with -1, -2 ... for repeats in their order."""
    n = len(digests)
    offsets = pa.py_buffer(np.arange(0, 16 * n + 1, 16, dtype=np.int64))
    ids = pa.LargeStringArray.from_buffers(n, offsets, pa.py_buffer(digests.astype(">u8").tobytes().hex().encode()))
    order = np.argsort(digests, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], digests[order][1:] != digests[order][:-1]])) if n else np.zeros(0, dtype=np.int64)
    if len(starts) == n:
        return ids
    repeats = np.empty(n, dtype=np.int64)
    repeats[order] = np.arange(n) - np.repeat(starts, np.diff(np.append(starts, n)))
    return pa.array([row_id if repeat == 0 else f"{row_id}-{repeat}" for row_id, repeat in zip(ids.to_pylist(), repeats.tolist(), strict=True)], pa.large_string())


def _locate(images: pa.ChunkedArray, numbers: NDArray[np.int64], root: Path, findings: Findings, remedy: str) -> tuple[pa.ChunkedArray, NDArray[np.bool_], str]:
    """Absolute paths of the images that are there, which rows those are, and the hash of paths, sizes and times."""
    inside = _Inside(root, findings.reading.allow_outside)
    hasher = hashlib.sha256()
    present = np.ones(len(images), dtype=np.bool_)
    parts: list[pa.Array] = [pa.array([], pa.large_string())]
    row = 0
    for chunk in images.chunks:
        for begin in range(0, len(chunk), ROWS):
            files, stamps = [], []
            for image in chunk.slice(begin, ROWS).to_pylist():
                file = image if image.startswith("/") else inside.prefix + image
                found = inside.status(image, file) if image else None
                if not found:
                    number = int(numbers[row])
                    if not image:
                        findings.add("empty_paths", number, "the image path is empty")
                    elif found is False:
                        raise BenchError(
                            f"{findings.where} row {number}: {image!r} leaves {root}; image paths are relative to the manifest or to --image-root. --allow-outside lets them leave it"
                        )
                    else:
                        findings.add("missing_files", number, f"no file at {image}", remedy)
                if found:
                    files.append(file)
                    stamps.append(f"{file}\0{found.st_size}\0{found.st_mtime_ns}\n")
                else:
                    present[row] = False
                row += 1
            parts.append(pa.array(files, pa.large_string()))
            hasher.update("".join(stamps).encode())
    return pa.chunked_array(parts), present, hasher.hexdigest()


class _Inside:
    """Files that stay in a folder when links are followed; the folders that they lie in are looked at once."""

    def __init__(self, root: Path, anywhere: bool) -> None:
        self.root, self.prefix, self._anywhere = str(root), os.path.join(root, ""), anywhere
        self._known: dict[str, bool] = {}

    def status(self, image: str, file: str) -> os.stat_result | Literal[False] | None:
        """Size and time of a file; None if there is none, False if it must not be read."""
        parent, _, name = image.rpartition("/")
        known = self._known.get(parent)
        if known is None:
            known = self._known[parent] = self._holds(os.path.join(self.root, parent))
        if not self._anywhere and (not known or image.startswith("/") or name == ".."):
            return False
        try:
            found = os.lstat(file)
            if stat.S_ISLNK(found.st_mode):
                if not self._holds(file):
                    return False
                found = os.stat(file)
        except OSError:  # no such file, too long a name, a loop of links ...
            return None
        return found if stat.S_ISREG(found.st_mode) else None

    def _holds(self, path: str) -> bool:
        return self._anywhere or Path(os.path.realpath(path)).is_relative_to(self.root)


def _check_ids(ids: pa.Array, numbers: NDArray[np.int64], findings: Findings) -> NDArray[np.bool_]:
    """Which rows have an id of their own; of two with the same, the first."""
    codes = np.asarray(ids.dictionary_encode().indices)
    first = np.full(len(ids), -1, dtype=np.int64)
    first[codes[::-1]] = np.arange(len(ids))[::-1]
    repeated = first[codes] != np.arange(len(ids))
    empty = np.asarray(pc.equal(pc.binary_length(ids), 0))
    for row in np.flatnonzero(repeated | empty).tolist():
        if empty[row]:
            findings.add("empty_ids", int(numbers[row]), "the id is empty", "; fill the column or leave it out")
        else:
            findings.add("duplicate_ids", int(numbers[row]), f"id {ids[row].as_py()!r} is also that of row {numbers[first[codes[row]]]}")
    whole: NDArray[np.bool_] = ~(repeated | empty)
    return whole


def pairs_of(table: pa.Table, *names: str) -> Iterator[tuple[str, ...]]:
    """Rows of some columns, a few at a time in memory."""
    for begin in range(0, len(table), ROWS):
        yield from zip(*(table[name].slice(begin, ROWS).to_pylist() for name in names), strict=True)


def _list(column: pa.ChunkedArray) -> list[str]:
    values: list[str] = column.to_pylist()
    return values
