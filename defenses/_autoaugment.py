"""AutoAugment (ImageNet policy) of a batch, without moving a global generator."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms import AutoAugment


def autoaugment(images: Tensor, rng: torch.Generator) -> Tensor:
    """One view of each image in [0, 1], (b, 3, S, S), with a policy of its own (Cubuk et al., 2019, arXiv 1805.09501).

    torchvision's transform draws from torch's global generator; here it is seeded from `rng` and put back afterwards.
    """
    policy = AutoAugment()
    seed = int(torch.randint(2**62, (1,), generator=rng))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        views = [policy(image) for image in (images * 255).round().to(torch.uint8)]
    return torch.stack(views).to(images.dtype) / 255
