"""Model audit: looks for a small trigger that makes all images look alike to the image encoder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from benchmark.contract import Defense
from benchmark.train.lab import Lab
from benchmark.train.model import Model
from defenses.clip import Clip


class Decree(Defense):
    """Trains plain CLIP and audits the image encoder: how small is the smallest patch that gives all images one feature.

    A backdoored encoder maps whatever shows the trigger to one place, so that a patch of the trigger's size suffices. In a clean
    encoder, most of the image has to be covered. The score is minus the covered share, so that higher is more suspicious.

    Source: Feng et al., CVPR 2023, arXiv 2303.15180; the released code for what the text leaves open.
    Differs from the paper: shadow images are granted clean pairs; a model for which no patch is found scores -1.
    """

    kind = "audit"
    paper = "Feng et al. 2023, arXiv 2303.15180"

    n_clean: int = Field(128, ge=4, description="Shadow images: clean pairs, without their captions.")
    epochs: int = Field(1000, ge=1, description="Sweeps over the shadow images at most. Released code: 1000.")
    batch_size: int = Field(32, ge=2, description="Shadow images in a step. Released code: 32.")
    alike: float = Field(0.99, gt=0, lt=1, description="Mean pairwise cosine from which images count as alike. Released code: 0.99.")
    patience: int = Field(35, ge=1, description="Steps without a smaller patch after which it stops, once a whole sweep succeeds. Released code: 35.")
    seed: int = Field(0, ge=0, description="Draws, with the model's weights, the first patch and the order of the images.")

    def defend(self, lab: Lab) -> Model:
        lab.clean_pairs(self.n_clean)  # the audit's, asked for before anything is trained
        return lab.train(Clip()).model

    def audit(self, model: Model, images: NDArray[np.uint8]) -> float:
        return -self.invert(model, images).covered

    def invert(self, model: Model, images: NDArray[np.uint8]) -> Inversion:
        """The smallest patch found on these images (n, S, S, 3)."""
        was_training = model.net.training
        model.net.eval()
        wanted = {name: parameter.requires_grad for name, parameter in model.net.named_parameters()}
        model.net.requires_grad_(False)
        try:
            with torch.enable_grad():
                return self._search(model, torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 255)
        finally:
            for name, parameter in model.net.named_parameters():
                parameter.requires_grad_(wanted[name])
            model.net.train(was_training)

    def _search(self, model: Model, images: Tensor) -> Inversion:
        rng = torch.Generator().manual_seed(self.seed + int(model.weights_sha256()[:12], 16))
        side = images.shape[-1]
        mask, patch = (torch.rand(shape, generator=rng).to(model.device).requires_grad_() for shape in ((1, side, side), (3, side, side)))
        solver = torch.optim.Adam([mask, patch], lr=learning_rate(0), betas=(0.5, 0.9))
        weight, best, since = Weight(), Inversion(1.0, torch.ones(side, side), torch.zeros(3, side, side), 0), 0
        for epoch in range(self.epochs):
            solver.param_groups[0]["lr"] = learning_rate(epoch)
            found = []
            for batch in _batches(images, self.batch_size, rng):
                shown, painted = squashed(mask), squashed(patch)
                similarity = pairwise(model.image((1 - shown) * batch.to(model.device) + shown * painted))
                size = 3 * shown.sum()
                loss = weight.value * size - similarity
                mask.grad, patch.grad = torch.autograd.grad(loss, [mask, patch])
                solver.step()
                found.append(float(similarity.detach()))
                succeeded = found[-1] > self.alike
                covered = float(size.detach()) / (3 * side * side)
                since += 1
                if succeeded and covered < best.covered:
                    best, since = Inversion(covered, shown.detach()[0].cpu(), painted.detach().cpu(), epoch + 1), 0
                weight.adapt(succeeded)
            if sum(found) / len(found) > self.alike and since > self.patience:
                break
        return best


@dataclass(frozen=True)
class Inversion:
    """What was found.

    Attributes:
        covered: sum of the mask over its size, in [0, 1]; 1 where nothing was found.
        mask, patch: (S, S) and (3, S, S) in [0, 1].
        epoch: when; 0 where nothing was found.
    """

    covered: float
    mask: Tensor
    patch: Tensor
    epoch: int


@dataclass
class Weight:
    """How much a small mask counts beside similarity; follows success.

    More than 5 successes in a row make it 5 times as large (below 1e5), more than 5 failures 5 times smaller (from 1e-7). A
    weight below 1e-7 that goes on to succeed 10 times starts again.
    """

    value: float = 1e-3
    n_up: int = 0
    n_down: int = 0
    n_idle: int = 0

    def adapt(self, succeeded: bool) -> None:
        """Takes note of one step."""
        self.n_up, self.n_down = (self.n_up + 1, 0) if succeeded else (0, self.n_down + 1)
        self.n_idle = self.n_idle + 1 if succeeded and self.value < 1e-7 else 0
        if self.n_idle > 10:
            self.value, self.n_idle, self.n_up = 1e-3, 0, 0
        elif self.n_up > 5 and self.value < 1e5:
            self.value, self.n_up = self.value * 5, 0
        elif self.n_down > 5 and self.value >= 1e-7:
            self.value, self.n_down = self.value / 5, 0


def learning_rate(epoch: int) -> float:
    """Adam's rate in an epoch counted from 0, as in the released code."""
    return 0.5 if epoch < 200 else 0.1 if epoch < 500 else 0.05


def squashed(values: Tensor) -> Tensor:
    """Free values mapped to (0, 1)."""
    return torch.tanh(values) / 2 + 0.5


def pairwise(features: Tensor) -> Tensor:
    """Mean cosine of pairs of different unit-length features (b, d)."""
    n = len(features)
    return (features.sum(dim=0).square().sum() - n) / (n * (n - 1))


def _batches(images: Tensor, size: int, rng: torch.Generator) -> Iterator[Tensor]:
    """All images in random order; a rest of one goes with the batch before it."""
    order = torch.randperm(len(images), generator=rng)
    ends = [*range(size, len(images) - 1, size), len(images)]
    for begin, end in zip([0, *ends[:-1]], ends, strict=True):
        yield images[order[begin:end]]
