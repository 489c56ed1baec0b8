"""Checks a poisoned set, or an export of one, against its sealed record, row by row."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from benchmark.data.export import CARD, EXPORT, first_line, flattened
from benchmark.data.look import Look, compare_looks, look_at
from benchmark.data.manifest import canonical_tsv
from benchmark.data.opened import Opened, OpenSource, is_export, is_poison_folder, open_export, open_poison_folder
from benchmark.data.pairs import Source
from benchmark.data.poison_folder import ALL_ROWS, POISONED, RECORD, check_schema, open_folder, read_json, sealed_record
from benchmark.errors import BenchError
from benchmark.progress import Progress
from benchmark.stages import file_sha256

_BLOCK = 1024
_SHOWN = 80


@dataclass(frozen=True)
class Finding:
    """One thing that is not as the record says.

    Attributes:
        kind: `manifest`, `record`, `count`, `order`, `missing`, `added`, `repeated`, `caption`, `reference`, `re-encoded`,
            `replaced`, `rewritten`, `broken` or `source`.
        row: the row's id, or its image where there are no ids; empty for the whole.
    """

    kind: str
    row: str
    text: str


@dataclass
class Verified:
    """What came of a check; `facts` are sentences about what was read, `findings` what differs."""

    facts: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def add(self, kind: str, row: str, text: str) -> None:
        """Notes a difference."""
        self.findings.append(Finding(kind, row, text))


@dataclass(frozen=True)
class _Sealed:
    """The record: its header, its rows, and every row of the set as it was written."""

    folder: Path
    header: dict[str, Any]
    rows: pd.DataFrame
    all_rows: pd.DataFrame


def verify(path: Path, open_source: OpenSource, progress: Progress) -> Verified:
    """What differs between a folder that `bench poison` or `bench export` wrote and its sealed record.

    Args:
        open_source: opens the data that were poisoned, from the request in the record.

    Raises:
        BenchError: no such folder, or one without a record.
    """
    folder = is_poison_folder(path)
    if folder is not None:
        return _verify_poison(folder, open_source, progress)
    record = path.with_name(path.name + ".record")
    if is_export(path) and (record / EXPORT).is_file():
        return _verify_export(path, record, progress)
    if not path.is_dir():
        raise BenchError(f"no folder at {path}")
    where = f"beside it, at {record}" if is_export(path) else f"in it, at {path / RECORD}"
    raise BenchError(f"{path} has no sealed record {where}; nothing can be checked without one")


def _verify_poison(folder: Path, open_source: OpenSource, progress: Progress) -> Verified:
    result = Verified()
    sealed = _open(folder / RECORD)
    request = open_folder(folder).request
    opener = _Once(open_source)
    source = opener.tried(request, result)
    _check_record(sealed, result, request["data_settings"]["side"])
    if source is not None:
        _check_source(sealed, source, result)
    manifest = folder / POISONED / "manifest.tsv"
    try:
        found = open_poison_folder(folder, opener)
    except BenchError as error:
        result.add("manifest", "", str(error))
        return result
    _check_rows(found, sealed, "id", result, progress)
    if file_sha256(manifest) != sealed.header.get("poisoned_manifest_sha256"):
        _about_bytes(manifest.name, "poisoned_manifest_sha256", result)
    return result


def _verify_export(path: Path, record: Path, progress: Progress) -> Verified:
    result = Verified()
    sealed = _open(record)
    about = read_json(record / EXPORT)
    check_schema(record, about)
    card: dict[str, Any] = about.get("card", {})
    facts: dict[str, Any] = card.get("export", {})
    if not facts or not isinstance(card.get("files"), dict) or not {"poisoned", "n_poison", "n_rows"} <= card.keys():
        raise BenchError(f"{record / EXPORT} does not say what was exported; it has been changed")
    _check_record(sealed, result, None if facts.get("image_format") == "jpeg" else card.get("side"), facts.get("to", ""))
    try:
        found = open_export(path, progress)
    except BenchError as error:
        result.add("manifest", "", str(error))
        return result
    _check_rows(found, sealed, "image", result, progress)
    for name, sha256 in card["files"].items():
        if not (path / name).is_file():
            result.add("missing", "", f"there is no {name}")
        elif file_sha256(path / name) != sha256:
            _about_bytes(name, "sha256", result)
    _check_page(path, card, result)
    if any(entry.name.endswith(".record") or entry.name == ALL_ROWS for entry in path.iterdir()):
        result.add("record", "", "a sealed record lies inside the export")
    return result


def _check_page(path: Path, card: dict[str, Any], result: Verified) -> None:
    """What the export says about itself is still what it said."""
    there = read_json(path / CARD)
    for name in sorted({*card, *there}):
        if card.get(name) != there.get(name):
            result.add("manifest", "", f"{CARD} says {name} {there.get(name)!r}; recorded is {card.get(name)!r}")
    page = path / "README.md"
    first = first_line(card)
    if not page.is_file() or page.read_text(errors="replace").partition("\n")[0] != first:
        result.add("manifest", "", f"the first line of README.md is not {first!r}")


class _Once:
    """Opens the source once, and remembers that it could not."""

    def __init__(self, open_source: OpenSource) -> None:
        self.open_source = open_source
        self.source: Source | None = None
        self.problem = ""

    def tried(self, request: dict[str, Any], result: Verified) -> Source | None:
        try:
            self.source = self.open_source(request)
        except BenchError as error:
            self.problem = str(error)
            result.add("source", "", f"the data that were poisoned cannot be opened: {error}")
        return self.source

    def __call__(self, request: dict[str, Any]) -> Source:
        if self.source is None:
            raise _NoSource(self.problem)
        return self.source


class _NoSource(BenchError):
    """An image of a source that cannot be opened is wanted."""


def _open(folder: Path) -> _Sealed:
    record = sealed_record(folder)
    try:
        table = pd.read_parquet(folder / ALL_ROWS, columns=["id", "image", "caption", "pixels_sha256", "blocks"])
    except (OSError, ValueError, KeyError) as error:
        raise BenchError(f"{folder / ALL_ROWS} cannot be read: {error}") from None
    return _Sealed(folder, record.header, record.rows, table)


def _about_bytes(name: str, what: str, result: Verified) -> None:
    """Another hash needs no finding of its own where one says what differs."""
    if not any(finding.kind in ("missing", "added", "repeated", "caption", "reference", "order", "re-encoded", "replaced", "rewritten", "broken") for finding in result.findings):
        result.add("manifest", "", f"{name} holds the recorded pairs in other bytes: its {what} is not the recorded one")


def _check_record(sealed: _Sealed, result: Verified, side: int | None, to: str = "") -> None:
    """The record agrees with itself.

    Args:
        side: given where pixels of all rows are those of the poison, and not of an encoder that changed them.
    """
    header, rows, all_rows = sealed.header, sealed.rows, sealed.all_rows
    for name, there, counted in (("n_rows", header.get("n_rows"), len(all_rows)), ("n_poison", header.get("n_poison"), len(rows))):
        if there != counted:
            result.add("record", "", f"record.json says {name} {there}, and its tables have {counted}")
    place = {row_id: index for index, row_id in enumerate(all_rows["id"])}
    captions, pixels = all_rows["caption"].tolist(), all_rows["pixels_sha256"].tolist()
    for row_id, caption, image in zip(rows["id"], rows["caption_after"], rows["pixels_sha256_after"], strict=True):
        index = place.get(row_id)
        if index is None:
            result.add("record", row_id, f"rows.parquet has a row that {ALL_ROWS} has not")
            continue
        if captions[index] != (flattened(caption, to) if to in ("open_clip", "cyclip") else caption):
            result.add("record", row_id, f"rows.parquet says caption {_shown(caption)}, and {ALL_ROWS} {_shown(captions[index])}")
        if side is not None and pixels[index] != image:
            result.add("record", row_id, f"rows.parquet and {ALL_ROWS} record other pixels")
    if not to and not result.findings:
        sha256 = hashlib.sha256(canonical_tsv(all_rows["id"].tolist(), all_rows["image"].tolist(), captions)).hexdigest()
        if sha256 != header.get("poisoned_manifest_sha256"):
            result.add("record", "", f"{ALL_ROWS} is not the manifest of record.json")


def _check_source(sealed: _Sealed, source: Source, result: Verified) -> None:
    """Untouched rows are those of the source, and replaced ones were; held against the source as it is now."""
    hashes = (source.folder / "pixels.txt").read_text().split()
    place = {row_id: index for index, row_id in enumerate(source.train.ids)}
    touched = set(sealed.rows["id"])
    before = len(result.findings)
    appended = set(sealed.rows.loc[sealed.rows["edit"] == "append", "id"])
    for row_id, caption, pixels, blocks in zip(*(sealed.all_rows[name] for name in ("id", "caption", "pixels_sha256", "blocks")), strict=True):
        if row_id in appended:
            continue
        index = place.get(row_id)
        if index is None:
            result.add("source", row_id, "the source no longer has this row")
        elif row_id not in touched:
            if source.train.captions[index] != caption:
                result.add("source", row_id, f"caption was {_shown(caption)} and is {_shown(source.train.captions[index])} in the source now")
            if hashes[index] != pixels:
                change = compare_looks(Look(pixels, blocks), look_at(source.train.image(index)))
                result.add("source", row_id, f"the source's image has been {change} since")
    replaced = sealed.rows[sealed.rows["edit"] == "replace"]
    for row_id, caption, pixels in zip(replaced["id"], replaced["caption_before"], replaced["pixels_sha256_before"], strict=True):
        index = place.get(row_id)
        if index is not None and source.train.captions[index] != caption:
            result.add("source", row_id, f"caption before the attack is {_shown(caption)} in the record and {_shown(source.train.captions[index])} in the source")
        if index is not None and hashes[index] != pixels:
            result.add("source", row_id, "the image before the attack is another one in the source than in the record")
    gone = len(source.train) - len(set(sealed.all_rows["id"]) & set(place))
    if gone:
        result.add("source", "", f"{gone} rows of the source are in no row of the record")
    if len(result.findings) == before:
        result.facts.append(f"source: {len(source.train):,} pairs, as they were when they were poisoned")


def _check_rows(found: Opened, sealed: _Sealed, key: str, result: Verified, progress: Progress) -> None:
    """Every recorded row is there, once, with its caption and its pixels, and no other."""
    all_rows = sealed.all_rows
    ids, captions, touched = all_rows["id"].tolist(), all_rows["caption"].tolist(), set(sealed.rows["id"])
    names = found.ids if key == "id" and found.ids is not None else found.images
    n_rows = len(found) + len(found.broken)
    lines = "" if found.n_lines is None else f" from {found.n_lines:,} lines"
    result.facts.insert(0, f"read {n_rows:,} rows{lines}; the record has {len(all_rows):,}")
    for number, problem in found.broken:
        result.add("manifest", "", f"row {number}: {problem}")
    called = ["poisoned row" if row_id in touched else "row" for row_id in ids]
    matched = _matched(names, found.captions, all_rows[key].tolist(), captions, called, result)
    changed: set[int] = set()
    for index, row in matched.items():
        if found.captions[row] != captions[index]:
            changed.add(index)
            result.add("caption", names[row], f"the {called[index]}'s caption is {_shown(found.captions[row])}; recorded is {_shown(captions[index])}")
    looks = [Look(pixels, blocks) for pixels, blocks in zip(all_rows["pixels_sha256"], all_rows["blocks"], strict=True)]
    n_same = 0
    with progress.bar("looking at every image", len(matched), "images") as advance:
        for (index, row), wrong in zip(matched.items(), _images(found, list(matched.items()), looks, all_rows["image"].tolist(), advance), strict=True):
            if wrong is None:
                n_same += 1
                continue
            changed.add(index)
            if wrong[0] != "unseen":
                result.add(wrong[0], names[row], f"the {called[index]}'s {wrong[1]}")
    n_whole = sum(index not in changed and ids[index] in touched for index in matched)
    result.facts.insert(1, f"poisoned rows with the recorded caption and pixels: {n_whole:,} of {len(touched):,}; images of all rows: {n_same:,} of {len(ids):,}")
    if n_rows != len(all_rows):
        result.add("count", "", f"{n_rows:,} rows instead of {len(all_rows):,}")
    if n_whole != sealed.header.get("n_poison"):
        result.add("count", "", f"{n_whole:,} poisoned rows are as recorded instead of {sealed.header.get('n_poison')}")


def _matched(names: Sequence[str], there: Sequence[str], recorded: Sequence[str], captions: Sequence[str], called: Sequence[str], result: Verified) -> dict[int, int]:
    """Which row stands for which recorded one; rows that are missing, added, repeated or out of order are noted."""
    expected = {name: index for index, name in enumerate(recorded)}
    matched: dict[int, int] = {}
    for row, name in enumerate(names):
        known = expected.get(name)
        if known is None:
            result.add("added", name, f"row {row + 1} is in no record: {_shown(there[row])}")
        elif known in matched:
            result.add("repeated", name, f"row {row + 1} repeats row {matched[known] + 1}")
        else:
            matched[known] = row
    for index, name in enumerate(recorded):
        if index not in matched:
            result.add("missing", name, f"the {called[index]} is missing: {_shown(captions[index])}")
    order = list(matched)
    astray = next((place for place in range(1, len(order)) if order[place] < order[place - 1]), None)
    if astray is not None:
        row = matched[order[astray]]
        result.add("order", names[row], f"rows stand in another order, from row {row + 1} on")
    return matched


def _images(found: Opened, pairs: Sequence[tuple[int, int]], looks: Sequence[Look], refs: Sequence[str], advance: Any) -> Iterator[tuple[str, str] | None]:
    """What is wrong with the image of each row, or None."""

    def check(pair: tuple[int, int]) -> tuple[str, str] | None:
        index, row = pair
        try:
            content = found.read(row)
            look = look_at(found.pixels(row, found.side or 0) if isinstance(content, bytes) else content)
        except _NoSource:
            return "unseen", ""
        except BenchError as error:
            return "broken", f"image cannot be read: {error}"
        change = compare_looks(looks[index], look)
        if change == "re-encoded":
            return change, "image was encoded anew: the same picture with other pixels"
        if change == "replaced":
            return change, "image is another one"
        ref = found.images[row]
        if ref != refs[index]:
            return "reference", f"image is {ref!r} instead of {refs[index]!r}, with the same pixels"
        if isinstance(content, bytes) and ref.startswith("images/") and len(Path(ref).stem) == 64 and hashlib.sha256(content).hexdigest() != Path(ref).stem:
            return "rewritten", "image file was written anew with the same pixels"
        return None

    if pairs:
        with ThreadPoolExecutor(os.cpu_count() or 1) as workers:
            for begin in range(0, len(pairs), _BLOCK):
                block = pairs[begin : begin + _BLOCK]
                yield from workers.map(check, block)
                advance(len(block))


def _shown(caption: str) -> str:
    """A caption for a message: bounded, with control characters made visible."""
    text = caption if len(caption) <= _SHOWN else f"{caption[:_SHOWN]}... ({len(caption)} characters)"
    return repr(text)


def report(result: Verified, limit: int = 50) -> Iterator[str]:
    """The lines that `bench verify` prints."""
    yield from result.facts
    for finding in result.findings[:limit]:
        yield f"{finding.kind}: {finding.row + ': ' if finding.row else ''}{finding.text}"
    if len(result.findings) > limit:
        kinds = pd.Series([finding.kind for finding in result.findings]).value_counts()
        yield f"... and {len(result.findings) - limit:,} more; in all " + ", ".join(f"{n:,} {kind}" for kind, n in kinds.items())
    yield "whole: everything is as recorded" if not result.findings else f"{len(result.findings):,} differences"
