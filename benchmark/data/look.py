"""Tells whether an image is the same, the same encoded anew, or another one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmark.data.image import pixels_sha256

Change = Literal["same", "re-encoded", "replaced"]

_BLOCKS = 8
_BLOCK_SIDE = 4
# Largest change of a block's mean or spread, in grey levels, that an encoder may make. On drawn pairs of 32, 64 and 224
# pixels, JPEG of quality 50 and more stays at 27 or below, and so does resampling for 98 of 100 images; a checker patch is
# at 74 or more, a white or noise patch above 28 for 97 of 100. The usual 64-bit difference hash has it the wrong way round:
# JPEG of quality 75 on plain paper flips up to 14 of its bits, a patch in the corner often none.
_TOLERANCE = 28


@dataclass(frozen=True)
class Look:
    """What is remembered of an image.

    Attributes:
        pixels: SHA-256 of the pixels.
        blocks: mean and spread of brightness in 8 x 8 blocks, one byte each.
    """

    pixels: str
    blocks: bytes


def look_at(image: NDArray[np.uint8]) -> Look:
    """What is remembered of a uint8 (S, S, 3) image."""
    return Look(pixels_sha256(image), _blocks(image, _BLOCKS).tobytes())


def compare_looks(before: Look, after: Look) -> Change:
    """How an image has changed, as far as what is remembered tells; a faint or small change passes for an encoder's."""
    if before.pixels == after.pixels:
        return "same"
    return _judge(np.frombuffer(before.blocks, dtype=np.uint8), np.frombuffer(after.blocks, dtype=np.uint8))


def compare_images(before: NDArray[np.uint8], after: NDArray[np.uint8]) -> Change:
    """How an image has changed, from both, in blocks of four pixels; a faint pattern all over passes for an encoder's work."""
    if np.array_equal(before, after):
        return "same"
    n = max(_BLOCKS, before.shape[0] // _BLOCK_SIDE)
    return _judge(_blocks(before, n), _blocks(after, n))


def _judge(before: NDArray[np.uint8], after: NDArray[np.uint8]) -> Change:
    return "re-encoded" if int(np.abs(before.astype(np.int16) - after.astype(np.int16)).max()) <= _TOLERANCE else "replaced"


def _blocks(image: NDArray[np.uint8], n: int) -> NDArray[np.uint8]:
    """Mean and spread of brightness in n x n blocks, uint8 (2, n, n)."""
    grey = np.asarray(Image.fromarray(image).convert("L"), dtype=np.float64)
    rows, columns = (np.arange(n + 1) * side // n for side in grey.shape)
    area = np.outer(np.diff(rows), np.diff(columns))

    def mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(np.add.reduceat(np.add.reduceat(values, rows[:-1], axis=0), columns[:-1], axis=1) / area)

    centre = mean(grey)
    spread = np.sqrt(np.maximum(mean(grey * grey) - centre * centre, 0))
    return np.stack([centre, spread]).round().astype(np.uint8)
