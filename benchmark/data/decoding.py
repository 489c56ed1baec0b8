"""Decodes many images into one file, of pixels or of the files' own bytes, on all cores, and continues where it was interrupted."""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmark.data.image import decode_bytes, decode_ref, pixels_sha256, read_ref, ref_size
from benchmark.errors import BenchError
from benchmark.progress import Progress

Codec = Literal["pixels", "bytes"]
FILES: dict[Codec, str] = {"pixels": "images.u8", "bytes": "images.bytes"}
_LOG = "decoded.jsonl"
_TASK_BYTES = 1 << 22
_BLOCK_BYTES = 1 << 25


@dataclass
class Decoded:
    """What has been written so far, in order.

    Attributes:
        end: rows that have been looked at.
        hashes: pixels' SHA-256 of each row that was written.
        sizes: bytes of each row that was written.
        broken: rows that were not, and why.
    """

    end: int = 0
    hashes: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    broken: list[tuple[int, str]] = field(default_factory=list)


def check_room(folder: Path, refs: Sequence[str], side: int, codec: Codec, progress: Progress) -> None:
    """Says how much disk the images take, and refuses if there is no room for what is missing of it.

    Raises:
        BenchError: not enough free space.
    """
    n = len(refs)
    needed = n * side * side * 3 if codec == "pixels" else sum(map(ref_size, refs))
    path = folder / FILES[codec]
    written = path.stat().st_size if path.is_file() else 0
    what = f"{n:,} images at {side}x{side} pixels take" if codec == "pixels" else f"{n:,} image files take"
    again = ", and as much again for each poisoned data set" if codec == "pixels" else ""
    progress.say(f"{what} {_gigabytes(needed)} in {folder.parent}{again}")
    free = shutil.disk_usage(folder).free
    if needed - written > free:
        other = "smaller images with --set data.side, or their own bytes with --set pack.codec=bytes" if codec == "pixels" else "fewer pairs"
        raise BenchError(f"{what} {_gigabytes(needed)}, and {_gigabytes(free)} are free at {folder.parent}; choose another folder with --cache, or {other}")


def decode_all(folder: Path, refs: Sequence[str], side: int, refuse: Callable[[Decoded], None], progress: Progress, codec: Codec = "pixels", workers: int | None = None) -> Decoded:
    """Writes all images that can be decoded, one after another: pixels to `images.u8`, or files as they are to `images.bytes` with `offsets.npy`.

    Every few thousand images what has been done is put down, and a second call continues from there.

    Args:
        refs: paths or places in shards, as `decode_ref` takes them.
        refuse: called when an image is broken; raises if the work should not go on.
        workers: threads; decoding releases Python's lock. Default: one for each core.
    """
    per_image = side * side * 3
    done, log_bytes = _continued(folder, len(refs), codec)
    if done.broken:
        refuse(done)
    task = max(1, min(64, _TASK_BYTES // per_image))
    per_block = max(task, _BLOCK_BYTES // per_image)
    n_workers = workers or len(os.sched_getaffinity(0))
    with (
        open(folder / FILES[codec], "ab") as images,
        open(folder / _LOG, "ab") as log,
        ThreadPoolExecutor(n_workers) as pool,
        progress.bar("decoding images", len(refs), "images") as advance,
    ):
        images.truncate(sum(done.sizes))
        log.truncate(log_bytes)
        advance(done.end)
        mark = (done.end, len(done.hashes), len(done.broken))
        begins = range(done.end, len(refs), task)
        try:
            for begin, results in zip(begins, _ahead(pool, partial(_decode_some, side, codec), (refs[begin : begin + task] for begin in begins), 2 * n_workers), strict=True):
                for row, (content, fact) in enumerate(results, start=begin):
                    if content is None:
                        done.broken.append((row, fact))
                        refuse(done)
                    else:
                        images.write(content)
                        done.hashes.append(fact)
                        done.sizes.append(len(content))
                done.end = begin + len(results)
                advance(len(results))
                if done.end - mark[0] >= per_block or done.end == len(refs):
                    _put_down(images, log, done, mark)
                    mark = (done.end, len(done.hashes), len(done.broken))
        finally:
            pool.shutdown(cancel_futures=True)
    if codec == "bytes":
        np.save(folder / "offsets.npy", np.cumsum([0, *done.sizes], dtype=np.int64))
    (folder / _LOG).unlink()
    return done


def _decode_some(side: int, codec: Codec, refs: Sequence[str]) -> list[tuple[bytes | None, str]]:
    """What is kept of each image, and its pixels' SHA-256; None and the reason where it cannot be decoded."""
    results: list[tuple[bytes | None, str]] = []
    for ref in refs:
        try:
            if codec == "bytes":
                raw = read_ref(ref)
                results.append((raw, pixels_sha256(decode_bytes(raw, ref, side))))
            else:
                image = decode_ref(ref, side)
                results.append((image.tobytes(), pixels_sha256(image)))
        except BenchError as error:
            results.append((None, str(error)))
    return results


def _ahead(pool: ThreadPoolExecutor, call: Callable[[Any], Any], given: Iterator[Any], n: int) -> Iterator[Any]:
    """Results in order, with no more than `n` calls under way, so that memory stays bounded."""
    waiting: deque[Future[Any]] = deque()
    for one in given:
        waiting.append(pool.submit(call, one))
        if len(waiting) >= n:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _put_down(images: Any, log: Any, done: Decoded, mark: tuple[int, int, int]) -> None:
    """Images first, then the line that says so, each on the disk before the next."""
    line = {"end": done.end, "hashes": done.hashes[mark[1] :], "sizes": done.sizes[mark[1] :], "broken": done.broken[mark[2] :]}
    for file, content in ((images, b""), (log, json.dumps(line).encode() + b"\n")):
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _continued(folder: Path, n: int, codec: Codec) -> tuple[Decoded, int]:
    """What an interrupted run put down, and how many bytes of the log say so."""
    done, used, total = Decoded(), 0, 0
    if not (folder / _LOG).is_file() or not (folder / FILES[codec]).is_file():
        return done, used
    there = (folder / FILES[codec]).stat().st_size
    with open(folder / _LOG, "rb") as log:
        for raw in log:
            try:
                line = json.loads(raw)
                end, hashes, sizes, broken = int(line["end"]), list(line["hashes"]), list(line["sizes"]), [(int(row), str(problem)) for row, problem in line["broken"]]
            except (ValueError, KeyError, TypeError):
                break
            total += sum(sizes)
            if end > n or total > there:
                break
            done.end = end
            done.hashes += hashes
            done.sizes += sizes
            done.broken += broken
            used += len(raw)
    return done, used


def _gigabytes(n: int) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e8 else f"{n / 1e6:.1f} MB"
