"""Suspects that captions give away: one caption on many images, and runs of words that stand together more often than they should."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmark.audit.suspects import Suspect, suspect
from benchmark.progress import Progress
from benchmark.suspicion.words import words_of

ORDERS = (2, 3, 4, 5)
MIN_ROWS = 3
_MIX = np.uint64(0x9E3779B97F4A7C15)
_SHOWN_WORDS = 160
_SMOOTHING = 1.0
_SAME_ROWS = 0.8


@dataclass(frozen=True)
class Corpus:
    """Captions as numbers.

    Attributes:
        words: by number; number 0 stands between captions.
        flat: int32, 0, then for each caption its words and a 0.
        starts: int64 (n + 1,), where each caption's words begin in `flat`; caption i ends at starts[i + 1] - 1.
        hashes: uint64 (n,), of captions without case and extra blanks.
    """

    words: tuple[str, ...]
    flat: NDArray[np.int32]
    starts: NDArray[np.int64]
    hashes: NDArray[np.uint64]

    def row_of(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which caption a place in `flat` belongs to."""
        return np.searchsorted(self.starts, positions, side="right") - 1


def corpus(captions: Sequence[str], progress: Progress) -> Corpus:
    """Reads all captions once."""
    numbers: dict[str, int] = {"": 0}
    parts: list[NDArray[np.int32]] = [np.zeros(1, dtype=np.int32)]
    lengths = np.empty(len(captions), dtype=np.int64)
    hashes = np.empty(len(captions), dtype=np.uint64)
    with progress.bar("reading captions", len(captions), "rows") as advance:
        for begin in range(0, len(captions), 8192):
            flat: list[int] = []
            for row, caption in enumerate(captions[begin : begin + 8192], begin):
                words = words_of(caption)
                flat += [numbers.setdefault(word, len(numbers)) for word in words]
                flat.append(0)
                lengths[row] = len(words) + 1
                hashes[row] = caption_hash(caption)
            parts.append(np.array(flat, dtype=np.int32))
            advance(min(8192, len(captions) - begin))
    starts = np.concatenate([[1], 1 + np.cumsum(lengths)])
    return Corpus(tuple(numbers), np.concatenate(parts), starts, hashes)


def caption_hash(caption: str) -> int:
    """64 bits of a caption without case and extra blanks."""
    return int.from_bytes(hashlib.blake2b(" ".join(caption.lower().split()).encode(), digest_size=8).digest(), "little")


def repeated_captions(captions: Sequence[str], read: Corpus, images: NDArray[np.int64]) -> Iterator[Suspect]:
    """Captions on several different images, the most surprising first.

    The surprise compares the images of a caption with how many a bigram model expects that knows all captions but its copies:
    short captions repeat by themselves, long ones do not.
    """
    order = np.argsort(read.hashes, kind="stable")
    _, begins, counts = np.unique(read.hashes[order], return_index=True, return_counts=True)
    often = np.flatnonzero(counts >= MIN_ROWS)
    often = often[np.argsort(-counts[often], kind="stable")]
    groups = [np.sort(order[begins[one] : begins[one] + counts[one]]) for one in often]
    groups = [rows for rows in groups if read.starts[rows[0] + 1] - read.starts[rows[0]] > 1 and len(np.unique(images[rows])) >= MIN_ROWS]
    expected = _expected_captions(read, groups)
    found = []
    for rows, usual in zip(groups, expected, strict=True):
        n = len(np.unique(images[rows]))
        found.append((float(surprise(n, usual)), rows, n, usual))
    for score, rows, n, usual in sorted(found, key=lambda one: (-one[0], one[1][0])):
        if score > 0:
            yield suspect("repeated_caption", captions[rows[0]], f"one caption on {n} different images; about {usual:.2g} expected", score, rows, images, read.hashes)


def ngrams(read: Corpus, images: NDArray[np.int64], n_wanted: int) -> list[Suspect]:
    """Runs of two to five words that stand together more often than their parts let one expect, the most surprising first.

    A run counts as expected if its first words, its last words and what they share explain it (a Markov model of one order
    less). Of runs that stand in the same captions the most surprising is kept; of two that share a word also where one stands mostly
    in captions of the other, as a part of a phrase does.
    """
    codes: dict[int, NDArray[np.uint64]] = {0: np.zeros(len(read.flat), dtype=np.uint64), 1: read.flat.astype(np.uint64)}
    known: dict[int, tuple[NDArray[np.uint64], NDArray[np.int64]]] = {}
    n_words = int((read.flat > 0).sum())
    found: list[tuple[float, int, int, int, float]] = []
    for order in (1, *ORDERS):
        if order > 1:
            codes[order] = _longer(codes[order - 1], read.flat, order)
        values, firsts, counts = np.unique(codes[order], return_index=True, return_counts=True)
        known[order] = values, counts
        if order == 1:
            continue
        some = np.flatnonzero((counts >= MIN_ROWS) & (values != 0))
        head = _count(known[order - 1], codes[order - 1][firsts[some]])
        tail = _count(known[order - 1], codes[order - 1][firsts[some] + 1])
        shared = np.full(len(some), n_words) if order == 2 else _count(known[order - 2], codes[order - 2][firsts[some] + 1])
        usual = head * tail / shared
        scores = surprise(counts[some].astype(np.float64), usual)
        best = np.argsort(-scores, kind="stable")[: 20 * n_wanted]
        found += [(float(scores[one]), order, int(some[one]), int(firsts[some[one]]), float(usual[one])) for one in best]
    return _unlike(read, codes, known, sorted(found, key=lambda one: (-one[0], one[1], one[3])), images, n_wanted)


def surprise(n: NDArray[np.float64] | float, expected: NDArray[np.float64] | float) -> NDArray[np.float64]:
    """How unlikely n or more are where a Poisson law expects fewer, in nats: n ln(n / expected) - (n - expected); 0 where n is less."""
    n, expected = np.asarray(n, dtype=np.float64), np.maximum(np.asarray(expected, dtype=np.float64), 1e-12)
    return np.where(n > expected, n * np.log(np.maximum(n, 1e-12) / expected) - (n - expected), 0.0)


def _longer(codes: NDArray[np.uint64], flat: NDArray[np.int32], order: int) -> NDArray[np.uint64]:
    """Codes of runs of this order that begin at each place; 0 where a run would leave its caption."""
    out = np.zeros_like(codes)
    last = flat[order - 1 :]
    n = len(last)
    with np.errstate(over="ignore"):
        mixed = (codes[:n] ^ (codes[:n] >> np.uint64(29))) * _MIX + last.astype(np.uint64) * np.uint64(0xBF58476D1CE4E5B9) + np.uint64(order)
    out[:n] = np.where((codes[:n] != 0) & (last != 0), np.where(mixed == 0, np.uint64(1), mixed), np.uint64(0))
    return out


def _count(known: tuple[NDArray[np.uint64], NDArray[np.int64]], codes: NDArray[np.uint64]) -> NDArray[np.int64]:
    values, counts = known
    return np.asarray(counts[np.searchsorted(values, codes)], dtype=np.int64)


def _unlike(
    read: Corpus,
    codes: dict[int, NDArray[np.uint64]],
    known: dict[int, tuple[NDArray[np.uint64], NDArray[np.int64]]],
    found: list[tuple[float, int, int, int, float]],
    images: NDArray[np.int64],
    n_wanted: int,
) -> list[Suspect]:
    """The first ones that do not stand in the rows of an earlier one."""
    chosen: list[Suspect] = []
    taken: list[tuple[NDArray[np.int64], set[int]]] = []
    for score, order, _, first, usual in found:
        if score <= 0 or len(chosen) == n_wanted:
            break
        positions = np.flatnonzero(codes[order] == codes[order][first])
        rows = np.unique(read.row_of(positions))
        run = read.flat[first : first + order].tolist()
        if any(_same(rows, other, not shared.isdisjoint(run)) for other, shared in taken):
            continue
        taken.append((rows, set(run)))
        words = " ".join(read.words[number] for number in run)
        reason = f"these words stand together {len(positions)} times; about {usual:.2g} expected"
        chosen.append(suspect("ngram", words[:_SHOWN_WORDS], reason, score, rows, images, read.hashes))
    return chosen


def _same(rows: NDArray[np.int64], other: NDArray[np.int64], overlap: bool) -> bool:
    """Whether two runs stand in the same captions; of runs that share a word one may stand in a part of the other's."""
    whole = min(len(rows), len(other)) if overlap else max(len(rows), len(other))
    return len(np.intersect1d(rows, other, assume_unique=True)) >= _SAME_ROWS * whole


def _expected_captions(read: Corpus, groups: Sequence[NDArray[np.int64]]) -> list[float]:
    """For each group of copies how often a bigram model of all other captions expects the caption among as many captions."""
    pairs = read.flat[:-1].astype(np.uint64) * np.uint64(len(read.words)) + read.flat[1:].astype(np.uint64)
    values, counts = np.unique(pairs, return_counts=True)
    singles = np.bincount(read.flat, minlength=len(read.words)).astype(np.float64)
    n_words = float(len(read.flat))
    found = []
    for rows in groups:
        begin, end = read.starts[rows[0]], read.starts[rows[0] + 1]
        run = read.flat[begin - 1 : end]
        steps = pairs[begin - 1 : end - 1]
        together = counts[np.searchsorted(values, steps)] - len(rows) * np.array([(steps == step).sum() for step in steps])
        before = singles[run[:-1]] - len(rows) * np.array([(run[:-1] == one).sum() for one in run[:-1]])
        chance = (together + _SMOOTHING * singles[run[1:]] / n_words) / (before + _SMOOTHING)
        found.append(float(np.exp(np.log(np.maximum(chance, 1e-12)).sum()) * len(read.hashes)))
    return found
