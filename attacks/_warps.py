"""The WaNet trigger: a fixed elastic warp of the whole image."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attacks._placing import Box, mixed, to_float
from benchmark.seeding import generator

Field2d = NDArray[np.float64]


@dataclass(frozen=True)
class WarpTrigger:
    """Bends the image by a field that is drawn once from `pattern_seed` and never again.

    Source: Nguyen and Tran, ICLR 2021 (WaNet), arXiv 2102.10369.

    Attributes:
        grid: k, the field's control points along a side. Few bend smoothly; as many as pixels shake every pixel.
        strength: s; the mean shift is about s / 2 pixels at any side.
        jitter: adds to each pixel a shift of up to half this many pixels, drawn by key: the noise mode of the cover rows.
        alpha: weight of the bent image against the image itself.
    """

    kind: str = "warp"
    grid: int = 4
    strength: float = 1.0
    pattern_seed: int = 0
    jitter: float = 0.0
    alpha: float = 1.0

    def image(self, image: NDArray[np.uint8], key: str, at_test: bool = False) -> NDArray[np.uint8]:
        """The bent copy of a uint8 image (S, S, 3)."""
        side = image.shape[0]
        across, down = shifts(side, self.grid, self.strength, self.pattern_seed)
        if self.jitter:
            noise = generator("warp-jitter", self.pattern_seed, at_test, key).uniform(-1, 1, (2, side, side)) * self.jitter * (side - 1) / side / 2
            across, down = across + noise[0], down + noise[1]
        under = to_float(image)
        return mixed(under, bent(under, across, down), self.alpha)

    def shaken(self) -> WarpTrigger:
        """The same field with a jitter of its own for each image, which should not work as the trigger."""
        return dataclasses.replace(self, jitter=1.0)

    def text(self, text: str, key: str) -> str:
        """The text itself: this trigger is in the image alone."""
        return text

    def spec(self) -> dict[str, Any]:
        """Every parameter; `trigger_from_spec` rebuilds the trigger."""
        return dataclasses.asdict(self)

    def box(self, side: int, key: str, at_test: bool = False) -> Box:
        """The whole image."""
        return 0, 0, side, side


@functools.lru_cache(maxsize=16)
def shifts(side: int, grid: int, strength: float, seed: int) -> tuple[Field2d, Field2d]:
    """By how many pixels each pixel looks to the right and down, each (S, S).

    Uniform control points divided by their mean size, brought to S x S by bicubic interpolation, in units where the
    image spans 2 and the shift is strength / S of them.
    """
    points = generator("warp", seed, grid).uniform(-1, 1, (2, grid, grid))
    points /= np.abs(points).mean()
    across, down = (_enlarged(plane, side) * strength / side * (side - 1) / 2 for plane in points)
    return across, down


def bent(image: NDArray[np.float32], across: Field2d, down: Field2d) -> NDArray[np.float32]:
    """The image (S, S, 3) sampled bilinearly at shifted places; places outside are brought to the border."""
    last = image.shape[0] - 1
    rows, columns = np.indices(across.shape, dtype=np.float64)
    y, x = np.clip(rows + down, 0, last), np.clip(columns + across, 0, last)
    top, left = np.floor(y).astype(np.int64), np.floor(x).astype(np.int64)
    bottom, right = np.minimum(top + 1, last), np.minimum(left + 1, last)
    v, u = (y - top)[..., None], (x - left)[..., None]
    above = (1 - u) * image[top, left] + u * image[top, right]
    below = (1 - u) * image[bottom, left] + u * image[bottom, right]
    return np.asarray((1 - v) * above + v * below, dtype=np.float32)


def _enlarged(plane: Field2d, side: int) -> Field2d:
    """Bicubic interpolation (a = -0.75) to (S, S) whose corners meet the plane's corners."""
    taps = _taps(len(plane), side)
    tall = sum((weight[:, None] * plane[index] for index, weight in taps), np.zeros((side, plane.shape[1])))
    return sum((weight[None, :] * tall[:, index] for index, weight in taps), np.zeros((side, side)))


def _taps(n: int, side: int) -> list[tuple[NDArray[np.int64], Field2d]]:
    """Four neighbours and their weights for each of S places along n points; neighbours outside repeat the border."""
    place = np.arange(side) * ((n - 1) / max(1, side - 1))
    first = np.floor(place)
    found = []
    for offset in (-1, 0, 1, 2):
        distance = np.abs(place - first - offset)
        near = 1.25 * distance**3 - 2.25 * distance**2 + 1
        far = -0.75 * (distance**3 - 5 * distance**2 + 8 * distance - 4)
        found.append((np.clip(first.astype(np.int64) + offset, 0, n - 1), np.where(distance <= 1, near, far)))
    return found
