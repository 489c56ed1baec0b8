"""Objects with masks and empty backgrounds, for attacks that compose images: of the drawn world, or from the user's folders."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from benchmark.data import world
from benchmark.data.image import decode_whole
from benchmark.data.pairs import Pairs
from benchmark.errors import BenchError, unknown
from benchmark.stages import file_sha256

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif")
MASK = ".mask.png"
MAX_FILES = 20_000
# A drawn object is drawn larger than the images of a small world, as photographs are, and shrinks in the composition.
LEAST_DRAWN_SIDE = 128


@dataclass(frozen=True)
class Cutout:
    """One object: uint8 (h, w, 3) and a mask uint8 (h, w), 255 where the object is; both cut to the mask's bounding box."""

    image: NDArray[np.uint8]
    mask: NDArray[np.uint8]


T = TypeVar("T")


@dataclass(frozen=True)
class Shelf(Generic[T]):
    """Things that are read when they are asked for, by id."""

    ids: list[str]
    read: Callable[[str], T]

    def __len__(self) -> int:
        return len(self.ids)


def drawn_objects(pairs: Pairs, rows: Iterable[int], classname: str) -> Shelf[Cutout]:
    """The drawn objects of a class (or of a colour, or on a background) among these rows, with exact masks."""
    refs = {pairs.ids[row]: pairs.refs[row] for row in rows if any(values[row] == classname for values in pairs.tags.values())}

    def read(row_id: str) -> Cutout:
        drawing = _drawn(refs[row_id], pairs.side)
        return cut(drawing.image, drawing.mask, row_id)

    return Shelf(list(refs), read)


def drawn_backgrounds(pairs: Pairs, rows: Iterable[int]) -> Shelf[NDArray[np.uint8]]:
    """The papers of these drawn rows, without the object that lies on them."""
    refs = {pairs.ids[row]: pairs.refs[row] for row in rows}
    return Shelf(list(refs), lambda row_id: _drawn(refs[row_id], pairs.side).background)


def is_drawn(pairs: Pairs) -> bool:
    """Whether these pairs can be drawn again, with masks."""
    return bool(len(pairs)) and pairs.refs[0].startswith("world:")


def objects_in(folder: Path, classname: str) -> Shelf[Cutout]:
    """The objects in `folder/CLASS`: each `NAME.mask.png`, white on black, with the image `NAME.jpg` (.png, .webp) beside it.

    Of a mask in several pieces, the largest counts.

    Raises:
        BenchError: no folder of the class, a mask without an image, no mask at all.
    """
    place = folder / classname
    if not place.is_dir():
        found = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
        raise unknown("class of objects", classname, found) if found else BenchError(f"{folder} has no folder {classname} with images and masks of that class")
    masks = sorted(path for path in place.iterdir() if path.name.lower().endswith(MASK))
    images: dict[str, tuple[Path, Path]] = {}
    for mask in masks:
        stem = mask.name[: -len(MASK)]
        beside = [path for suffix in SUFFIXES if (path := mask.with_name(stem + suffix)).is_file()]
        if not beside:
            raise BenchError(f"{mask} has no image beside it; expected {stem}.jpg, .png or .webp")
        images[f"{classname}/{stem}"] = (beside[0], mask)
    if not images:
        raise BenchError(f"{place} holds no masks; for an image NAME.jpg, NAME{MASK} is white where the object is")

    def read(name: str) -> Cutout:
        image, mask = (decode_whole(path) for path in images[name])
        if image.shape != mask.shape:
            raise BenchError(f"{images[name][1]} is {mask.shape[1]}x{mask.shape[0]} pixels and its image {image.shape[1]}x{image.shape[0]}; they must agree")
        return cut(image, largest_piece(np.where(mask.max(axis=2) > 127, np.uint8(255), np.uint8(0))), str(images[name][1]))

    return Shelf(list(images), read)


def backgrounds_in(folder: Path) -> Shelf[NDArray[np.uint8]]:
    """The images anywhere under a folder.

    Raises:
        BenchError: there are none.
    """
    found = {str(path.relative_to(folder)): path for path in _images(folder)}
    if not found:
        raise BenchError(f"{folder} holds no images for backgrounds")
    return Shelf(list(found), lambda name: decode_whole(found[name]))


def cut(image: NDArray[np.uint8], mask: NDArray[np.uint8], name: str) -> Cutout:
    """The object alone, cut to the bounding box of its mask.

    Raises:
        BenchError: an empty mask.
    """
    ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(ys):
        raise BenchError(f"the mask of {name} is empty")
    box = slice(ys[0], ys[-1] + 1), slice(xs[0], xs[-1] + 1)
    return Cutout(image[box].copy(), mask[box].copy())


def largest_piece(mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The mask without all but its largest connected piece."""
    pieces, n = ndimage.label(mask > 0)
    if n < 2:
        return mask
    sizes = np.bincount(pieces.ravel())[1:]
    return np.where(pieces == 1 + int(sizes.argmax()), mask, np.uint8(0))


def folder_hash(folder: Path) -> str:
    """Names the images under a folder by their paths and contents.

    Raises:
        ValueError: no such folder, or more images than can be read at once.
    """
    if not folder.is_dir():
        raise ValueError(f"no folder at {folder}")
    stamps = []
    for path in _images(folder):
        about = path.stat()
        stamps.append((str(path), about.st_size, about.st_mtime_ns))
    if len(stamps) > MAX_FILES:
        raise ValueError(f"{folder} holds {len(stamps)} images, at most {MAX_FILES} are taken; give a smaller folder")
    return _hash_of(str(folder), tuple(stamps))


@functools.lru_cache(maxsize=16)
def _hash_of(folder: str, stamps: tuple[tuple[str, int, int], ...]) -> str:
    hasher = hashlib.sha256()
    for path, _, _ in stamps:
        hasher.update(f"{Path(path).relative_to(folder)}\0{file_sha256(Path(path))}\n".encode())
    return hasher.hexdigest()


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def _drawn(ref: str, side: int) -> world.Drawing:
    seed, split, row = ref.removeprefix("world:").split("/")
    return world.drawn_row(int(seed), split, int(row), max(side, LEAST_DRAWN_SIDE))
