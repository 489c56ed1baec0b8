"""Where object and trigger lie in a composed image, and how likely two random crops are to tell them apart (CorruptEncoder, section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmark.errors import BenchError

NODES = 200
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Layout:
    """An object and a square trigger in a canvas, in pixels; x to the right, y downwards, the object at the bottom.

    Attributes:
        width, height: of the canvas.
        object: left, top, width, height.
        trigger: left, top, side.
    """

    width: float
    height: float
    object: tuple[float, float, float, float]
    trigger: tuple[float, float, float]

    @property
    def object_left(self) -> bool:
        """Whether the trigger lies to the right of the object."""
        return self.trigger[0] >= self.object[0] + self.object[2]

    def mirrored(self) -> Layout:
        """The same seen in a mirror."""
        x, y, width, height = self.object
        left, top, side = self.trigger
        return Layout(self.width, self.height, (self.width - x - width, y, width, height), (self.width - left - side, top, side))

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"canvas": [self.width, self.height], "object": list(self.object), "trigger": list(self.trigger)}


def optimal_layout(object_width: float, object_height: float, trigger: float, width: float | None = None, height: float | None = None) -> Layout:
    """The layout of the theory: the object in the lower left corner, the trigger in the centre of what is free.

    Args:
        width, height: of the canvas; by default twice the object's width, and its height.
    """
    width, height = width or 2 * object_width, height or object_height
    return Layout(width, height, (0.0, height - object_height, object_width, object_height), ((width + object_width - trigger) / 2, (height - trigger) / 2, trigger))


def drawn_layout(object_width: int, object_height: int, trigger: int, width: int, height: int, object_margin: float, trigger_margin: float, rng: np.random.Generator) -> Layout:
    """A layout with the published jitter, in whole pixels.

    A coin says on which side the object lies, at most `object_margin` of the width from the edge and at the bottom. The
    trigger is uniform over the free half without a `trigger_margin` of the width, split between its two sides, and over the
    height without a `trigger_margin` at the top and at the bottom. An empty range becomes its middle.

    Raises:
        BenchError: the trigger does not fit beside the object.
    """
    left = rng.random() < 0.5
    jitter, across, down = rng.random(3)
    room = min(int(object_margin * width), width - object_width - trigger)
    if room < 0 or trigger > height:
        raise BenchError(f"a trigger of {trigger} px does not fit beside an object of {object_width} px in a canvas of {width}x{height}; lower attack.size")
    x = int(jitter * (room + 1))
    inset = trigger_margin / 2 * width
    trigger_x = _place(x + object_width + inset, width - inset - trigger, across, x + object_width, width - trigger)
    trigger_y = _place(trigger_margin * height, (1 - trigger_margin) * height - trigger, down, 0, height - trigger)
    layout = Layout(width, height, (x, height - object_height, object_width, object_height), (trigger_x, trigger_y, trigger))
    return layout if left else layout.mirrored()


def separation(layout: Layout, nodes: int = NODES) -> float:
    """How likely it is that, of two random square crops of one size, one shows the object alone and the other the whole trigger without the object.

    The side is uniform up to the canvas's shorter side, the places are independent and uniform:
    p = (2/S) int_0^S p1(s) p2(s) ds, by the midpoint rule.

    Source: Zhang et al., CVPR 2024, arXiv 2211.08229, section 4; the integral and the crops above the object are derived.
    """
    if not layout.object_left:
        layout = layout.mirrored()
    width, height = layout.width, layout.height
    x, _, object_width, object_height = layout.object
    left, top, side = layout.trigger
    shorter = min(width, height)
    s = (np.arange(nodes) + 0.5) / nodes * shorter
    places = (width - s) * (height - s)
    inside = _positive(object_width - s) * _positive(object_height - s)
    # Left edges of crops beside the object, and of all crops that hold the trigger; upper edges of all, and of those above the object.
    beside, across = _length(np.maximum(x + object_width, left + side - s), np.minimum(width - s, left)), _length(np.maximum(0, left + side - s), np.minimum(width - s, left))
    down = _length(np.maximum(0, top + side - s), np.minimum(height - s, top))
    above = _length(np.maximum(0, top + side - s), np.minimum(height - object_height - s, top))
    beyond = beside * down + (across - beside) * above
    return float(2 * np.mean(inside * beyond / places**2))


def separated(layout: Layout, rng: np.random.Generator, n: int) -> float:
    """The same share among n pairs of crops that are really drawn."""
    s = rng.random(n) * min(layout.width, layout.height)
    seen = np.zeros(n, dtype=bool)
    crops = [(rng.random(n) * (layout.width - s), rng.random(n) * (layout.height - s)) for _ in range(2)]
    for one, other in (crops, crops[::-1]):
        seen |= _within(one, s, layout) & _holds(other, s, layout)
    return float(seen.mean())


def _within(crop: tuple[Floats, Floats], s: Floats, layout: Layout) -> NDArray[np.bool_]:
    x, y, width, height = layout.object
    return np.asarray((crop[0] >= x) & (crop[0] + s <= x + width) & (crop[1] >= y) & (crop[1] + s <= y + height))


def _holds(crop: tuple[Floats, Floats], s: Floats, layout: Layout) -> NDArray[np.bool_]:
    """The whole trigger, and nothing of the object's box."""
    left, top, side = layout.trigger
    x, y, width, height = layout.object
    whole = (crop[0] <= left) & (crop[0] + s >= left + side) & (crop[1] <= top) & (crop[1] + s >= top + side)
    apart = (crop[0] >= x + width) | (crop[0] + s <= x) | (crop[1] >= y + height) | (crop[1] + s <= y)
    return np.asarray(whole & apart)


def _place(low: float, high: float, share: float, least: float, most: float) -> int:
    """A whole number, uniform over [low, high]; the middle of an empty range, kept within [least, most]."""
    first, last = int(np.ceil(low)), int(np.floor(high))
    if last < first:
        return int(min(max(round((low + high) / 2), least), most))
    return first + int(share * (last - first + 1))


def _positive(values: Floats) -> Floats:
    return np.maximum(values, 0)


def _length(low: Floats, high: Floats) -> Floats:
    return np.maximum(high - low, 0)
