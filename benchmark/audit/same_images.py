"""Which rows show the same image file, and which of those images have captions that differ."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from benchmark.audit.suspects import Suspect, suspect
from benchmark.data.image import read_ref
from benchmark.errors import BenchError
from benchmark.progress import Progress
from benchmark.suspicion.words import words_of

_BLOCK = 4096
_COMPARED = 20


def same_images(refs: Sequence[str], progress: Progress) -> tuple[NDArray[np.int64], list[int]]:
    """A number for each row's image (n,), equal for equal bytes of the file, and rows whose file cannot be read.

    Rows with one reference are the same without a look; the rest by a 64-bit hash of the bytes.
    """
    hashes = np.zeros(len(refs), dtype=np.uint64)
    broken: list[int] = []
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool, progress.bar("comparing image files", len(refs), "images") as advance:
        for begin in range(0, len(refs), _BLOCK):
            for row, found in enumerate(pool.map(_hash, refs[begin : begin + _BLOCK]), begin):
                if found is None:
                    broken.append(row)
                hashes[row] = row if found is None else found
            advance(min(_BLOCK, len(refs) - begin))
    numbers = np.unique(hashes, return_inverse=True)[1].astype(np.int64)
    numbers[broken] = -1 - np.arange(len(broken))
    return numbers, broken


def repeated_images(captions: Sequence[str], images: NDArray[np.int64], hashes: NDArray[np.uint64]) -> Iterator[Suspect]:
    """Images with several different captions, the most captions first; of equal numbers those that share fewest words."""
    order = np.argsort(images, kind="stable")
    _, begins, counts = np.unique(images[order], return_index=True, return_counts=True)
    found = []
    for begin, count in zip(begins[counts > 1].tolist(), counts[counts > 1].tolist(), strict=True):
        rows = np.sort(order[begin : begin + count])
        n = len(np.unique(hashes[rows]))
        if n > 1:
            found.append((n - _overlap([captions[row] for row in rows[:_COMPARED].tolist()]), rows, n))
    for score, rows, n in sorted(found, key=lambda one: (-one[0], one[1][0])):
        yield suspect("repeated_image", captions[rows[0]], f"one image with {n} different captions", score, rows, images, hashes)


def _hash(ref: str) -> int | None:
    try:
        return int.from_bytes(hashlib.blake2b(read_ref(ref), digest_size=8).digest(), "little")
    except BenchError:
        return None


def _overlap(captions: Sequence[str]) -> float:
    """Mean share of words that two captions have in common, over those of all of them together: from 0 to 1."""
    sets = [set(words_of(caption)) for caption in captions]
    pairs = [(left, right) for index, left in enumerate(sets) for right in sets[:index]]
    shares = [len(left & right) / len(left | right) if left | right else 1.0 for left, right in pairs]
    return sum(shares) / len(shares) if shares else 1.0
