"""Filter by how much of an image its feature needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from benchmark.train.lab import Lab
from benchmark.train.model import Model
from defenses._filter import Filter, above_the_usual


class CognitiveDistillation(Filter):
    """Finds for each image the smallest part that keeps its feature, and drops images by the size of that part.

    Where a trigger decides, a small part suffices; which sign marks poison under CLIP is an option.

    Source: Huang et al., ICLR 2023, arXiv 2301.10908; on CLIP Huang et al., ICLR 2025, arXiv 2502.01385.
    Differs from the paper: scale `small` takes 30 steps and beta=1 instead of 100 and 100, because at the published roughness no mask of
    32 px moves within these steps, and the score is the draw of the colours.
    """

    paper = "Huang et al. 2023, arXiv 2301.10908; Huang et al. 2025, arXiv 2502.01385"
    tiny: ClassVar = {"steps": 2}

    steps: int = Field(100, ge=1, description="Adam steps on the mask of each image. Paper: 100.")
    lr: float = Field(0.1, gt=0, description="Step size. Paper: 0.1.")
    gamma: float = Field(0.001, ge=0, description="Weight of the mask's size. Released extraction: 0.001.")
    beta: float = Field(100.0, ge=0, description="Weight of the mask's roughness. Released extraction: 100.")
    suspicious: Literal["large", "small"] = Field("large", description="Which masks are suspicious. Released code: large, as the score is not negated.")
    batch_size: int = Field(256, ge=1, description="Images whose masks are found side by side; changes nothing but the draws of colours.")

    def defend(self, lab: Lab) -> Model:
        model = self.suspect(lab)
        model.net.eval()
        sizes = []
        generator = torch.Generator(device=model.device).manual_seed(int(lab.rng("colours").integers(2**62)))
        with lab.progress.bar("finding masks", len(lab.pairs), "images") as advance:
            for begin in range(0, len(lab.pairs), self.batch_size):
                batch = torch.from_numpy(lab.pairs.images[begin : begin + self.batch_size].copy()).to(model.device).permute(0, 3, 1, 2).float() / 255
                masks = distilled(model.raw_image, batch, self.steps, self.lr, self.gamma, self.beta, generator)
                sizes.append(masks.sum(dim=(1, 2, 3)).cpu())
                advance(len(batch))
        scores = torch.cat(sizes) if self.suspicious == "large" else -torch.cat(sizes)
        return self.without_the_most_suspicious(lab, "cognitive_distillation", scores, above_the_usual(scores.double().numpy()))


def distilled(encode: Callable[[Tensor], Tensor], images: Tensor, steps: int, lr: float, gamma: float, beta: float, generator: torch.Generator) -> Tensor:
    """Masks (b, 1, S, S) in [0, 1] after so many Adam steps (betas 0.1) on `objective`, all starting from the same value."""
    with torch.no_grad():
        wanted = encode(images)
    mask = torch.ones(len(images), 1, *images.shape[2:], device=images.device, requires_grad=True)
    adam = torch.optim.Adam([mask], lr=lr, betas=(0.1, 0.1))
    for _ in range(steps):
        colour = torch.rand(len(images), 3, 1, 1, generator=generator, device=images.device)
        loss = objective(encode, images, wanted, (torch.tanh(mask) + 1) / 2, colour, gamma, beta).sum()
        (mask.grad,) = torch.autograd.grad(loss, [mask])
        adam.step()
    return ((torch.tanh(mask) + 1) / 2).detach()


def objective(encode: Callable[[Tensor], Tensor], images: Tensor, wanted: Tensor, mask: Tensor, colour: Tensor, gamma: float, beta: float) -> Tensor:
    """Per image (b,): mean |f(x m + (1 - m) u) - f(x)| + gamma ||m||_1 + beta TV(m), TV the mean squared step between neighbours.

    Args:
        mask: (b, 1, S, S) in [0, 1].
        colour: u, (b, 3, 1, 1).
    """
    kept = encode(images * mask + (1 - mask) * colour)
    steps = (mask[:, :, 1:] - mask[:, :, :-1]).square().sum(dim=(1, 2, 3)) + (mask[..., 1:] - mask[..., :-1]).square().sum(dim=(1, 2, 3))
    return (kept - wanted).abs().mean(dim=1) + gamma * mask.abs().sum(dim=(1, 2, 3)) + beta * steps / mask[0].numel()
