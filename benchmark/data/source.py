"""Decodes a data set once: the drawn world, or a manifest of image files, with its held-out and clean splits."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmark.data import world
from benchmark.data.image import decode_many, pixels_sha256
from benchmark.data.manifest import Manifest, make_ids, read_manifest
from benchmark.data.pairs import SPLITS, Source, load_splits, save_rows
from benchmark.errors import BenchError
from benchmark.progress import Progress
from benchmark.seeding import stream_key
from benchmark.settings import DataSettings
from benchmark.stages import Stages

VERSION = 1
WORLD = "drawn"


def open_source(settings: DataSettings, manifest: Path | None, image_root: Path | None, stages: Stages, progress: Progress) -> Source:
    """The decoded data set, from the cache or made now.

    Args:
        manifest: the user's pairs; None for the drawn world.
    """
    if manifest is None:
        facts = {"stage": "source", "version": VERSION, "world": world.VERSION, "data": settings.model_dump()}
        folder = stages.make("source", facts, partial(_draw, settings, progress))
    else:
        table = read_manifest(manifest, image_root)
        facts = {"stage": "source", "version": VERSION, "manifest": table.sha256, "side": settings.side, "files": _fingerprint(table)}
        folder = stages.make("source", facts, partial(_decode, table, manifest.stem, settings.side, progress))
    return load_source(folder)


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


def _decode(table: Manifest, name: str, side: int, progress: Progress, folder: Path) -> None:
    n_apart = min(2000, max(32, len(table) // 20))
    if len(table) < 4 * n_apart:
        raise BenchError(
            f"{name} has {len(table)} pairs; at least {4 * n_apart} are needed, because {n_apart} are held out for targets and {n_apart} for defenses that ask for clean pairs"
        )
    # One carve-out for all attacks, defenses and seeds: it follows the ids alone.
    ranked = sorted(range(len(table)), key=lambda row: stream_key("carve", table.ids[row]))
    apart = {row: "held_out" for row in ranked[:n_apart]} | {row: "clean" for row in ranked[n_apart : 2 * n_apart]}
    order = sorted(range(len(table)), key=lambda row: (SPLITS.index(apart.get(row, "train")), row))
    images = decode_many([table.images[row] for row in order], side)
    hashes = _write_images(folder, images, len(order), progress, "decoding images")
    warnings = [f"{count} {name.replace('_', ' ')} among the pairs" for name, count in table.counts.items() if count]
    duplicates = len(hashes) - len(set(hashes))
    if duplicates:
        warnings.append(f"{duplicates} duplicate images among the pairs")
    train = {digest for digest, row in zip(hashes, order, strict=True) if row not in apart}
    shared = [table.ids[row] for digest, row in zip(hashes, order, strict=True) if row in apart and digest in train]
    if shared:
        warnings.append(f"{len(shared)} held-out or clean images also stand among the training pairs")
    _finish(
        folder,
        name,
        [apart.get(row, "train") for row in order],
        [table.ids[row] for row in order],
        [table.images[row] for row in order],
        [table.captions[row] for row in order],
        {},
        hashes,
        side,
        warnings,
        table.counts,
    )


def _fingerprint(table: Manifest) -> str:
    """Changes when an image is replaced under its name."""
    hasher = hashlib.sha256()
    for file in table.images:
        stat = os.stat(file)
        hasher.update(f"{file}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return hasher.hexdigest()


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
) -> None:
    save_rows(folder, labels, ids, refs, captions, tags)
    hasher = hashlib.sha256()
    for row in zip(labels, ids, captions, hashes, strict=True):
        hasher.update(("\0".join(row) + "\n").encode())
    about = {"name": name, "n": len(ids), "side": side, "content": hasher.hexdigest(), "warnings": warnings, "counts": counts}
    (folder / "source.json").write_text(json.dumps(about, sort_keys=True))
    (folder / "pixels.txt").write_text("\n".join(hashes) + "\n")
