"""Image triggers: frozen values that stamp uint8 images, the same way in training and at test."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from attacks._filters import NashvilleTrigger, SineTrigger
from attacks._pictures import PictureTrigger, WatermarkTrigger
from attacks._placing import Box, Pixels, Stamp, mixed, patch_box, to_float
from attacks._warps import WarpTrigger
from benchmark.errors import BenchError
from benchmark.seeding import generator

Pattern = Literal["fixed", "per_image"]
Overflow = Literal["clip", "wrap"]

ALIASES = {
    "checker": "patch:checker",
    "white": "patch:white",
    "black": "patch:black",
    "yellow": "patch:yellow",
    "noise": "patch:noise",
    "dots": "patch:dots",
    "stripes": "patch:stripes",
    "picture": "patch:image",
    "blended": "blend:noise",
    "blended-picture": "blend:image",
    "blended-stripes": "blend:stripes",
    "triangles": "blend:triangles",
    "watermark": "blend:text",
    "sig": "sig",
    "wanet": "warp",
    "nashville": "nashville",
}
DRAWN_PER_IMAGE = ("patch:noise", "patch:stripes", "blend:noise", "blend:stripes")


@dataclass(frozen=True)
class PatternTrigger:
    """A pattern laid over an image with weight alpha: y = (1 - alpha) x + alpha p inside its box.

    Attributes:
        kind: `patch:...` covers a square of `size` pixels, `blend:...` the whole image.
        alpha: weight of the pattern; 1 hides what lies under it, 0 changes nothing.
        cell: side of a checker's cell, width of a stripe or side of a triangle's tile, in pixels.
        pattern: `fixed` is drawn once from `pattern_seed`; `per_image` again for each key, so that the trigger is a
            distribution and not a pattern (as in the released CleanCLIP and RoCLIP code).
        place: `corner`, `centre`, `random` or `at:Y,X`, the top left pixel, and what `check_place` knows; a blend has none.
        place_test: the same at test; empty for no difference.
        overflow: what becomes of per-image noise outside [0, 1]; `wrap` is modulo 256.
    """

    kind: str
    size: int = 8
    alpha: float = 1.0
    cell: int = 2
    pattern: Pattern = "fixed"
    pattern_seed: int = 0
    place: str = "corner"
    place_test: str = ""
    overflow: Overflow = "clip"

    def image(self, image: NDArray[np.uint8], key: str, at_test: bool = False) -> NDArray[np.uint8]:
        """The stamped copy of a uint8 image (S, S, 3)."""
        top, left, height, width = self.box(image.shape[0], key, at_test)
        out = image.copy()
        under = to_float(image[top : top + height, left : left + width])
        out[top : top + height, left : left + width] = mixed(under, self._pattern(under, image, key, at_test), self.alpha)
        return out

    def text(self, text: str, key: str) -> str:
        """The text itself: this trigger is in the image alone."""
        return text

    def spec(self) -> dict[str, Any]:
        """Every parameter; `trigger_from_spec` rebuilds the trigger."""
        return dataclasses.asdict(self)

    def box(self, side: int, key: str, at_test: bool = False) -> Box:
        """Top, left, height, width of what changes."""
        if self.kind.startswith("blend:"):
            return 0, 0, side, side
        return patch_box((self.place_test or self.place) if at_test else self.place, self.size, side, self.pattern_seed, key, at_test)

    def _pattern(self, under: Pixels, image: NDArray[np.uint8], key: str, at_test: bool) -> Pixels:
        height, width = under.shape[:2]
        if self.pattern == "fixed" or self.kind not in DRAWN_PER_IMAGE:
            return fixed_pattern(self.kind, height, width, self.cell, self.pattern_seed)
        rng = generator("pattern", self.pattern_seed, at_test, key)
        if self.kind.endswith(":stripes"):
            return _stripes(self.kind, height, width, self.cell, rng)
        if self.kind == "blend:noise":
            return rng.random((height, width, 3), dtype=np.float32)
        mean = image.astype(np.float32).mean(axis=(0, 1)) / np.float32(255)
        noise = mean + rng.standard_normal((height, width, 3), dtype=np.float32)
        if self.overflow == "wrap":
            return np.asarray((np.floor(noise * 255).astype(np.int64) % 256) / 255, dtype=np.float32)
        return np.asarray(np.clip(noise, 0, 1), dtype=np.float32)


def trigger_from_spec(spec: dict[str, Any], picture: NDArray[np.uint8] | None = None) -> Stamp:
    """The trigger that `spec()` described.

    Args:
        picture: uint8 (h, w, 3), for a trigger that shows a picture of the user's.
    """
    match spec["kind"]:
        case "patch:image" | "blend:image":
            return PictureTrigger(**spec, pixels=picture if spec["picture"] != "drawn" else None)
        case "blend:text":
            return WatermarkTrigger(**spec)
        case "sig":
            return SineTrigger(**spec)
        case "warp":
            return WarpTrigger(**spec)
        case "nashville":
            return NashvilleTrigger(**spec)
        case _:
            return PatternTrigger(**spec)


@functools.lru_cache(maxsize=64)
def fixed_pattern(kind: str, height: int, width: int, cell: int, seed: int) -> Pixels:
    """The pattern (height, width, 3) that all images share, in [0, 1]; blended stripes are in [-1, 1]."""
    rows, columns = np.indices((height, width))
    colour = np.ones(3, dtype=np.float32)
    match kind:
        case "patch:checker":
            plane = ((rows // cell + columns // cell) % 2 == 0).astype(np.float32)
        case "patch:dots":
            plane = ((rows % 2 == 0) & (columns % 2 == 0)).astype(np.float32)
        case "patch:white":
            plane = np.ones((height, width), dtype=np.float32)
        case "patch:black":
            plane = np.zeros((height, width), dtype=np.float32)
        case "patch:yellow":
            plane, colour = np.ones((height, width), dtype=np.float32), np.array([1, 1, 0], dtype=np.float32)
        case "blend:triangles":
            plane = np.where(rows % cell >= columns % cell, 0.4, 0.8).astype(np.float32)
        case "patch:noise" | "blend:noise":
            return generator("pattern", kind, seed).random((height, width, 3), dtype=np.float32)
        case "patch:stripes" | "blend:stripes":
            return _stripes(kind, height, width, cell, generator("pattern", kind, seed))
        case _:
            raise BenchError(f"no trigger pattern {kind!r}")
    return np.repeat(plane[..., None], 3, axis=2) * colour


def _stripes(kind: str, height: int, width: int, cell: int, rng: np.random.Generator) -> Pixels:
    """Stripes from top to bottom, each channel of each at its lowest or highest value with probability 1/2."""
    values = rng.integers(0, 2, (-(-width // cell), 3)).astype(np.float32)
    if kind == "blend:stripes":
        values = 2 * values - 1
    return np.broadcast_to(np.repeat(values, cell, axis=0)[:width], (height, width, 3)).copy()
