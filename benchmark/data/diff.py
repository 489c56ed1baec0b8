"""What differs between two sets of pairs: rows, captions, images."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from benchmark.data.image import pixels_sha256
from benchmark.data.look import compare_images
from benchmark.data.opened import Opened
from benchmark.errors import BenchError
from benchmark.progress import Progress

KINDS = ("removed", "added", "caption", "re-encoded", "replaced", "broken")
SIDE = 224
_BLOCK = 1024
Advance = Callable[..., None]
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Difference:
    """One difference.

    Attributes:
        kind: one of KINDS; `broken` for an image that cannot be read.
        row: the id, or the image as written where ids do not count.
        row_a, row_b: row numbers from 1; None where there is no such row.
        before, after: captions, or images as written; for `broken`, what is wrong.
    """

    kind: str
    row: str
    row_a: int | None
    row_b: int | None
    before: str
    after: str


@dataclass(frozen=True)
class Compared:
    """Two sets side by side. `by` says how rows were matched: `id` or `content`."""

    n_a: int
    n_b: int
    n_same: int
    by: str
    differences: list[Difference]

    def counts(self) -> dict[str, int]:
        """How many differences of each kind."""
        found = Counter(one.kind for one in self.differences)
        return {kind: found[kind] for kind in KINDS}


def compare(a: Opened, b: Opened, progress: Progress) -> Compared:
    """What differs between two sets.

    Rows are matched by id where ids stand in both. Otherwise by content: first rows whose image and caption are equal, then
    rows of one id (written or, as reading gives it, made of path and caption), of one image path but for its ending, of
    equal pixels, of one caption; what is left was added or removed. Images are looked at after
    the geometry of whichever set says what it is, or at 224 pixels.

    Raises:
        BenchError: images whose geometries do not fit together, or rows of a table that cannot be read.
    """
    for one in (a, b):
        if one.broken:
            row, problem = one.broken[0]
            raise BenchError(f"{one.path} row {row}: {problem}{f', and {len(one.broken) - 1} more such rows' if len(one.broken) > 1 else ''}")
    side = a.side or b.side or SIDE
    matching = _Matching(a, b, side, progress)
    ids = a.ids is not None and b.ids is not None
    pairs = matching.by_id() if ids else matching.by_content()
    differences = [Difference("removed", a.name(row, ids), row + 1, None, a.captions[row], "") for row in matching.rest_a]
    differences += [Difference("added", b.name(row, ids), None, row + 1, "", b.captions[row]) for row in matching.rest_b]
    n_same = matching.n_same
    with progress.bar("comparing images", len(pairs), "pairs") as advance:
        for (row_a, row_b), image in zip(pairs, _mapped(partial(_compare_pair, a, b, side), pairs, advance), strict=True):
            name = a.name(row_a, ids)
            changed = a.captions[row_a] != b.captions[row_b]
            if changed:
                differences.append(Difference("caption", name, row_a + 1, row_b + 1, a.captions[row_a], b.captions[row_b]))
            if image is not None:
                kind, before, after = image
                differences.append(Difference(kind, name, row_a + 1, row_b + 1, before, after))
            n_same += not changed and image is None
    differences.sort(key=lambda one: (KINDS.index(one.kind), one.row_a or 0, one.row_b or 0))
    return Compared(len(a), len(b), n_same, "id" if ids else "content", differences)


class _Matching:
    """Which rows of two sets stand for each other; every step takes matched rows off the rest."""

    def __init__(self, a: Opened, b: Opened, side: int, progress: Progress) -> None:
        self.a, self.b, self.side, self.progress = a, b, side, progress
        self.rest_a, self.rest_b = list(range(len(a))), list(range(len(b)))
        self.n_same = 0

    def by_id(self) -> list[tuple[int, int]]:
        """Pairs of rows with one id."""
        assert self.a.ids is not None
        assert self.b.ids is not None
        return self._match(self.a.ids.__getitem__, self.b.ids.__getitem__)

    def by_content(self) -> list[tuple[int, int]]:
        """Pairs of rows that differ in something; rows that do not are counted in `n_same`."""
        a, b = self.a, self.b
        self.n_same += len(self._match(lambda row: (a.place(row), a.captions[row]), lambda row: (b.place(row), b.captions[row])))
        seen_a, seen_b = self._hashes(a, self.rest_a), self._hashes(b, self.rest_b)
        self.n_same += len(self._match(lambda row: (seen_a[row], a.captions[row]), lambda row: (seen_b[row], b.captions[row])))
        names_a, names_b = a.names(), b.names()
        pairs = self._match(names_a.__getitem__, names_b.__getitem__)
        pairs += self._match(lambda row: _stem(a.images[row]), lambda row: _stem(b.images[row]))
        pairs += self._match(seen_a.__getitem__, seen_b.__getitem__)
        return pairs + self._match(a.captions.__getitem__, b.captions.__getitem__, alone=True)

    def _match(self, key_a: Callable[[int], Hashable], key_b: Callable[[int], Hashable], alone: bool = False) -> list[tuple[int, int]]:
        """Pairs of rows with one key, in order; with `alone`, only where one row of each set has it."""
        waiting: dict[Hashable, list[int]] = defaultdict(list)
        for row in self.rest_b:
            waiting[key_b(row)].append(row)
        n_a = Counter(map(key_a, self.rest_a)) if alone else Counter()
        pairs, taken, rest = [], set(), []
        for row in self.rest_a:
            key = key_a(row)
            there = waiting.get(key, [])
            if there and not (alone and (len(there) > 1 or n_a[key] > 1)):
                other = there.pop(0)
                pairs.append((row, other))
                taken.add(other)
            else:
                rest.append(row)
        self.rest_a, self.rest_b = rest, [row for row in self.rest_b if row not in taken]
        return pairs

    def _hashes(self, one: Opened, rows: Sequence[int]) -> dict[int, str]:
        with self.progress.bar(f"looking at {one.path.name}", len(rows), "images") as advance:
            return dict(zip(rows, _mapped(partial(_hash, one, self.side), rows, advance), strict=True))


def _stem(path: str) -> str:
    """A path without its ending: an image encoded anew may have another."""
    folder, _, name = path.rpartition("/")
    return f"{folder}/{os.path.splitext(name)[0]}"


def _hash(one: Opened, side: int, row: int) -> str:
    try:
        return pixels_sha256(one.pixels(row, side))
    except BenchError:
        return f"{one.path} {row}: broken"


def _compare_pair(a: Opened, b: Opened, side: int, pair: tuple[int, int]) -> tuple[str, str, str] | None:
    """Kind, before and after, where the images of two rows differ."""
    row_a, row_b = pair
    if a.place(row_a) == b.place(row_b):
        return None
    broken: list[str] = []
    images = []
    for one, row in ((a, row_a), (b, row_b)):
        try:
            images.append(one.pixels(row, side))
            broken.append("")
        except BenchError as error:
            broken.append(str(error))
    if len(images) < 2:
        return "broken", broken[0], broken[1]
    change = compare_images(*images)
    return None if change == "same" else (change, a.images[row_a], b.images[row_b])


def _mapped(function: Callable[[T], R], values: Sequence[T], advance: Advance) -> Iterator[R]:
    """The function's values in order, from all cores."""
    if values:
        with ThreadPoolExecutor(os.cpu_count() or 1) as workers:
            for begin in range(0, len(values), _BLOCK):
                block = values[begin : begin + _BLOCK]
                yield from workers.map(function, block)
                advance(len(block))
