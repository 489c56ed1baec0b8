"""A sheet of triggers: a drawn image, the same with the trigger, what has changed, and how much that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from benchmark.contract import Trigger
from benchmark.data.image import psnr
from benchmark.data.world import drawn_row
from benchmark.errors import BenchError

_CELL, _LABEL, _GAP, _HEAD = 160, 150, 10, 26
_PAPER, _INK, _FAINT = (255, 255, 255), (20, 20, 20), (110, 110, 110)
_GAINS = (16.0, 8.0, 4.0, 2.0, 1.0, 0.5)
_TAPS, _SIGMA = 11, 1.5


@dataclass(frozen=True)
class Shown:
    """One row of the sheet: a trigger on one image."""

    name: str
    note: str
    clean: NDArray[np.uint8]
    stamped: NDArray[np.uint8]


def ssim(before: NDArray[np.uint8], after: NDArray[np.uint8]) -> float:
    """Structural similarity of uint8 images (h, w, 3), both sides at least 11: mean over windows and channels.

    Source: Wang et al., IEEE TIP 2004: Gaussian windows of 11 pixels with sigma 1.5, K1 = 0.01, K2 = 0.03; windows that
    reach over the border are left out.
    """
    x, y = before.astype(np.float64), after.astype(np.float64)
    mean_x, mean_y = _windowed(x), _windowed(y)
    var_x, var_y = _windowed(x * x) - mean_x**2, _windowed(y * y) - mean_y**2
    covariance = _windowed(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similar = (2 * mean_x * mean_y + c1) * (2 * covariance + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return float(similar.mean())


def residual(before: NDArray[np.uint8], after: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], float]:
    """What has changed, on grey, and by how much it was multiplied so that it can be seen."""
    change = after.astype(np.float64) - before.astype(np.float64)
    changed = np.abs(change[change != 0])
    largest = float(np.quantile(changed, 0.99)) if len(changed) else 0.0
    gain = next((gain for gain in _GAINS if gain * largest <= 128), _GAINS[-1])
    return np.asarray(np.clip(128 + gain * change, 0, 255), dtype=np.uint8), gain


def shown(name: str, trigger: Trigger, side: int, row: int = 11) -> Shown:
    """The trigger on one drawn image of this side, as the attack would stamp it at test."""
    clean = drawn_row(0, "test", row, side).image
    spec = trigger.spec()
    note = " ".join(str(spec[part]) for part in ("pattern", "form") if spec.get(part) in ("per_image", "blended", "additive"))
    return Shown(name, note.replace("_", " "), clean, trigger.image(clean, f"test/plain/{row}", at_test=True))


def write_gallery(rows: Sequence[Shown], path: Path) -> Path:
    """Writes the sheet as PNG, in two columns where it is long.

    Raises:
        BenchError: the file cannot be written.
    """
    columns = 1 if len(rows) < 5 else 2
    per_column = -(-len(rows) // columns)
    zoom = max(1, round(_CELL / rows[0].clean.shape[0]))
    cell = zoom * rows[0].clean.shape[0]
    width = _LABEL + 3 * (cell + _GAP) + _GAP
    sheet = Image.new("RGB", (columns * width, _HEAD + per_column * (cell + _GAP) + _GAP), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for column in range(columns):
        for index, title in enumerate(("clean", "triggered", "residual")):
            pen.text((column * width + _LABEL + index * (cell + _GAP), 7), title, fill=_FAINT, font=_font(13))
    for index, row in enumerate(rows):
        column, line = divmod(index, per_column)
        _draw_row(sheet, pen, row, (column * width, _HEAD + line * (cell + _GAP)), cell)
    try:
        sheet.save(path, format="PNG", optimize=True)
    except OSError as error:
        raise BenchError(f"cannot write {path}: {error.strerror}") from None
    return path


def _draw_row(sheet: Image.Image, pen: ImageDraw.ImageDraw, row: Shown, corner: tuple[int, int], cell: int) -> None:
    left, top = corner
    changed, gain = residual(row.clean, row.stamped)
    facts = [f"PSNR {psnr(row.clean, row.stamped):.1f} dB", f"SSIM {ssim(row.clean, row.stamped):.3f}", f"residual x {gain:g}", *([row.note] if row.note else [])]
    pen.text((left + _GAP, top + cell // 2 - 44), row.name, fill=_INK, font=_font(15))
    for number, fact in enumerate(facts):
        pen.text((left + _GAP, top + cell // 2 - 20 + 18 * number), fact, fill=_FAINT, font=_font(13))
    for index, image in enumerate((row.clean, row.stamped, changed)):
        picture = Image.fromarray(image).resize((cell, cell), Image.Resampling.NEAREST)
        sheet.paste(picture, (left + _LABEL + index * (cell + _GAP), top))


def _windowed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gaussian-weighted means (h - 10, w - 10, 3) of the windows that lie inside."""
    reach = np.arange(_TAPS) - _TAPS // 2
    weights = np.exp(-(reach**2) / (2 * _SIGMA**2))
    weights /= weights.sum()
    for axis in (0, 1):
        n = values.shape[axis] - _TAPS + 1
        slices = [np.take(values, range(start, start + n), axis=axis) for start in range(_TAPS)]
        values = np.tensordot(weights, np.stack(slices), axes=1)
    return values


def _font(size: int) -> Any:
    return ImageFont.load_default(size)
