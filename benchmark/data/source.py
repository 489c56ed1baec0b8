"""Decodes a data set once: the drawn world, or the user's pairs, with its held-out and clean splits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from benchmark.data import world
from benchmark.data.decoding import Codec, Decoded, check_room, decode_all
from benchmark.data.image import pixels_sha256
from benchmark.data.manifest import Manifest, load_manifest, make_ids, save_manifest
from benchmark.data.pairs import SPLITS, Source, load_splits, save_rows
from benchmark.data.reader import layout_of, name_of, read_pairs
from benchmark.data.reading import Findings, Reading
from benchmark.data.shards import find_shards, shard_stamp, sizes_of
from benchmark.errors import BenchError
from benchmark.progress import Progress
from benchmark.seeding import stream_key
from benchmark.settings import DataSettings
from benchmark.stages import Stages

VERSION = 1
WORLD = "drawn"


def open_source(
    settings: DataSettings, data: Path | None, image_root: Path | None, stages: Stages, progress: Progress, reading: Reading | None = None, codec: Codec = "pixels"
) -> Source:
    """The decoded data set, from the cache or made now.

    Args:
        data: the user's pairs (a table, a folder or shards); None for the drawn world.
        image_root: where the image paths of a table begin. Default: its folder.
        reading: how the user's pairs are read.
        codec: `bytes` keeps the user's image files as they are and decodes them when they are asked for.

    Raises:
        BenchError: names the row that cannot be used, or says that the disk has no room.
    """
    if data is None:
        facts: dict[str, Any] = {"stage": "source", "version": VERSION, "world": world.VERSION, "data": settings.model_dump()}
        return load_source(stages.make("source", facts, partial(_draw, settings, progress)))
    reading = reading or Reading()
    table = _read(data, reading, image_root, stages, progress)
    facts = {"stage": "source", "version": VERSION, "manifest": table.sha256, "side": settings.side, "files": table.stamp}
    if reading.facts:
        facts["reading"] = reading.facts
    if codec != "pixels":
        facts["codec"] = codec
    # Whether broken images may be left out is not part of the key: a decoding that stopped at one goes on with --skip-broken.
    folder = stages.make("source", facts, partial(_decode, table, data, settings.side, reading, codec, progress), resume=True)
    source = load_source(folder)
    skipped = json.loads((folder / "source.json").read_text()).get("skipped", {})
    _settle(Findings(str(data), reading, {kind: source.counts[f"skipped_{kind}"] for kind in skipped}, skipped), table)
    return replace(source, name=name_of(data))


def load_source(folder: Path) -> Source:
    """The source in a finished stage folder."""
    about = json.loads((folder / "source.json").read_text())
    splits = load_splits(folder, about["n"], about["side"])
    return Source(folder, about["name"], splits["train"], splits["held_out"], splits["clean"], about["content"], tuple(about["warnings"]), about["counts"])


def _draw(settings: DataSettings, progress: Progress, folder: Path) -> None:
    sizes = dict(zip(SPLITS, (settings.n_pairs, settings.n_held_out, settings.n_clean), strict=True))
    labels, refs, captions = [], [], []
    tags: dict[str, list[str]] = {"object": [], "colour": [], "background": []}
    for split, n in sizes.items():
        for row in range(n):
            what = world.scene(settings.seed, split, row)
            labels.append(split)
            refs.append(f"world:{settings.seed}/{split}/{row}")
            captions.append(what.captions[0])
            tags["object"].append(what.object)
            tags["colour"].append(what.colour)
            tags["background"].append(what.background)
    images = (world.drawn_row(settings.seed, split, row, settings.side).image for split, n in sizes.items() for row in range(n))
    hashes = _write_images(folder, images, len(refs), progress, "drawing pairs")
    _finish(folder, WORLD, labels, make_ids(refs, captions), refs, captions, tags, hashes, settings.side, [], {})


def _read(data: Path, reading: Reading, image_root: Path | None, stages: Stages, progress: Progress) -> Manifest:
    """The pairs; those of shards are listed once, and the list is kept."""
    kind, _ = layout_of(data, reading)
    if kind != "shards" or image_root is not None:
        return read_pairs(data, reading, image_root, progress)
    shards = find_shards(str(data))
    facts = {"stage": "shards", "version": VERSION, "shards": shard_stamp(shards), "reading": asdict(reading)}
    sizes = sizes_of(shards)
    if sizes:
        facts["sizes"] = {str(path.resolve()): n for path, n in sizes.items()}
    found: list[Manifest] = []

    def build(folder: Path) -> None:
        found.append(read_pairs(data, reading, None, progress))
        save_manifest(found[0], folder)

    folder = stages.make("shards", facts, build)
    return found[0] if found else load_manifest(folder)


def _decode(table: Manifest, data: Path, side: int, reading: Reading, codec: Codec, progress: Progress, folder: Path) -> None:
    name, ids = name_of(data), table.ids
    n_apart = min(2000, max(32, len(table) // 20))
    if len(table) < 4 * n_apart:
        raise BenchError(
            f"{name} has {len(table)} pairs; at least {4 * n_apart} are needed, because {n_apart} are held out for targets and {n_apart} for defenses that ask for clean pairs"
        )
    # One carve-out for all attacks, defenses and seeds: it follows the ids alone.
    ranked = sorted(range(len(table)), key=lambda row: stream_key("carve", ids[row]))
    apart = dict.fromkeys(ranked[:n_apart], "held_out") | dict.fromkeys(ranked[n_apart : 2 * n_apart], "clean")
    del ranked
    order = sorted(range(len(table)), key=lambda row: (SPLITS.index(apart.get(row, "train")), row))
    refs = table.rows["image"].take(pa.array(order)).to_pylist()
    check_room(folder, refs, side, codec, progress)
    findings = Findings(str(data), reading)

    def refuse(done: Decoded) -> None:
        for place, problem in done.broken[findings.n :]:
            row = order[place]
            findings.add("broken_images", f"row {table.numbers[row]} (id {ids[row]!r})", problem)
        _settle(findings, table)

    done = decode_all(folder, refs, side, refuse, progress, codec)
    broken = {place for place, _ in done.broken}
    order, refs = ([value for place, value in enumerate(values) if place not in broken] for values in (order, refs))
    labels = [apart.get(row, "train") for row in order]
    for split in SPLITS:
        if split not in labels:
            raise BenchError(f"{data}: no image for the {split.replace('_', '-')} pairs can be decoded")
    counts = table.counts | findings.as_counts()
    warnings = [f"{count} {kind.replace('_', ' ')} among the pairs" for kind, count in table.counts.items() if count and not kind.startswith("skipped_")]
    warnings += [*table.warnings, *findings.warnings()]
    duplicates = len(done.hashes) - len(set(done.hashes))
    if duplicates:
        warnings.append(f"{duplicates} duplicate images among the pairs")
    train = {digest for digest, label in zip(done.hashes, labels, strict=True) if label == "train"}
    n_shared = sum(digest in train for digest, label in zip(done.hashes, labels, strict=True) if label != "train")
    if n_shared:
        warnings.append(f"{n_shared} held-out or clean images also stand among the training pairs")
    rows = table.rows.take(pa.array(order))
    _finish(folder, name, labels, rows["id"].to_pylist(), refs, rows["caption"].to_pylist(), {}, done.hashes, side, warnings, counts, findings.skipped)


def _settle(findings: Findings, table: Manifest) -> None:
    """Goes on if broken images may be left out; they count together with the rows that the table left out."""
    n_before = sum(n for kind, n in table.counts.items() if kind.startswith("skipped_"))
    findings.settle(len(table) + n_before, n_before)


def _write_images(folder: Path, images: Iterable[NDArray[np.uint8]], n: int, progress: Progress, what: str) -> list[str]:
    hashes = []
    with open(folder / "images.u8", "wb") as out, progress.bar(what, n, "images") as advance:
        for image in images:
            out.write(image.tobytes())
            hashes.append(pixels_sha256(image))
            advance(1)
    return hashes


def _finish(
    folder: Path,
    name: str,
    labels: list[str],
    ids: list[str],
    refs: list[str],
    captions: list[str],
    tags: dict[str, list[str]],
    hashes: list[str],
    side: int,
    warnings: list[str],
    counts: dict[str, int],
    skipped: dict[str, Any] | None = None,
) -> None:
    save_rows(folder, labels, ids, refs, captions, tags)
    hasher = hashlib.sha256()
    for row in zip(labels, ids, captions, hashes, strict=True):
        hasher.update(("\0".join(row) + "\n").encode())
    about = {"name": name, "n": len(ids), "side": side, "content": hasher.hexdigest(), "warnings": warnings, "counts": counts} | ({"skipped": skipped} if skipped else {})
    (folder / "source.json").write_text(json.dumps(about, sort_keys=True))
    (folder / "pixels.txt").write_text("\n".join(hashes) + "\n")
