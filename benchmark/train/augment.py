"""Per-sample image augmentation on the device: one sampling grid, a colour transform and a separable blur.

Follows torchvision's RandomHorizontalFlip, RandomResizedCrop, ColorJitter, RandomGrayscale and GaussianBlur with
parameters drawn for each image; torchvision's own v2 transforms draw one set for a whole batch.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from benchmark.settings import AugmentSettings
from benchmark.train.pixels import sent

_RATIO = (math.log(3 / 4), math.log(4 / 3))
_ATTEMPTS = 10


def augment(images: Tensor, settings: AugmentSettings, rng: torch.Generator, boxes: Tensor | None = None) -> Tensor:
    """Augmented copies of images in [0, 1], (b, 3, S, S). `rng` is a CPU generator; draws are equal on every device.

    `boxes`, int64 (b, 4) as `crop_boxes` gives them, are crops that are drawn already.
    """
    b, side = len(images), images.shape[-1]
    boxes = crop_boxes(b, side, settings.crop_min, settings.crop_max, rng) if boxes is None else boxes
    flips = torch.rand(b, generator=rng) < settings.flip
    out = crop_and_flip(images, boxes, flips)
    factors = [1 + (torch.rand(b, generator=rng) * 2 - 1) * spread for spread in (settings.brightness, settings.contrast, settings.saturation)]
    turn = (torch.rand(b, generator=rng) * 2 - 1) * settings.hue
    applied = torch.rand(b, generator=rng) < settings.jitter
    grey = torch.rand(b, generator=rng) < settings.grayscale
    device = images.device
    brightness, contrast, saturation = (sent(torch.where(applied, factor, torch.ones(b)), device) for factor in factors)
    turns = sent(torch.where(applied, turn, torch.zeros(b)), device) if settings.hue else None
    out = jitter(out, brightness, contrast, saturation if settings.saturation else None, turns)
    if settings.grayscale:
        out = torch.where(sent(grey, device).view(-1, 1, 1, 1), luma(out).expand_as(out), out)
    if settings.blur:
        sigma = (0.1 + 1.9 * torch.rand(b, generator=rng)) * side / 224
        sigma = torch.where(torch.rand(b, generator=rng) < settings.blur, sigma, torch.full((b,), 1e-3))
        out = blur(out, sent(sigma, device), blur_kernel(side))
    return out


def crop_boxes(n: int, side: int, smallest: float, largest: float, rng: torch.Generator) -> Tensor:
    """Crops as torchvision's RandomResizedCrop draws them: int64 (n, 4) of top, left, height, width."""
    area = side * side * (smallest + (largest - smallest) * torch.rand(n, _ATTEMPTS, generator=rng))
    ratio = torch.exp(_RATIO[0] + (_RATIO[1] - _RATIO[0]) * torch.rand(n, _ATTEMPTS, generator=rng))
    width, height = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
    valid = (width <= side) & (height <= side) & (width > 0) & (height > 0)
    first = valid.int().argmax(dim=1, keepdim=True)
    whole = ~valid.any(dim=1)
    width = torch.where(whole, side, width.gather(1, first).squeeze(1))
    height = torch.where(whole, side, height.gather(1, first).squeeze(1))
    top = (torch.rand(n, generator=rng) * (side - height + 1)).long()
    left = (torch.rand(n, generator=rng) * (side - width + 1)).long()
    return torch.stack([top, left, height, width], dim=1)


def crop_and_flip(images: Tensor, boxes: Tensor, flips: Tensor) -> Tensor:
    """Each image's own box, resized bilinearly to the full side, and mirrored where `flips` says so.

    Samples are clamped to the box, so no pixel outside the crop is mixed in.
    """
    b, side = len(images), images.shape[-1]
    top, left, height, width = sent(boxes, images.device).float().unbind(1)
    steps = (torch.arange(side, device=images.device) + 0.5) / side
    across = torch.where(sent(flips, images.device).view(-1, 1), steps.flip(0), steps)
    x = left[:, None] + (across * width[:, None] - 0.5).clamp(min=0).minimum((width - 1)[:, None])
    y = top[:, None] + (steps[None] * height[:, None] - 0.5).clamp(min=0).minimum((height - 1)[:, None])
    grid = torch.empty(b, side, side, 2, device=images.device)
    grid[..., 0] = ((2 * x + 1) / side - 1)[:, None, :]
    grid[..., 1] = ((2 * y + 1) / side - 1)[:, :, None]
    return functional.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def jitter(images: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor | None, hue: Tensor | None) -> Tensor:
    """Brightness, contrast, saturation and hue in this order, one factor (b,) each; 1 (hue: 0) leaves an image alone, and so does None."""
    out = (images * brightness.view(-1, 1, 1, 1)).clamp(0, 1)
    mean = luma(out).mean(dim=(2, 3), keepdim=True)
    out = _blend(out, mean, contrast)
    if saturation is not None:
        out = _blend(out, luma(out), saturation)
    return out if hue is None else turn_hue(out, hue)


def luma(images: Tensor) -> Tensor:
    """Grey values (b, 1, S, S), ITU-R 601-2 weights as torchvision's."""
    red, green, blue = images.unbind(1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue).unsqueeze(1)


def turn_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Hue moved by a share (b,) of the circle, in HSV."""
    red, green, blue = images.unbind(1)
    value, least = images.amax(1), images.amin(1)
    spread = value - least
    safe = torch.where(spread == 0, torch.ones_like(spread), spread)
    hue = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    hue = (hue / 6 + turns.view(-1, 1, 1)) % 1.0
    saturation = torch.where(value == 0, torch.zeros_like(value), spread / torch.where(value == 0, torch.ones_like(value), value))
    channels = []
    for offset in (5.0, 3.0, 1.0):
        k = (offset + hue * 6) % 6
        channels.append(value - value * saturation * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, dim=1)


def blur_kernel(side: int) -> int:
    """The published 21 px at 224, scaled to the side: the nearest odd size, at least 3."""
    return max(3, 2 * (21 * side // 448) + 1)


def blur(images: Tensor, sigma: Tensor, kernel: int) -> Tensor:
    """Gaussian blur with a sigma (b,) of its own for each image, reflected at the border."""
    b, c, height, width = images.shape
    reach = kernel // 2
    steps = torch.arange(-reach, reach + 1, device=images.device, dtype=images.dtype)
    weights = torch.exp(-0.5 * (steps / sigma.view(-1, 1)) ** 2)
    weights = (weights / weights.sum(1, keepdim=True)).repeat_interleave(c, 0)
    out = functional.pad(images, (reach, reach, reach, reach), mode="reflect").reshape(1, b * c, height + 2 * reach, width + 2 * reach)
    out = functional.conv2d(out, weights.view(b * c, 1, 1, kernel), groups=b * c)
    out = functional.conv2d(out, weights.view(b * c, 1, kernel, 1), groups=b * c)
    return out.view(b, c, height, width)


def visible_share(box: tuple[int, int, int, int], side: int, settings: AugmentSettings, rng: torch.Generator, draws: int = 20_000) -> float:
    """Share of training crops in which a trigger's box (top, left, height, width) is fully visible."""
    top, left, height, width = crop_boxes(draws, side, settings.crop_min, settings.crop_max, rng).unbind(1)
    y, x, h, w = box
    inside = (top <= y) & (left <= x) & (top + height >= y + h) & (left + width >= x + w)
    return float(inside.float().mean())


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    share = factor.view(-1, 1, 1, 1)
    return (share * images + (1 - share) * other).clamp(0, 1)
