"""A picture of the top suspects: a few images of each, with what is said of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from benchmark.audit.suspects import Ranked
from benchmark.errors import BenchError

SIDE = 96
PER_SUSPECT = 8
_TEXT = 420
_GAP = 6
_LINE = 16
_PAPER, _INK, _FAINT = (255, 255, 255), (20, 20, 24), (110, 110, 118)
_LONGEST = 58


def write_sheet(found: Sequence[Ranked], captions: Sequence[str], pixels: Callable[[int], NDArray[np.uint8] | None], path: Path) -> None:
    """Writes the sheet as PNG: a line a suspect, with up to eight of its rows.

    Args:
        pixels: the image of a row, uint8 (SIDE, SIDE, 3), or None if it cannot be read.

    Raises:
        BenchError: the file cannot be written.
    """
    height = SIDE + _LINE + 2 * _GAP
    sheet = Image.new("RGB", (_TEXT + PER_SUSPECT * (SIDE + _GAP) + _GAP, max(1, len(found)) * height), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for line, one in enumerate(found):
        top = line * height + _GAP
        about = one.suspect
        facts = (f"{about.n_rows} rows, {about.n_images} images, {about.n_captions} captions", about.reason, about.what)
        pen.text((_GAP, top), f"{one.rank}. {about.kind} (score {about.score:.3g})", fill=_INK, font=_font(14))
        lines = [part for fact in facts for part in _folded(fact)][:5]
        for index, text in enumerate(lines, 1):
            pen.text((_GAP, top + index * _LINE), text, fill=_FAINT, font=_font(12))
        for index, row in enumerate(about.rows[:PER_SUSPECT].tolist()):
            left = _TEXT + index * (SIDE + _GAP)
            shown = pixels(row)
            if shown is None:
                pen.rectangle((left, top, left + SIDE, top + SIDE), outline=_FAINT)
            else:
                sheet.paste(Image.fromarray(shown), (left, top))
            pen.text((left, top + SIDE + 2), _printable(captions[row])[:16], fill=_FAINT, font=_font(10))
    try:
        sheet.save(path, format="PNG", optimize=True)
    except OSError as error:
        raise BenchError(f"cannot write {path}: {error.strerror}") from None


def _folded(text: str) -> list[str]:
    shown = _printable(text)
    return [shown[begin : begin + _LONGEST] for begin in range(0, min(len(shown), 2 * _LONGEST), _LONGEST)]


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
