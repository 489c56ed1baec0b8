"""How often a training crop shows a trigger whole: what augmentation alone takes away from a backdoor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmark.contract import Probe
from benchmark.evaluate.metric import Metric
from benchmark.seeding import torch_generator
from benchmark.settings import AugmentSettings
from benchmark.train.augment import visible_share

_DRAWS = 20_000
_PLACES = 200
Box = tuple[int, int, int, int]


def visibility(kept: Mapping[str, Any], probes: Sequence[Probe], side: int, settings: AugmentSettings) -> list[Metric]:
    """`trigger_visible_share` by Monte Carlo over the run's own augmentation; nothing for a trigger of the whole image, or without a place.

    Args:
        kept: what the attack kept: `box` where its trigger has a place in training, `layouts` where each composed row has its own.
        probes: of the attack; a trigger whose place is drawn for each image is asked for many.
    """
    boxes = [box for box in _boxes(kept, probes, side) if box[2:] != (side, side)]
    if not boxes:
        return []
    draws = max(1, _DRAWS // len(boxes))
    rng = torch_generator("visible")
    shares = [visible_share(box, side, settings, rng, draws) if _whole(box, side) else 0.0 for box in boxes]
    return [Metric("trigger_visible_share", "trigger", sum(shares) / len(shares), draws * len(boxes), "crops")]


def _boxes(kept: Mapping[str, Any], probes: Sequence[Probe], side: int) -> list[Box]:
    """Top, left, height, width of each place; one place only once if there is but one."""
    if "layouts" in kept:
        return [_cropped(layout, side) for layout in kept["layouts"]]
    if "box" not in kept:
        return []
    place = next((place for one in probes if (place := getattr(one.trigger, "box", None)) is not None), None)
    found: list[Box] = [place(side, str(key)) for key in range(_PLACES)] if place is not None else [_box(kept["box"])]
    return found if len(set(found)) > 1 else found[:1]


def _cropped(layout: Mapping[str, Any], side: int) -> Box:
    """The trigger's place after the centre crop of a canvas that may be longer than the image, there perhaps in part or outside."""
    left, top, size = map(int, layout["trigger"])
    width, height = layout["canvas"]
    return top - round((height - side) / 2), left - round((width - side) / 2), size, size


def _whole(box: Box, side: int) -> bool:
    top, left, height, width = box
    return min(top, left, side - top - height, side - left - width) >= 0


def _box(values: Sequence[int]) -> Box:
    top, left, height, width = map(int, values)
    return top, left, height, width
