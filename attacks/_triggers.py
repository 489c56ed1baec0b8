"""Image triggers: frozen values that stamp uint8 images, the same way in training and at test."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from benchmark.errors import BenchError
from benchmark.seeding import generator

Pattern = Literal["fixed", "per_image"]
Overflow = Literal["clip", "wrap"]
Pixels = NDArray[np.float32]

ALIASES = {"checker": "patch:checker", "white": "patch:white", "noise": "patch:noise", "dots": "patch:dots", "blended": "blend:noise"}
KINDS = tuple(sorted(ALIASES.values()))


@dataclass(frozen=True)
class PatternTrigger:
    """A pattern laid over an image with weight alpha: y = (1 - alpha) x + alpha p inside its box.

    Attributes:
        kind: `patch:...` covers a square of `size` pixels, `blend:...` the whole image.
        alpha: weight of the pattern; 1 hides what lies under it, 0 changes nothing.
        cell: side of a checker's cell in pixels.
        pattern: `fixed` is drawn once from `pattern_seed`; `per_image` again for each key, so that the trigger is a
            distribution and not a pattern (as in the released CleanCLIP and RoCLIP code).
        place: `corner`, `centre`, `random` or `at:Y,X`, the top left pixel; a blend has none.
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
        under = image[top : top + height, left : left + width].astype(np.float32) / np.float32(255)
        over = self._pattern(under, image, key, at_test)
        out[top : top + height, left : left + width] = _bytes(np.float32(1 - self.alpha) * under + np.float32(self.alpha) * over)
        return out

    def text(self, text: str, key: str) -> str:
        """The text itself: this trigger is in the image alone."""
        return text

    def spec(self) -> dict[str, Any]:
        """Every parameter; `trigger_from_spec` rebuilds the trigger."""
        return dataclasses.asdict(self)

    def box(self, side: int, key: str, at_test: bool = False) -> tuple[int, int, int, int]:
        """Top, left, height, width of what changes."""
        if self.kind.startswith("blend:"):
            return 0, 0, side, side
        size = self.size
        if size > side:
            raise BenchError(f"a trigger of {size} px does not fit an image of {side} px; lower attack.size")
        place = (self.place_test or self.place) if at_test else self.place
        if place == "corner":
            top = left = side - size
        elif place == "centre":
            top = left = (side - size) // 2
        elif place == "random":
            top, left = (int(value) for value in generator("place", self.pattern_seed, at_test, key).integers(0, side - size + 1, 2))
        else:
            top, left = (int(part) for part in place.removeprefix("at:").split(","))
            if not (0 <= top <= side - size and 0 <= left <= side - size):
                raise BenchError(f"attack.place {place!r} puts a trigger of {size} px outside an image of {side} px")
        return top, left, size, size

    def _pattern(self, under: Pixels, image: NDArray[np.uint8], key: str, at_test: bool) -> Pixels:
        height, width = under.shape[:2]
        if self.pattern == "fixed" or self.kind not in ("patch:noise", "blend:noise"):
            return fixed_pattern(self.kind, height, width, self.cell, self.pattern_seed)
        rng = generator("pattern", self.pattern_seed, at_test, key)
        if self.kind == "blend:noise":
            return rng.random((height, width, 3), dtype=np.float32)
        mean = image.astype(np.float32).mean(axis=(0, 1)) / np.float32(255)
        noise = mean + rng.standard_normal((height, width, 3), dtype=np.float32)
        if self.overflow == "wrap":
            return np.asarray((np.floor(noise * 255).astype(np.int64) % 256) / 255, dtype=np.float32)
        return np.asarray(np.clip(noise, 0, 1), dtype=np.float32)


def trigger_from_spec(spec: dict[str, Any]) -> PatternTrigger:
    """The trigger that `spec()` described."""
    return PatternTrigger(**spec)


def check_place(place: str) -> str:
    """The place itself, if it is one.

    Raises:
        ValueError: anything but corner, centre, random or at:Y,X.
    """
    parts = place.removeprefix("at:").split(",")
    if place in ("corner", "centre", "random") or (place.startswith("at:") and len(parts) == 2 and all(part.isdecimal() for part in parts)):
        return place
    raise ValueError("a place is corner, centre, random or at:Y,X")


@functools.lru_cache(maxsize=64)
def fixed_pattern(kind: str, height: int, width: int, cell: int, seed: int) -> Pixels:
    """The pattern (height, width, 3) in [0, 1] that all images share."""
    rows, columns = np.indices((height, width))
    match kind:
        case "patch:checker":
            plane = ((rows // cell + columns // cell) % 2 == 0).astype(np.float32)
        case "patch:dots":
            plane = ((rows % 2 == 0) & (columns % 2 == 0)).astype(np.float32)
        case "patch:white":
            plane = np.ones((height, width), dtype=np.float32)
        case "patch:noise" | "blend:noise":
            return generator("pattern", kind, seed).random((height, width, 3), dtype=np.float32)
        case _:
            raise BenchError(f"no trigger pattern {kind!r}")
    return np.repeat(plane[..., None], 3, axis=2)


def _bytes(values: Pixels) -> NDArray[np.uint8]:
    return np.asarray(np.floor(np.clip(values, 0, 1) * np.float32(255) + np.float32(0.5)), dtype=np.uint8)
