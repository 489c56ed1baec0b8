"""A poisoned set as a folder of its own: `poisoned/` for those who train, `poisoned.record/` for those who evaluate."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from benchmark.data.image import decode, read_ref
from benchmark.data.look import Look, look_at
from benchmark.data.manifest import read_own
from benchmark.data.pairs import Source
from benchmark.data.poison import Poisoned, SealedRecord, open_record
from benchmark.errors import BenchError
from benchmark.progress import Progress
from benchmark.settings import SCHEMA, canonical
from benchmark.stages import file_sha256

POISONED, RECORD = "poisoned", "poisoned.record"
REQUEST, ALL_ROWS = "request.json", "all_rows.parquet"
_STORED = re.compile(r"images/[0-9a-f]{2}/[0-9a-f]{64}\.png")
_HEADER = ("attack", "options", "attack_seed", "sham", "source", "poisoned_manifest_sha256", "n_rows", "n_requested", "n_poison", "poison_rate", "edit_mode", "warnings")
_ROWS = ("id", "edit", "role", "caption_before", "caption_after", "pixels_sha256_before", "pixels_sha256_after")
_BLOCK = 2048


@dataclass(frozen=True)
class PoisonFolder:
    """What `bench poison --out` wrote.

    Attributes:
        request: what was asked for: attack, seed, scale, options, data, and the geometry under `data_settings`.
        header: of the sealed record.
    """

    folder: Path
    request: dict[str, Any]
    header: dict[str, Any]

    @property
    def poisoned(self) -> Poisoned:
        """The manifest and the sealed record."""
        return Poisoned(self.folder / POISONED, self.folder / RECORD)

    @property
    def side(self) -> int:
        """Image side in pixels."""
        return int(self.request["data_settings"]["side"])


@dataclass
class RowImages:
    """The images that a poisoned manifest refers to: files of its store, and images of the source.

    Attributes:
        source: opened when an image of it is asked for.
    """

    folder: Path
    side: int
    source: Callable[[], Source]

    def read(self, ref: str) -> NDArray[np.uint8]:
        """The pixels behind a reference, uint8 (S, S, 3).

        Raises:
            BenchError: no such image, a broken one, or a reference that leaves the folder.
        """
        stored = self.stored(ref)
        if stored is not None:
            return decode(stored, self.side)
        row = self._rows.get(ref)
        if row is None:
            raise BenchError(f"no image at {ref!r}, neither in {self.folder} nor in the source")
        return self._source.train.image(row)

    def stored(self, ref: str) -> Path | None:
        """The file of the folder's own store, or None for a reference to the source."""
        if not _STORED.fullmatch(ref):
            return None
        path = self.folder / ref
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise BenchError(f"{ref!r} leaves {self.folder}")
        return path

    def prepare(self, refs: Iterable[str]) -> None:
        """Opens the source now if one of these images is in it, before several threads ask for it."""
        if any(self.stored(ref) is None for ref in refs):
            _ = self._rows

    def original(self, ref: str) -> bytes | None:
        """The bytes of the file that an image of the source was decoded from; None for drawn ones."""
        return None if ref.startswith("world:") or ref not in self._rows else read_ref(ref)

    @cached_property
    def _source(self) -> Source:
        return self.source()

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {ref: row for row, ref in enumerate(self._source.train.refs)}


def write_folder(made: Poisoned, source: Source, request: dict[str, Any], out: Path, progress: Progress) -> bool:
    """Writes a finished poison to a folder; whether it was written, and not there already.

    Raises:
        BenchError: the folder holds something else, or the disk is full.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        _check_same(made, request, out)
        return False
    size = sum(path.stat().st_size for folder in (made.manifest, made.record) for path in folder.rglob("*") if path.is_file())
    check_space(out, size + 400 * len(source.train))
    with unfinished(out) as part:
        shutil.copytree(made.manifest, part / POISONED)
        shutil.copytree(made.record, part / RECORD)
        (part / RECORD / REQUEST).write_text(canonical(request))
        ids, refs, captions = made.rows()
        images = RowImages(part / POISONED, source.train.side, lambda: source)
        with progress.bar("looking at every image", len(ids), "images") as advance:
            looks = list(looks_of(refs, images, advance))
        write_rows(part / RECORD, ids, refs, captions, looks)
    return True


def open_folder(folder: Path) -> PoisonFolder:
    """What `bench poison` wrote into this folder.

    Raises:
        BenchError: the folder is not of that kind, or its record cannot be read.
    """
    if not (folder / RECORD / REQUEST).is_file():
        raise BenchError(f"{folder} holds no {RECORD}/{REQUEST}; expected a folder that `bench poison --out` wrote")
    request, header = read_json(folder / RECORD / REQUEST), read_json(folder / RECORD / "record.json")
    check_schema(folder, request)
    if not isinstance(request.get("data_settings"), dict) or not isinstance(request["data_settings"].get("side"), int):
        raise BenchError(f"{folder / RECORD / REQUEST} does not say how large the images are; it has been changed")
    return PoisonFolder(folder, request, header)


def sealed_record(folder: Path) -> SealedRecord:
    """The sealed record in a folder of the user's, with everything in it that is read from it later.

    Raises:
        BenchError: it is damaged.
    """
    try:
        found = open_record(folder)
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise BenchError(f"the sealed record {folder} cannot be read: {error}") from None
    for name, needed, there in (("record.json", _HEADER, found.header), ("rows.parquet", _ROWS, found.rows.columns)):
        lacking = [one for one in needed if one not in there]
        if lacking:
            raise BenchError(f"{folder / name} has no {lacking[0]}; it is damaged or of another kind")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file, or one sentence about what is wrong with it."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BenchError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise BenchError(f"{path} does not hold an object")
    return found


def check_schema(folder: Path, about: dict[str, Any]) -> None:
    """Refuses what a later version wrote."""
    if int(about.get("schema", 0)) > SCHEMA:
        raise BenchError(f"{folder} was written with schema {about['schema']}, and this version reads up to {SCHEMA}; upgrade clip-poison-bench")


def looks_of(refs: list[str], images: RowImages, advance: Callable[..., None]) -> Iterator[Look]:
    """What each image looks like, read on all cores."""
    images.prepare(refs)
    with ThreadPoolExecutor(os.cpu_count() or 1) as workers:
        for begin in range(0, len(refs), _BLOCK):
            block = refs[begin : begin + _BLOCK]
            yield from workers.map(lambda ref: look_at(images.read(ref)), block)
            advance(len(block))


def write_rows(record: Path, ids: list[str], images: list[str], captions: list[str], looks: list[Look]) -> None:
    """Writes what every row held, poisoned or not, into the record: with it, a later change is found and named."""
    table = pd.DataFrame({"id": ids, "image": images, "caption": captions, "pixels_sha256": [look.pixels for look in looks], "blocks": [look.blocks for look in looks]})
    table.to_parquet(record / ALL_ROWS, compression="zstd", index=False)


def manifest_rows(manifest: Path) -> tuple[list[str], list[str], list[str]]:
    """Ids, references and captions of a poisoned manifest; a table without these columns is one sentence."""
    if not manifest.is_file():
        raise BenchError(f"no manifest at {manifest}")
    try:
        return read_own(manifest)
    except KeyError as error:
        raise BenchError(f"{manifest} has no column {error}") from None


@contextlib.contextmanager
def unfinished(out: Path) -> Iterator[Path]:
    """An empty folder beside `out` that becomes `out` when the block ends, and goes if it fails."""
    part = out.with_name(out.name + ".part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    except OSError as error:
        raise BenchError(f"cannot write to {out.parent}: {error.strerror}") from None
    try:
        yield part
        if out.is_dir():
            out.rmdir()
        os.replace(part, out)
    except OSError as error:
        raise BenchError(f"cannot write {out}: {error.strerror}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def check_space(out: Path, needed: int) -> None:
    """Refuses to begin what the disk cannot hold.

    Raises:
        BenchError: says how much is needed and how much there is.
    """
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise BenchError(f"{out} needs about {needed / 1e6:,.0f} MB, and the disk of {parent} has {free / 1e6:,.0f} MB free")


def _check_same(made: Poisoned, request: dict[str, Any], out: Path) -> None:
    """Nothing, if the folder holds this very poison; otherwise an error that names the difference."""
    remedy = "choose another folder or remove this one"
    if not (out / RECORD / REQUEST).is_file():
        raise BenchError(f"{out} is not empty; {remedy}")
    there = read_json(out / RECORD / REQUEST)
    if canonical(there) != canonical(request):
        name = next(name for name in sorted({*there, *request}) if there.get(name) != request.get(name))
        raise BenchError(f"{out} holds another poison: {name} is {_short(there.get(name))} there and {_short(request.get(name))} is asked for; {remedy}")
    for original, copied in ((made.record, out / RECORD), (made.manifest, out / POISONED)):
        for path in sorted(original.rglob("*")):
            copy = copied / path.relative_to(original)
            if path.is_file() and (not copy.is_file() or file_sha256(copy) != file_sha256(path)):
                state = "differs" if copy.is_file() else "is missing"
                raise BenchError(f"{out} holds a poison of the same request, but {copy.relative_to(out)} {state}; `bench verify {out}` says more; {remedy}")


def _short(value: Any) -> str:
    text = canonical(value)
    return text if len(text) <= 100 else text[:100] + "..."
