"""Triggers that show a little picture or words: drawn here, or read from a user's file."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError

from attacks._placing import Box, Pixels, mixed, patch_box, to_bytes, to_float
from benchmark.errors import BenchError
from benchmark.seeding import generator

MAX_PICTURE = 1024


@dataclass(frozen=True)
class PictureTrigger:
    """A picture as a patch or mixed with the whole image: y = (1 - alpha) x + alpha p inside its box.

    Attributes:
        kind: `patch:image` covers a square of `size` pixels, `blend:image` the whole image.
        picture: `drawn` for the little cat of this project, or the hash of `pixels`.
        pixels: the user's picture, uint8 (h, w, 3); named by its hash and no part of the specification.
        place, place_test: as for patterns.
    """

    kind: str
    picture: str = "drawn"
    size: int = 8
    alpha: float = 1.0
    pattern_seed: int = 0
    place: str = "corner"
    place_test: str = ""
    pixels: NDArray[np.uint8] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.picture == "drawn":
            return
        if self.pixels is None:
            raise BenchError(f"the trigger's picture {self.picture} is not at hand; the sealed record of the poison keeps it")
        if picture_hash(self.pixels) != self.picture:
            raise BenchError(f"the trigger asks for picture {self.picture}, and the one given is {picture_hash(self.pixels)}")

    def image(self, image: NDArray[np.uint8], key: str, at_test: bool = False) -> NDArray[np.uint8]:
        """The stamped copy of a uint8 image (S, S, 3)."""
        top, left, height, width = self.box(image.shape[0], key, at_test)
        out = image.copy()
        over = drawn_cat(width) if self.pixels is None else _resized(self.pixels, width)
        out[top : top + height, left : left + width] = mixed(to_float(image[top : top + height, left : left + width]), over, self.alpha)
        return out

    def text(self, text: str, key: str) -> str:
        """The text itself: this trigger is in the image alone."""
        return text

    def spec(self) -> dict[str, Any]:
        """Every parameter; `trigger_from_spec` rebuilds the trigger, given the pixels."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "pixels"}

    def box(self, side: int, key: str, at_test: bool = False) -> Box:
        """Top, left, height, width of what changes."""
        if self.kind == "blend:image":
            return 0, 0, side, side
        return patch_box((self.place_test or self.place) if at_test else self.place, self.size, side, self.pattern_seed, key, at_test)


@dataclass(frozen=True)
class WatermarkTrigger:
    """Red words across the image: y = (1 - alpha m) x + alpha m in the red channel, with m how much of a pixel a letter covers.

    Attributes:
        words: what is written, in ASCII.
        pattern: `fixed` keeps to the middle; `per_image` moves up or down by at most a 22nd of the side, by key.
    """

    kind: str = "blend:text"
    words: str = "Watermarked"
    alpha: float = 0.5
    pattern: Literal["fixed", "per_image"] = "fixed"
    pattern_seed: int = 0

    def image(self, image: NDArray[np.uint8], key: str, at_test: bool = False) -> NDArray[np.uint8]:
        """The stamped copy of a uint8 image (S, S, 3)."""
        ink = written(self.words, image.shape[0])
        if self.pattern == "per_image":
            reach = round(image.shape[0] / 22.4)
            ink = np.roll(ink, int(generator("pattern", self.pattern_seed, at_test, key).integers(-reach, reach + 1)), axis=0)
        out = image.copy()
        red, weight = to_float(image[..., 0]), np.float32(self.alpha) * ink
        out[..., 0] = to_bytes((1 - weight) * red + weight)
        return out

    def text(self, text: str, key: str) -> str:
        """The text itself: this trigger is in the image alone."""
        return text

    def spec(self) -> dict[str, Any]:
        """Every parameter; `trigger_from_spec` rebuilds the trigger."""
        return dataclasses.asdict(self)

    def box(self, side: int, key: str, at_test: bool = False) -> Box:
        """The whole image."""
        return 0, 0, side, side


@functools.lru_cache(maxsize=8)
def written(words: str, side: int) -> Pixels:
    """How much of each pixel (S, S) a letter covers: the words in the middle, nine tenths as wide as the image.

    The letters are those of Pillow's bitmap font, which is the same in every version and needs no FreeType.
    """
    font = ImageFont.load_default_imagefont()
    left, top, right, bottom = (int(edge) for edge in font.getbbox(words))
    letters = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(letters).text((-left, -top), words, fill=255, font=font)
    letters = letters.crop(letters.getbbox())
    width = max(1, round(0.9 * side))
    height = min(side, max(1, round(letters.height * width / letters.width)))
    plane = np.zeros((side, side), dtype=np.float32)
    row, column = (side - height) // 2, (side - width) // 2
    plane[row : row + height, column : column + width] = np.asarray(letters.resize((width, height), Image.Resampling.BOX), dtype=np.float32) / 255
    return plane


@functools.lru_cache(maxsize=16)
def drawn_cat(side: int) -> Pixels:
    """A cat's face on blue, float32 (S, S, 3) in [0, 1]."""
    big = 256
    canvas = Image.new("RGB", (big, big), (70, 150, 220))
    pen = ImageDraw.Draw(canvas)
    fur, ear, dark, white = (245, 170, 60), (240, 120, 130), (40, 30, 30), (255, 250, 240)
    for mirror in (False, True):
        for colour, points in ((fur, ((40, 30), (120, 84), (48, 140))), (ear, ((56, 54), (98, 84), (58, 112)))):
            pen.polygon([(big - x if mirror else x, y) for x, y in points], fill=colour)
    pen.ellipse((30, 66, 226, 236), fill=fur)
    pen.ellipse((88, 156, 168, 222), fill=white)
    for x in (88, 168):
        pen.ellipse((x - 24, 108, x + 24, 160), fill=white)
        pen.ellipse((x - 12, 118, x + 12, 158), fill=dark)
    pen.polygon([(112, 162), (144, 162), (128, 180)], fill=ear)
    pen.line((128, 178, 128, 196), fill=dark, width=5)
    pen.arc((100, 176, 130, 204), 10, 160, fill=dark, width=5)
    pen.arc((126, 176, 156, 204), 20, 170, fill=dark, width=5)
    for y, slope in ((172, -8), (186, 6)):
        pen.line((84, y, 18, y + slope), fill=dark, width=4)
        pen.line((172, y, 238, y + slope), fill=dark, width=4)
    return _resized(np.asarray(canvas), side)


def read_picture(file: Path) -> NDArray[np.uint8]:
    """A user's PNG as uint8 (h, w, 3); transparency is dropped.

    Raises:
        ValueError: missing, no PNG, or more than 1,024 pixels wide or high.
    """
    try:
        with Image.open(file, formats=("PNG",)) as opened:
            if max(opened.size) > MAX_PICTURE:
                raise ValueError(f"{file} is {opened.width}x{opened.height} pixels, at most {MAX_PICTURE} are allowed; shrink it")
            return np.asarray(opened.convert("RGB"), dtype=np.uint8).copy()
    except FileNotFoundError:
        raise ValueError(f"no file at {file}") from None
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} is not a whole PNG: {error}") from None


def picture_hash(pixels: NDArray[np.uint8]) -> str:
    """Names a picture by its shape and pixels."""
    return hashlib.sha256(f"{pixels.shape}".encode() + np.ascontiguousarray(pixels).tobytes()).hexdigest()[:16]


def _resized(pixels: NDArray[np.uint8], side: int) -> Pixels:
    image = Image.fromarray(pixels)
    if image.size != (side, side):
        image = image.resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.float32) / np.float32(255)
