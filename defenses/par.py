"""PAR: push the features away from those of the poisoned model while the CLIP loss recovers the task."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from benchmark.contract import Batch, Defense, Pass
from benchmark.train.lab import Lab
from benchmark.train.loop import Now
from benchmark.train.loss import contrastive
from benchmark.train.model import Model
from defenses._repair import fine_tune, sweeps
from defenses._statistics import still


class PAR(Defense):
    """Perturb and recover: fine-tunes on granted clean pairs while features move away from the poisoned model's, up to a distance.

    It assumes nothing about the trigger: whatever the poisoned model had learned is moved, and clean pairs bring the task back.

    Source: Singh, Croce, Hein, arXiv 2412.00727; the released code for what the text leaves open.
    Differs from the paper: the published rates times one factor; noise has both signs; steps are the scale's; BatchNorm's running
    statistics are those of plain images. `preset=official` has none of these.
    """

    kind = "repair"
    clean_pairs_needed = 2000
    paper = "Singh, Croce, Hein 2024, arXiv 2412.00727"
    presets: ClassVar = {"default": {}, "official": {"lr_scale": 1.0, "noise_half": True, "epochs": 10, "min_steps": 1, "batch_size": 512, "statistics": "perturbed"}}
    tiny: ClassVar = {"n_clean": 48, "epochs": 3, "min_steps": 1, "batch_size": 16}

    preset: Literal["default", "official"] = Field("default", description="official: the released code with the paper's 10 epochs.")
    n_clean: int = Field(2000, ge=2, description="Clean pairs asked for. Released code: 250,000.")
    epochs: int = Field(10, ge=1, description="Sweeps over the clean pairs. Paper: 10; the released script: 2.")
    min_steps: int = Field(500, ge=1, description="Fewest steps; few clean pairs are swept more often.")
    batch_size: int = Field(64, ge=2, description="Pairs in a step; the distance is a batch mean. Paper: 512.")
    tau: float = Field(2.15, gt=0, description="Mean squared distance beyond which nothing is pushed; 2 is orthogonal. Released code: 2.15.")
    gate: Literal["batch", "row"] = Field("batch", description="row: each row stops being pushed by itself; not PAR as published.")
    lr_scale: float = Field(1.0, gt=0, description="Factor on the three rates.")
    lr_start: float = Field(3e-5, gt=0, description="Rate at the first step. Released code: 3e-5.")
    lr_mid: float = Field(3e-6, gt=0, description="Rate half-way, reached linearly. Released code: 3e-6.")
    lr_end: float = Field(1e-9, ge=0, description="Rate at the end, reached by a cosine. Released code: 1e-9.")
    noise_p: float = Field(0.5, ge=0, le=1, description="Share of images with noise. Released code: 0.5.")
    noise_sd: float = Field(0.2, ge=0, description="Standard deviation of the noise of a pixel in [0, 1]. Released code: 0.2.")
    noise_half: bool = Field(False, description="Add the positive half of the noise alone, as the released code does.")
    erase_p: float = Field(0.5, ge=0, le=1, description="Share of images with an erased square. Released code: 0.5.")
    erase_min: float = Field(0.005, gt=0, le=1, description="Smallest area of the square. Released code: 0.5 %.")
    erase_max: float = Field(0.01, gt=0, le=1, description="Largest area of the square. Released code: 1 %.")
    statistics: Literal["plain", "perturbed"] = Field(
        "plain", description="Images that BatchNorm's running statistics follow: plain takes one more pass forward. Released code: perturbed."
    )
    train_logit_scale: bool = Field(False, description="Train the temperature too; not PAR as published.")

    def defend(self, lab: Lab) -> Model:
        clean = lab.clean_pairs(self.n_clean)
        epochs = sweeps(len(clean), self.batch_size, self.epochs, self.min_steps)
        return fine_tune(lab, self, clean, epochs, self.batch_size, betas=(0.9, 0.98), weight_decay=1e-4).model

    def plan(self, epoch: int, now: Now) -> list[Pass]:
        total = now.epochs * now.steps_per_epoch
        rates = (self.lr_start * self.lr_scale, self.lr_mid * self.lr_scale, self.lr_end * self.lr_scale)
        return [Pass(lr=partial(_rate, rates, (epoch - 1) * now.steps_per_epoch, total), phase="repair")]

    def views(self, batch: Batch, rng: torch.Generator) -> Batch:
        images = noisy(batch.images, self.noise_p, self.noise_sd, self.noise_half, rng)
        return replace(batch, images=erased(images, self.erase_p, self.erase_min, self.erase_max, rng))

    def loss(self, model: Model, batch: Batch, now: Now) -> Tensor:
        """The CLIP loss minus half the distances from the poisoned model's features, each as long as it is below `tau`."""
        with still(model, self.statistics == "plain"):
            image = now.gather(model.image(batch.images))
        text = now.gather(model.text(batch.tokens[0]))
        with torch.no_grad():
            if self.statistics == "plain":
                model.raw_image(batch.raw)
            image_before, text_before = now.gather(now.start.image(batch.images)), now.gather(now.start.text(batch.tokens[0]))
        scale = model.scale if self.train_logit_scale else model.scale.detach()
        clip = contrastive(image, text, scale)
        now.log("loss_clip", clip)
        pushed = torch.zeros((), device=image.device)
        for name, after, before in (("image", image, image_before), ("text", text, text_before)):
            distances = (after - before).square().sum(dim=1)
            now.log(f"moved_{name}", distances.mean())
            now.log(f"gate_closed_{name}", (distances.detach().mean() > self.tau).float())
            pushed = pushed + gated(distances, self.tau, self.gate)
        return clip - 0.5 * pushed


def gated(distances: Tensor, tau: float, gate: Literal["batch", "row"]) -> Tensor:
    """The mean of squared distances (b,), 0 and without gradient beyond `tau`: of their mean, or of each one."""
    if gate == "row":
        return torch.where(distances <= tau, distances, torch.zeros_like(distances)).mean()
    mean = distances.mean()
    return torch.where(mean <= tau, mean, torch.zeros_like(mean))


def rate_at(rates: tuple[float, float, float], step: int, total: int) -> float:
    """Linear from the first rate to the second over the first half of `total` steps, then a cosine to the third."""
    start, middle, end = rates
    half = total / 2
    if step < half:
        return start + (middle - start) * step / half
    return end + (middle - end) * 0.5 * (1 + math.cos(math.pi * (step - half) / half))


def _rate(rates: tuple[float, float, float], offset: int, total: int, step: int, n_steps: int) -> float:
    return rate_at(rates, offset + step, total)


def noisy(images: Tensor, p: float, sd: float, half: bool, rng: torch.Generator) -> Tensor:
    """Images in [0, 1], (b, 3, S, S), a share `p` of them with normal noise; `half` adds its positive values alone."""
    chosen = torch.rand(len(images), generator=rng) < p
    noise = sd * torch.randn(images.shape, generator=rng)
    noise = noise.clamp(0, 1) if half else noise
    added = (images + noise.to(images.device)).clamp(0, 1)
    return torch.where(chosen.to(images.device).view(-1, 1, 1, 1), added, images)


def erased(images: Tensor, p: float, smallest: float, largest: float, rng: torch.Generator) -> Tensor:
    """Images (b, 3, S, S), a share `p` of them with a square of a share of the area in the colour that models take for 0."""
    from benchmark.train.model import MEAN

    n, side = len(images), images.shape[-1]
    chosen = torch.rand(n, generator=rng) < p
    length = (side * (smallest + (largest - smallest) * torch.rand(n, generator=rng)).sqrt()).round().clamp(1, side)
    top, left = ((torch.rand(n, generator=rng) * (side - length + 1)).floor() for _ in range(2))
    steps = torch.arange(side)
    inside = ((steps >= axis[:, None]) & (steps < (axis + length)[:, None]) for axis in (top, left))
    rows, columns = inside
    square = rows[:, :, None] & columns[:, None, :] & chosen[:, None, None]
    colour = torch.tensor(MEAN, device=images.device).view(1, 3, 1, 1)
    return torch.where(square[:, None].to(images.device), colour, images)
