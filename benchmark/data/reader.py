"""What `--data` may name: a table, a folder with a captions file, images with their captions beside them, or shards."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from benchmark.data.dialects import GCC
from benchmark.data.manifest import Manifest, build, canonical_sha256, pairs_of, read_manifest
from benchmark.data.reading import SHARDS, TABLES, Findings, Reading
from benchmark.data.shards import IMAGE_SUFFIXES, MAX_TEXT, find_shards, read_shards, shard_stamp
from benchmark.errors import BenchError
from benchmark.progress import Progress, silent
from benchmark.settings import digest

CAPTIONS = ("captions.tsv", "captions.csv", "captions.parquet")
_KNOWN = f"{', '.join(CAPTIONS[:-1])} or {CAPTIONS[-1]}"


def read_pairs(data: Path, reading: Reading | None = None, image_root: Path | None = None, progress: Progress | None = None) -> Manifest:
    """The pairs that `--data` names, in their order.

    Args:
        data: a table, a folder or a brace pattern of tars.
        image_root: for tables, where image paths begin.

    Raises:
        BenchError: names the file and the row, or the shard and the sample.
    """
    reading = reading or Reading()
    kind, path = layout_of(data, reading)
    if kind == "table":
        return read_manifest(path, image_root, replace(reading, dialect=None) if reading.dialect == "folder" else reading)
    if image_root is not None:
        raise BenchError(f"--image-root is for tables of image paths; in {data} images and captions stand together")
    if reading.image_column or reading.caption_column or reading.quoting:
        raise BenchError(f"--image-column, --caption-column and --quoting are for tables; {data} is none")
    return _read_shards(data, reading, progress or silent()) if kind == "shards" else _read_beside(data, reading)


def layout_of(data: Path, reading: Reading) -> tuple[Literal["table", "shards", "beside"], Path]:
    """In which of three layouts the pairs stand, and where; the content of files is not looked at.

    Raises:
        BenchError: the dialect that the user names is something else, or a folder holds two captions files.
    """
    try:
        str(data.resolve()).encode()
    except UnicodeEncodeError:
        raise BenchError(f"a folder on the way to {ascii(str(data))[1:-1]} has a name that is not UTF-8; rename it") from None
    dialect = reading.dialect
    if dialect == "gcc":
        raise BenchError(f"{data} {GCC}")
    if dialect in SHARDS:
        return "shards", data
    if data.is_dir():
        tables = [data / name for name in CAPTIONS if (data / name).is_file()]
        if len(tables) > 1:
            raise BenchError(f"{data} holds {tables[0].name} and {tables[1].name}; name the one that counts: --data {tables[0]}")
        if tables:
            return "table", tables[0]
        if dialect in TABLES:
            raise BenchError(f"{data} is a folder without a captions file ({_KNOWN}); dialect {dialect!r} is a table")
        if dialect is None and next(data.rglob("*.tar"), None) is not None:
            return "shards", data
        return "beside", data
    if dialect == "folder":
        raise BenchError(f"no folder at {data}, and dialect 'folder' is one")
    return "shards" if dialect is None and (data.suffix == ".tar" or _is_pattern(data)) else "table", data


def name_of(data: Path) -> str:
    """What the data are called in tables: the name of a file without its ending, or of a folder."""
    if data.is_dir():
        return data.resolve().name
    if data.exists() or not _is_pattern(data):
        return data.stem
    folders = [Path(os.path.dirname(part.partition("{")[0])).resolve().name for part in str(data).split("::")]
    return "+".join(dict.fromkeys(folders))


def _is_pattern(data: Path) -> bool:
    return not data.exists() and ("{" in str(data) or "::" in str(data))


def _read_shards(data: Path, reading: Reading, progress: Progress) -> Manifest:
    shards = find_shards(str(data))
    findings = Findings(str(data), reading)
    rows, counts = read_shards(shards, findings, progress)
    # The hash is that of ids and captions, wherever the shards lie; `stamp` has their places.
    sha256 = canonical_sha256((row_id, "", caption) for row_id, caption in pairs_of(rows, "id", "caption"))
    n_empty = sum(not caption.strip() for (caption,) in pairs_of(rows, "caption"))
    counts = {"empty_captions": n_empty} | counts | findings.as_counts()
    return Manifest(rows, sha256, digest(shard_stamp(shards)), np.arange(1, len(rows) + 1), counts, tuple(findings.warnings()))


def _read_beside(folder: Path, reading: Reading) -> Manifest:
    """Images with a .txt of the same name beside each, in folders to any depth, in order of their paths."""
    findings = Findings(str(folder), reading)
    images, texts = _walk(folder)
    if not images and not texts:
        raise BenchError(f"{folder} holds no pairs; expected {_KNOWN}, or images ({', '.join(IMAGE_SUFFIXES)}) with a .txt of the same name beside each, or tars")
    captions: list[str] = []
    kept: list[str] = []
    root = folder.resolve()
    for stem, names in sorted(images.items(), key=lambda item: item[1][0]):
        caption = _caption(root, texts.pop(stem, None), reading) if len(names) == 1 else None
        if isinstance(caption, str):
            kept.append(names[0])
            captions.append(caption)
        else:
            problem = "no .txt of the same name beside it" if caption is None else caption[0]
            findings.add("broken_pairs", names[0], problem if len(names) == 1 else f"{names[1]} has the same name but for its ending")
            texts.pop(stem, None)
    for text in sorted(texts.values()):
        findings.add("broken_pairs", text, f"no image of the same name beside it; endings of images: {', '.join(IMAGE_SUFFIXES)}")
    n_rows = len(kept) + findings.n
    findings.settle(n_rows)
    table = pa.table([pa.chunked_array([column], pa.large_string()) for column in (kept, captions)], names=["image", "caption"])
    return build(table, np.arange(1, len(kept) + 1), root, findings, n_rows, "")


def _walk(folder: Path) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Images and texts by path without ending; paths are relative to the folder, links to folders are not followed."""
    images: dict[str, list[str]] = {}
    texts: dict[str, str] = {}
    for base, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            path = os.path.relpath(os.path.join(base, name), folder)
            stem, ending = os.path.splitext(path)
            try:
                path.encode()
            except UnicodeEncodeError:
                raise BenchError(f"{folder}: the file name {path!a} is not UTF-8; rename it") from None
            if ending.lower().removeprefix(".") in IMAGE_SUFFIXES:
                images.setdefault(stem, []).append(path)
            elif ending == ".txt":
                texts[stem] = path
    return images, texts


def _caption(root: Path, path: str | None, reading: Reading) -> str | tuple[str] | None:
    """The text without one line end at its end; a tuple with what is wrong; None if there is no file."""
    if path is None:
        return None
    file = root / path
    if not reading.allow_outside and file.is_symlink() and not file.resolve().is_relative_to(root):
        return (f"{path} leads out of {root}; --allow-outside lets it",)
    try:
        with open(file, "rb") as handle:
            raw = handle.read(MAX_TEXT + 1)
        caption = raw.decode().removeprefix("\ufeff")
    except UnicodeDecodeError:
        return (f"{path} is not UTF-8",)
    except OSError as error:
        return (f"cannot read {path}: {error.strerror}",)
    if len(raw) > MAX_TEXT:
        return (f"{path} has more than {MAX_TEXT} bytes",)
    if "\0" in caption:
        return (f"{path} holds a NUL character",)
    return caption.removesuffix("\n").removesuffix("\r") if caption.endswith("\n") else caption
