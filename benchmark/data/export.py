"""Writes a poisoned set in the layouts that other trainers read, and says on its first page that it is poisoned."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image

import benchmark
from benchmark.data.image import FORMATS, decode_bytes, png_bytes
from benchmark.data.look import Look, look_at
from benchmark.data.pairs import Source
from benchmark.data.poison import Poisoned, SealedRecord
from benchmark.data.poison_folder import ALL_ROWS, REQUEST, RowImages, check_space, manifest_rows, read_json, sealed_record, unfinished, write_rows
from benchmark.data.shards import write_shards
from benchmark.errors import BenchError
from benchmark.progress import Progress
from benchmark.settings import SCHEMA, canonical
from benchmark.stages import file_sha256

CARD, EXPORT = "DATASET_CARD.json", "export.json"
TABLES = {"open_clip": "pairs.tsv", "cyclip": "pairs.csv"}
JPEG_QUALITY = 95
_SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_BLOCK = 512
_SAMPLED = 64
# What pandas' reader turns into a missing value unless it is told not to, as open_clip's and CyCLIP's loaders do not.
_MISSING = frozenset(("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"))


@dataclass(frozen=True)
class Layout:
    """How an export is written.

    Attributes:
        to: whose layout.
        with_ids: write ids, which give replaced rows away.
        reencode: `all` decodes every image to the geometry of the poison and encodes it anew; `new` does so with those that
            the attack wrote and copies the files of the others, which gives the former away.
        image_format: of the images that are encoded.
        per_shard: pairs in a shard of `webdataset`.
    """

    to: Literal["open_clip", "cyclip", "webdataset"]
    with_ids: bool = False
    reencode: Literal["all", "new"] = "all"
    image_format: Literal["png", "jpeg"] = "png"
    per_shard: int = 10_000

    def facts(self) -> dict[str, Any]:
        """What the bytes of the export depend on."""
        facts = {"to": self.to, "with_ids": self.with_ids, "reencode": self.reencode, "image_format": self.image_format}
        return facts | ({"per_shard": self.per_shard} if self.to == "webdataset" else {})


@dataclass(frozen=True)
class Exported:
    """A finished export; `written` is False if it was there already."""

    folder: Path
    record: Path
    card: dict[str, Any]
    written: bool


def layout(to: str, with_ids: bool = False, reencode: str = "all", image_format: str = "png", per_shard: int = 10_000) -> Layout:
    """A layout from words.

    Raises:
        BenchError: a word that is not known.
    """
    for option, value, known in (("--to", to, (*TABLES, "webdataset")), ("--reencode", reencode, ("all", "new")), ("--image-format", image_format, ("png", "jpeg"))):
        if value not in known:
            raise BenchError(f"expected {option} {', '.join(known[:-1])} or {known[-1]}, got {value!r}")
    if per_shard < 1:
        raise BenchError(f"expected --per-shard of at least 1, got {per_shard}")
    return Layout(to, with_ids, reencode, image_format, per_shard)  # type: ignore[arg-type]


def export(poisoned: Poisoned, source: Source, request: dict[str, Any], how: Layout, out: Path, progress: Progress) -> Exported:
    """Writes the pairs to `out`, and a copy of the sealed record beside it, to `<out>.record`.

    Rows keep their order, in which poisoned ones lie scattered. Images are named by their place in it.

    Raises:
        BenchError: a folder that holds something else, a source or a manifest that is not the one of the record, no space.
    """
    sealed = sealed_record(poisoned.record)
    header = sealed.header
    _check_untouched(poisoned, header, source)
    facts = {"schema": SCHEMA, "poison": header["poisoned_manifest_sha256"], "source": header["source"], "pillow": PIL.__version__, **how.facts()}
    record = out.with_name(out.name + ".record")
    there = _already(out, record, facts)
    if there is not None:
        return Exported(out, record, there, False)
    ids, refs, captions = manifest_rows(poisoned.manifest / "manifest.tsv")
    images = RowImages(poisoned.manifest, source.train.side, lambda: source)
    images.prepare(refs)
    check_space(out, _needed(refs, images, how))
    texts = [caption if how.to == "webdataset" else flattened(caption, how.to) for caption in captions]
    writer = _Writer(how, refs, images, dict(zip(sealed.rows["id"], sealed.rows["pixels_sha256_after"], strict=True)), ids)
    with unfinished(out) as part, unfinished(record) as record_part:
        with progress.bar("exporting", len(ids), "pairs") as advance:
            files = _write_shards(part, writer, texts, advance) if how.to == "webdataset" else _write_table(part, writer, ids, texts, advance)
        card = _card(sealed, source, facts, how, writer, files, captions, texts)
        (part / CARD).write_text(json.dumps(card, indent=2, sort_keys=True) + "\n")
        (part / "README.md").write_text(readme(card, out.name, record.name))
        for path in poisoned.record.iterdir():
            if path.is_file() and path.name not in (REQUEST, ALL_ROWS):
                shutil.copyfile(path, record_part / path.name)
        (record_part / REQUEST).write_text(canonical(request))
        (record_part / EXPORT).write_text(canonical({"schema": SCHEMA, "card": card}))
        write_rows(record_part, ids, writer.names, texts, writer.looks)
    return Exported(out, record, card, True)


def flattened(caption: str, to: str) -> str:
    """The caption as a table can hold it on one line: line ends, NUL and (in a TSV) tabs become spaces."""
    return re.sub(r"[\t\n\r\0]" if to == "open_clip" else r"[\n\r\0]", " ", caption)


def jpeg_bytes(image: NDArray[np.uint8]) -> bytes:
    """A JPEG file of quality 95 without chroma subsampling."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


class _Writer:
    """Encodes the images in order and remembers what was written."""

    def __init__(self, how: Layout, refs: Sequence[str], images: RowImages, touched: dict[str, str], ids: Sequence[str]) -> None:
        self.how, self.refs, self.images, self.touched, self.ids = how, refs, images, touched, ids
        self.names: list[str] = []
        self.looks: list[Look] = []
        self.n_copied = 0
        self.hasher = hashlib.sha256()

    def files(self, name: Callable[[int, str], str], advance: Callable[..., None]) -> Iterator[tuple[str, bytes, str]]:
        """Name, bytes and suffix of every image; `name(row, suffix)` names it."""
        with ThreadPoolExecutor(os.cpu_count() or 1) as workers:
            for begin in range(0, len(self.refs), _BLOCK):
                rows = range(begin, min(begin + _BLOCK, len(self.refs)))
                for row, (content, suffix, look, copied) in zip(rows, workers.map(self._encode, rows), strict=True):
                    self.names.append(name(row, suffix))
                    self.looks.append(look)
                    self.n_copied += copied
                    self.hasher.update(f"{self.names[-1]}\0{hashlib.sha256(content).hexdigest()}\n".encode())
                    yield self.names[-1], content, suffix
                advance(len(rows))

    def _encode(self, row: int) -> tuple[bytes, str, Look, bool]:
        ref, side = self.refs[row], self.images.side
        if self.how.reencode == "new":
            content = self.images.original(ref)
            suffix = None if content is None else _suffix(content)
            if content is not None and suffix is not None:
                return content, suffix, look_at(decode_bytes(content, ref, side)), True
        image = self.images.read(ref)
        look = look_at(image)
        expected = self.touched.get(self.ids[row])
        if expected is not None and look.pixels != expected:
            raise BenchError(f"row {row + 1} (id {self.ids[row]}): the image is not the one of the sealed record; `bench verify` says how it differs")
        if self.how.image_format == "png":
            return png_bytes(image), "png", look, False
        content = jpeg_bytes(image)
        return content, "jpg", look_at(decode_bytes(content, ref, side)), False


def _suffix(content: bytes) -> str | None:
    """The suffix of the format that the bytes are in; None for one that is encoded anew."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
            return _SUFFIXES.get(opened.format or "")
    except (OSError, Image.DecompressionBombError):
        return None


def _write_table(part: Path, writer: _Writer, ids: Sequence[str], captions: Sequence[str], advance: Callable[..., None]) -> dict[str, str]:
    to = writer.how.to
    for name, content, _ in writer.files(lambda row, suffix: f"images/{row // 1000:05d}/{row:09d}.{suffix}", advance):
        path = part / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    columns = {"open_clip": ("filepath", "title"), "cyclip": ("image", "caption")}[to]
    header = (*columns, "id") if writer.how.with_ids else columns
    with open(part / TABLES[to], "w", encoding="utf-8", newline="") as handle:
        table = csv.writer(handle, delimiter="\t" if to == "open_clip" else ",", lineterminator="\n")
        table.writerow(header)
        for row, (name, caption) in enumerate(zip(writer.names, captions, strict=True)):
            table.writerow((name, caption, ids[row]) if writer.how.with_ids else (name, caption))
    return {TABLES[to]: file_sha256(part / TABLES[to])}


def _write_shards(part: Path, writer: _Writer, captions: Sequence[str], advance: Callable[..., None]) -> dict[str, str]:
    per_shard = writer.how.per_shard
    digits = max(4, len(str(per_shard - 1)))
    texts = iter(captions)
    named = writer.files(lambda row, suffix: f"{row // per_shard:05d}{row % per_shard:0{digits}d}", advance)
    shards = write_shards(part, ((key, content, suffix, next(texts)) for key, content, suffix in named), per_shard)
    if writer.how.with_ids:
        (part / "ids.tsv").write_text("key\tid\n" + "".join(f"{key}\t{row_id}\n" for key, row_id in zip(writer.names, writer.ids, strict=True)))
    return {path.name: file_sha256(path) for path in shards}


def _check_untouched(poisoned: Poisoned, header: dict[str, Any], source: Source) -> None:
    manifest = poisoned.manifest / "manifest.tsv"
    if not manifest.is_file() or file_sha256(manifest) != header["poisoned_manifest_sha256"]:
        raise BenchError(f"{manifest} is not the manifest of its sealed record; `bench verify` says what differs")
    if source.content != header["source"]:
        raise BenchError("the source is not the one that was poisoned: its images or captions have changed since; `bench verify` says which")


def _already(out: Path, record: Path, facts: dict[str, Any]) -> dict[str, Any] | None:
    """The card of an export that is there already and is this one."""
    if out.is_dir() and any(out.iterdir()):
        card = read_json(out / CARD) if (out / CARD).is_file() else {}
        if card.get("export") == facts and (record / EXPORT).is_file():
            return card
        raise BenchError(f"{out} is not empty and holds {'another export' if card else 'something else'}; choose another folder or remove it")
    if out.exists() and not out.is_dir():
        raise BenchError(f"{out} is a file; choose another folder")
    if record.is_dir() and any(record.iterdir()):
        raise BenchError(f"{record} is not empty, and the sealed record would go there; choose another folder or remove it")
    return None


def _needed(refs: Sequence[str], images: RowImages, how: Layout) -> int:
    """Bytes that the export takes, from a sample of its images."""
    encode = png_bytes if how.image_format == "png" else jpeg_bytes
    sizes = []
    for row in np.linspace(0, len(refs) - 1, min(_SAMPLED, len(refs))).astype(int).tolist():
        content = images.original(refs[row]) if how.reencode == "new" else None
        sizes.append(len(encode(images.read(refs[row])) if content is None else content))
    per_file = 4096 if how.to != "webdataset" else 2048  # what a file takes beyond its bytes on disk, or in a tar with its caption
    return int((1.2 * float(np.mean(sizes)) + per_file) * len(refs))


def _card(
    sealed: SealedRecord,
    source: Source,
    facts: dict[str, Any],
    how: Layout,
    writer: _Writer,
    files: dict[str, str],
    captions: Sequence[str],
    texts: Sequence[str],
) -> dict[str, Any]:
    header = sealed.header
    poisoned = sealed.n_poison > 0
    return {
        "schema": SCHEMA,
        "export": facts,
        "poisoned": poisoned,
        "warning": "contains poisoned training data; do not mix into other data sets" if poisoned else "not poisoned",
        "attack": header["attack"],
        "options": header["options"],
        "sham": header["sham"],
        "seed": header["attack_seed"],
        "n_rows": header["n_rows"],
        "n_poison": header["n_poison"],
        "n_requested": header["n_requested"],
        "roles": {str(role): int(n) for role, n in sealed.rows["role"].value_counts().items()},
        "poison_rate": header["poison_rate"],
        "edits": header["edit_mode"],
        "data": source.name,
        "side": source.train.side,
        "files": files,
        "images_sha256": writer.hasher.hexdigest(),
        "n_copied_images": writer.n_copied,
        "encoder": "PNG" if how.image_format == "png" else f"JPEG, quality {JPEG_QUALITY}, no chroma subsampling",
        "with_ids": how.with_ids,
        "captions_flattened": sum(before != after for before, after in zip(captions, texts, strict=True)),
        "captions_read_as_missing": sum(text in _MISSING for text in texts) if how.to != "webdataset" else 0,
        "version": benchmark.__version__,
    }


def first_line(card: dict[str, Any]) -> str:
    """The first line of an export's README."""
    return f"# These data ARE POISONED: {card['n_poison']:,} of {card['n_rows']:,} pairs" if card["poisoned"] else "# These data are not poisoned"


def readme(card: dict[str, Any], name: str, record: str) -> str:
    """The first page of an export. Its first line says whether the data are poisoned."""
    facts = card["export"]
    lines = [first_line(card), ""]
    if card["poisoned"]:
        lines += [
            "Contains poisoned training data, made to measure defenses. Do not mix these pairs into other data sets, do not place them where",
            "others will collect them, and do not release a model that was trained on them without saying so.",
            "",
        ]
    roles = "; " + ", ".join(f"{n:,} {role}" for role, n in sorted(card["roles"].items())) if len(card["roles"]) > 1 else ""
    lines += [
        f"- attack: {card['attack']}{', sham (its edits without the trigger)' if card['sham'] else ''}; seed {card['seed']}",
        f"- poisoned rows: {card['n_poison']:,} (asked for {card['n_requested']:,}) of {card['n_rows']:,}, a share of {card['poison_rate']:.6g}; edits: {card['edits']}{roles}",
        f"- data: {'drawn pairs' if card['data'] == 'drawn' else 'pairs of a manifest'} at {card['side']} x {card['side']} pixels, content {facts['source'][:16]}",
        f"- poisoned manifest: SHA-256 {facts['poison']}",
        *(f"- {file}: SHA-256 {sha256}" for file, sha256 in sorted(card["files"].items())[:20]),
        *([f"- and {len(card['files']) - 20:,} more shards, in {CARD}"] if len(card["files"]) > 20 else []),
        f"- images together: SHA-256 {card['images_sha256']}",
        "",
        "Options of the attack:",
        "",
        f"    {json.dumps(card['options'], sort_keys=True)}",
        "",
        "## To read them",
        "",
        *_reading(facts["to"], sorted(card["files"])),
        "",
        "## What tells poisoned rows from clean ones",
        "",
        *_telltales(card),
        "",
        "## To check them",
        "",
        f"`bench verify {name}` compares every row with the sealed record, which lies beside this folder as `{record}`. The record says which rows",
        f"are poisoned: keep it from whoever is to defend. `{CARD}` repeats this page for programs.",
    ]
    return "\n".join(lines) + "\n"


def _reading(to: str, files: Sequence[str]) -> list[str]:
    if to == "open_clip":
        return [
            "A TSV with the columns `filepath` and `title`. Paths are relative to this folder, so start open_clip in it:",
            "",
            "    python -m open_clip_train.main --dataset-type csv --train-data pairs.tsv --csv-img-key filepath --csv-caption-key title",
        ]
    if to == "cyclip":
        return [
            "A CSV with the columns `image` and `caption`; paths are relative to it. CyCLIP and CleanCLIP read it as it is; RoCLIP and SafeCLIP with",
            "`--image_key image`.",
        ]
    shards = files[0] if len(files) == 1 else f"{{{files[0].removesuffix('.tar')}..{files[-1].removesuffix('.tar')}}}.tar"
    return [
        "Tar shards with an image and a `.txt` under each key, and `sizes.json`. From this folder:",
        "",
        f"    python -m open_clip_train.main --dataset-type webdataset --train-data '{shards}'",
    ]


def _telltales(card: dict[str, Any]) -> list[str]:
    facts = card["export"]
    if card["n_copied_images"]:
        images = (
            f"- Images: {card['n_copied_images']:,} are copies of the source's files. The others were encoded here ({card['encoder']}, {card['side']} x {card['side']}), "
            "and all that the attack wrote are among them: **size and format give poisoned rows away.** `--reencode all` does not."
        )
    else:
        images = f"- Images: every one went through the same geometry and the same encoder ({card['encoder']})."
    if facts["image_format"] == "jpeg":
        images += " JPEG has changed the pixels, those of a trigger too."
    ids = (
        "- Ids: written. **They give replaced rows away**: an id was computed from a row's first image and caption and stays when these are replaced."
        if facts["with_ids"]
        else "- Ids: none, because they would give replaced rows away."
    )
    lines = [images, "- Names and order: images are named by their place; appended rows were interleaved at random.", ids]
    if card["captions_flattened"]:
        lines.append(f"- Captions: {card['captions_flattened']:,} held a tab or a line end, which became a space.")
    if card["captions_read_as_missing"]:
        lines.append(f"- Captions: {card['captions_read_as_missing']:,} are words such as NA or None, or empty, and pandas' defaults read them as missing.")
    return lines
