"""Two augmented views of an image for a loss within the images."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmark.train.augment import crop_boxes
from benchmark.train.loop import Now

_RATIO = (math.log(3 / 4), math.log(4 / 3))


def two_views(now: Now, images: Tensor, localized: float | None = None) -> tuple[Tensor, Tensor]:
    """Two augmented views of images in [0, 1], (b, 3, S, S), with the scale's augmentation.

    `localized` is the share by which the first view's crop is enlarged before the second is drawn within it (Zhang et al.,
    CVPR 2024, arXiv 2211.08229, call this localized cropping); None draws both crops anywhere.
    """
    if localized is None:
        return now.augment(images), now.augment(images)
    settings, side = now.augment_settings, images.shape[-1]
    first = crop_boxes(len(images), side, settings.crop_min, settings.crop_max, now.rng)
    second = boxes_within(enlarged(first, side, localized), settings.crop_min, settings.crop_max, now.rng)
    return now.augment(images, first), now.augment(images, second)


def enlarged(boxes: Tensor, side: int, share: float) -> Tensor:
    """Boxes (b, 4) of top, left, height, width with both sides longer by a share, around the same middle and cut at the border."""
    top, left, height, width = boxes.unbind(1)
    more_y, more_x = ((length * share / 2).round().long() for length in (height, width))
    above, before = (top - more_y).clamp(min=0), (left - more_x).clamp(min=0)
    below, after = (top + height + more_y).clamp(max=side), (left + width + more_x).clamp(max=side)
    return torch.stack([above, before, below - above, after - before], dim=1)


def boxes_within(regions: Tensor, smallest: float, largest: float, rng: torch.Generator) -> Tensor:
    """One crop (b, 4) inside each region (b, 4): a share of its area between two bounds, with torchvision's range of aspect ratios.

    A side longer than the region's is cut to it.
    """
    top, left, height, width = regions.unbind(1)
    n = len(regions)
    area = height * width * (smallest + (largest - smallest) * torch.rand(n, generator=rng))
    ratio = torch.exp(_RATIO[0] + (_RATIO[1] - _RATIO[0]) * torch.rand(n, generator=rng))
    w = (area * ratio).sqrt().round().long().clamp(min=1).minimum(width)
    h = (area / ratio).sqrt().round().long().clamp(min=1).minimum(height)
    y = top + (torch.rand(n, generator=rng) * (height - h + 1)).long()
    x = left + (torch.rand(n, generator=rng) * (width - w + 1)).long()
    return torch.stack([y, x, h, w], dim=1)
