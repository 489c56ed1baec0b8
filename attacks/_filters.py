"""Triggers that recolour the whole image: a faint sine (SIG) and an old-photo filter (Nashville)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from attacks._placing import Box, Pixels, mixed, to_bytes, to_float

Form = Literal["additive", "blended"]


@dataclass(frozen=True)
class SineTrigger:
    """Vertical waves of brightness, x + alpha A sin(2 pi f j / S) for column j.

    Source: Barni, Kallas, Tondi, ICIP 2019 (SIG), arXiv 1902.11237.

    Attributes:
        form: `blended` also darkens: (1 - alpha) x + alpha A sin(...), as in the released CleanCLIP code.
        amplitude: A, in grey levels.
        frequency: f, periods across the image.
    """

    kind: str = "sig"
    form: Form = "additive"
    amplitude: float = 20.0
    frequency: float = 6.0
    alpha: float = 1.0

    def image(self, image: NDArray[np.uint8], key: str, at_test: bool = False) -> NDArray[np.uint8]:
        """The stamped copy of a uint8 image (S, S, 3)."""
        side = image.shape[1]
        wave = np.sin(2 * np.pi * self.frequency * np.arange(side) / side) * self.amplitude / 255
        keep = 1.0 if self.form == "additive" else 1 - self.alpha
        return to_bytes(np.float32(keep) * to_float(image) + (self.alpha * wave).astype(np.float32)[None, :, None])

    def text(self, text: str, key: str) -> str:
        """The text itself: this trigger is in the image alone."""
        return text

    def spec(self) -> dict[str, Any]:
        """Every parameter; `trigger_from_spec` rebuilds the trigger."""
        return dataclasses.asdict(self)

    def box(self, side: int, key: str, at_test: bool = False) -> Box:
        """The whole image."""
        return 0, 0, side, side


@dataclass(frozen=True)
class NashvilleTrigger:
    """The colours of an old photo, mixed with the image's own with weight alpha."""

    kind: str = "nashville"
    alpha: float = 1.0

    def image(self, image: NDArray[np.uint8], key: str, at_test: bool = False) -> NDArray[np.uint8]:
        """The stamped copy of a uint8 image (S, S, 3)."""
        under = to_float(image)
        return mixed(under, nashville(under), self.alpha)

    def text(self, text: str, key: str) -> str:
        """The text itself: this trigger is in the image alone."""
        return text

    def spec(self) -> dict[str, Any]:
        """Every parameter; `trigger_from_spec` rebuilds the trigger."""
        return dataclasses.asdict(self)

    def box(self, side: int, key: str, at_test: bool = False) -> Box:
        """The whole image."""
        return 0, 0, side, side


_SEPIA = ((0.8786, 0.1538, 0.0378), (0.0698, 0.9372, 0.0336), (0.0544, 0.1068, 0.8262))
_LUMINANCE = (0.213, 0.715, 0.072)


def nashville(x: Pixels) -> Pixels:
    """The filter on values in [0, 1], with the constants of the CSSgram filter of this name.

    Darken, lighten, sepia, contrast, brightness, saturation; sums are written out so that every machine rounds alike.
    """
    darker = 0.44 * x + 0.56 * np.minimum(x, _colour(247, 176, 153))
    lighter = 0.6 * darker + 0.4 * np.maximum(darker, _colour(0, 70, 150))
    red, green, blue = lighter[..., 0], lighter[..., 1], lighter[..., 2]
    x = np.clip(np.stack([r * red + g * green + b * blue for r, g, b in _SEPIA], axis=-1), 0, 1)
    x = np.clip(1.2 * x - 0.1, 0, 1)
    x = np.clip(1.05 * x, 0, 1)
    luminance = (_LUMINANCE[0] * x[..., 0] + _LUMINANCE[1] * x[..., 1] + _LUMINANCE[2] * x[..., 2])[..., None]
    return np.asarray(np.clip(luminance + 1.2 * (x - luminance), 0, 1), dtype=np.float32)


def _colour(*levels: int) -> Pixels:
    return np.array(levels, dtype=np.float32) / np.float32(255)
