"""Where images lie: decoded pixels in one file, original bytes that are decoded when asked for, and rows of both."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from benchmark.data.image import decode_bytes

Rows = NDArray[np.int64]


class Images(Protocol):
    """Images uint8 (n, S, S, 3) that are indexed like an array; indexing may read and decode files."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, S, S, 3)."""

    def __len__(self) -> int:
        """The number of images."""

    def __getitem__(self, rows: int | slice | Rows, /) -> NDArray[np.uint8]:
        """One image (S, S, 3), or several (k, S, S, 3)."""


class EncodedImages:
    """Images kept as the bytes of their files, one after another, and decoded on all cores when they are asked for.

    Decoding releases Python's lock, so threads are enough and nothing is copied between processes.
    """

    def __init__(self, folder: Path, side: int) -> None:
        """`folder` holds `images.bytes` and `offsets.npy`, int64 (n + 1)."""
        self.folder, self.side = folder, side
        self.offsets: NDArray[np.int64] = np.load(folder / "offsets.npy", mmap_mode="r", allow_pickle=False)
        self.shape = (len(self.offsets) - 1, side, side, 3)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: int | slice | Rows, /) -> NDArray[np.uint8]:
        if isinstance(rows, int | np.integer):
            return self._decode(range(len(self))[rows])
        wanted = np.arange(len(self))[rows].tolist()
        if not wanted:
            return np.zeros((0, *self.shape[1:]), dtype=np.uint8)
        return np.stack(list(self._workers.map(self._decode, wanted)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self[:], dtype=dtype)

    def encoded(self, row: int) -> bytes:
        """The bytes of a row's file."""
        begin, end = int(self.offsets[row]), int(self.offsets[row + 1])
        return bytes(self._bytes[begin:end])

    @cached_property
    def _bytes(self) -> NDArray[np.uint8]:
        return np.memmap(self.folder / "images.bytes", dtype=np.uint8, mode="r")

    @cached_property
    def _workers(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(os.cpu_count() or 1)

    def _decode(self, row: int) -> NDArray[np.uint8]:
        return decode_bytes(self.encoded(row), f"image {row} of {self.folder}", self.side)


class PickedImages:
    """Rows of other images in an order of their own, some of them from a second place."""

    def __init__(self, base: Images, places: Rows, over: Images | None = None) -> None:
        """`places` (n,): row p of `base` as p, row q of `over` as -1 - q."""
        self.base, self.places, self.over = base, places, over
        self.shape = (len(places), *base.shape[1:])

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, rows: int | slice | Rows, /) -> NDArray[np.uint8]:
        if isinstance(rows, int | np.integer):
            place = int(self.places[rows])
            return np.array(self.base[place] if place >= 0 else self._over[-1 - place])
        places = self.places[rows]
        own = places >= 0
        out = np.empty((len(places), *self.shape[1:]), dtype=np.uint8)
        if own.any():
            out[own] = self.base[places[own]]
        if not own.all():
            out[~own] = self._over[-1 - places[~own]]
        return out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self[:], dtype=dtype)

    @property
    def _over(self) -> Images:
        assert self.over is not None
        return self.over


class Veiled:
    """Images of which only the pixels can be had: which file a row comes from tells whether an attack wrote it."""

    __slots__ = ("_read", "resident", "shape")

    def __init__(self, images: Images) -> None:
        self.shape, self.resident = images.shape, resident(images)
        self._read: Callable[[Any], NDArray[np.uint8]] = lambda rows: images[rows]

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, rows: int | slice | Rows, /) -> NDArray[np.uint8]:
        return self._read(rows)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self[:], dtype=dtype)


def resident(images: Images) -> bool:
    """Whether the pixels lie decoded on disk or in memory, so that all of them may be loaded at once."""
    if isinstance(images, Veiled):
        return images.resident
    if isinstance(images, PickedImages):
        return resident(images.base) and (images.over is None or resident(images.over))
    return not isinstance(images, EncodedImages)


def write_encoded(folder: Path, files: Iterable[bytes]) -> int:
    """Writes the files of `EncodedImages` and returns how many there are."""
    offsets = [0]
    with open(folder / "images.bytes", "wb") as out:
        for content in files:
            out.write(content)
            offsets.append(offsets[-1] + len(content))
    np.save(folder / "offsets.npy", np.array(offsets, dtype=np.int64))
    return len(offsets) - 1


def open_images(folder: Path, n: int, side: int) -> Images:
    """The images of a finished stage, in whichever form they were written."""
    if (folder / "offsets.npy").is_file():
        return EncodedImages(folder, side)
    if n == 0:
        return np.zeros((0, side, side, 3), dtype=np.uint8)
    return np.memmap(folder / "images.u8", dtype=np.uint8, mode="r", shape=(n, side, side, 3))


def in_blocks(images: Images, size: int = 1024) -> Iterable[NDArray[np.uint8]]:
    """All images, some at a time."""
    for begin in range(0, len(images), size):
        yield np.asarray(images[begin : begin + size])


def pick(images: Images, rows: Rows) -> Images:
    """Some of the images, in this order; nothing is read yet."""
    return PickedImages(images, rows)
