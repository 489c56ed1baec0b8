"""Decodes many images into one file of pixels, on all cores, and continues where an interrupted run stopped."""

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
from typing import Any

from benchmark.data.image import decode_ref, pixels_sha256
from benchmark.errors import BenchError
from benchmark.progress import Progress

PIXELS = "images.u8"
_LOG = "decoded.jsonl"
_TASK_BYTES = 1 << 22
_BLOCK_BYTES = 1 << 25


@dataclass
class Decoded:
    """What has been written so far, in order.

    Attributes:
        end: rows that have been looked at.
        hashes: pixels' SHA-256 of each row that was written.
        broken: rows that were not, and why.
    """

    end: int = 0
    hashes: list[str] = field(default_factory=list)
    broken: list[tuple[int, str]] = field(default_factory=list)


def check_room(folder: Path, n: int, side: int, progress: Progress) -> None:
    """Says how much disk the pixels of `n` images take, and refuses if there is no room for what is missing of it.

    Raises:
        BenchError: not enough free space.
    """
    needed = n * side * side * 3
    written = (folder / PIXELS).stat().st_size if (folder / PIXELS).is_file() else 0
    progress.say(f"{n:,} images at {side}x{side} pixels take {_gigabytes(needed)} in {folder.parent}, and as much again for each poisoned data set")
    free = shutil.disk_usage(folder).free
    if needed - written > free:
        raise BenchError(
            f"{n:,} images at {side}x{side} pixels take {_gigabytes(needed)}, and {_gigabytes(free)} are free at {folder.parent};"
            " choose another folder with --cache, or smaller images with --set data.side"
        )


def decode_all(folder: Path, refs: Sequence[str], side: int, refuse: Callable[[Decoded], None], progress: Progress, workers: int | None = None) -> Decoded:
    """Writes the pixels of all images that can be decoded, one after another, to `images.u8` in `folder`.

    Every few thousand images what has been done is put down, and a second call continues from there.

    Args:
        refs: paths or places in shards, as `decode_ref` takes them.
        refuse: called when an image is broken; raises if the work should not go on.
        workers: threads; decoding releases Python's lock. Default: one for each core.
    """
    per_image = side * side * 3
    done, log_bytes = _continued(folder, len(refs), per_image)
    if done.broken:
        refuse(done)
    task = max(1, min(64, _TASK_BYTES // per_image))
    per_block = max(task, _BLOCK_BYTES // per_image)
    n_workers = workers or len(os.sched_getaffinity(0))
    with (
        open(folder / PIXELS, "ab") as pixels,
        open(folder / _LOG, "ab") as log,
        ThreadPoolExecutor(n_workers) as pool,
        progress.bar("decoding images", len(refs), "images") as advance,
    ):
        pixels.truncate(len(done.hashes) * per_image)
        log.truncate(log_bytes)
        advance(done.end)
        mark = (done.end, len(done.hashes), len(done.broken))
        begins = range(done.end, len(refs), task)
        try:
            for begin, results in zip(begins, _ahead(pool, partial(_decode_some, side), (refs[begin : begin + task] for begin in begins), 2 * n_workers), strict=True):
                for row, (content, fact) in enumerate(results, start=begin):
                    if content is None:
                        done.broken.append((row, fact))
                        refuse(done)
                    else:
                        pixels.write(content)
                        done.hashes.append(fact)
                done.end = begin + len(results)
                advance(len(results))
                if done.end - mark[0] >= per_block or done.end == len(refs):
                    _put_down(pixels, log, done, mark)
                    mark = (done.end, len(done.hashes), len(done.broken))
        finally:
            pool.shutdown(cancel_futures=True)
    (folder / _LOG).unlink()
    return done


def _decode_some(side: int, refs: Sequence[str]) -> list[tuple[bytes | None, str]]:
    """Pixels and their SHA-256 of each image; None and the reason where there are none."""
    results: list[tuple[bytes | None, str]] = []
    for ref in refs:
        try:
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


def _put_down(pixels: Any, log: Any, done: Decoded, mark: tuple[int, int, int]) -> None:
    """Pixels first, then the line that says so, each on the disk before the next."""
    line = {"end": done.end, "hashes": done.hashes[mark[1] :], "broken": done.broken[mark[2] :]}
    for file, content in ((pixels, b""), (log, json.dumps(line).encode() + b"\n")):
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _continued(folder: Path, n: int, per_image: int) -> tuple[Decoded, int]:
    """What an interrupted run put down, and how many bytes of the log say so."""
    done, used = Decoded(), 0
    if not (folder / _LOG).is_file() or not (folder / PIXELS).is_file():
        return done, used
    there = (folder / PIXELS).stat().st_size
    with open(folder / _LOG, "rb") as log:
        for raw in log:
            try:
                line = json.loads(raw)
                end, hashes, broken = int(line["end"]), list(line["hashes"]), [(int(row), str(problem)) for row, problem in line["broken"]]
            except (ValueError, KeyError, TypeError):
                break
            if end > n or (len(done.hashes) + len(hashes)) * per_image > there:
                break
            done.end = end
            done.hashes += hashes
            done.broken += broken
            used += len(raw)
    return done, used


def _gigabytes(n: int) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e8 else f"{n / 1e6:.1f} MB"
