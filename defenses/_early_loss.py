"""How fast each pair is learned: its CLIP loss after each of the first epochs."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from benchmark.contract import Defense, Pass
from benchmark.train.lab import Lab
from benchmark.train.loop import Now
from benchmark.train.schedule import factor, warmup


def pair_losses(image: Tensor, text: Tensor, scale: float, batch_size: int, rng: torch.Generator) -> Tensor:
    """CLIP loss (n,) of each pair among a random batch of others; features unit-length (n, d). Chance is ln(batch_size).

    Batches are all of one size; the last is filled up with rows of the first.
    """
    n = len(image)
    order = torch.randperm(n, generator=rng)
    batches = torch.cat([order, order[: -n % batch_size]]).view(-1, batch_size) if n >= batch_size else order[None]
    labels, losses = torch.arange(batches.shape[1]), torch.empty(n)
    for rows in batches.flip(0):  # a row that is there twice keeps its loss among the first batch
        logits = scale * image[rows] @ text[rows].T
        losses[rows] = (functional.cross_entropy(logits, labels, reduction="none") + functional.cross_entropy(logits.T, labels, reduction="none")) / 2
    return losses


def n_early(epochs: int) -> int:
    """How many epochs are early: 10 of 32 of a run, at least 3."""
    return min(epochs, max(3, round(10 * epochs / 32)))


class _Watched(Defense):
    """The beginning of a run of plain CLIP, with the loss of every pair after each epoch but the last."""

    peak: float = Field(description="Peak rate of the run.")
    warm: int = Field(description="Warm-up of the run in steps.")
    total: int = Field(description="Steps of the run.")
    late: int = Field(description="Steps by which the run's schedule is late.")

    def plan(self, epoch: int, now: Now) -> list[Pass]:
        if epoch > 1:
            image, text = now.features()
            losses = pair_losses(image, text, float(now.model.scale.detach()), now.batch_size, now.generator(f"early loss {epoch - 1}"))
            self.state["losses"] = self.state["losses"].cpu() + losses if "losses" in self.state else losses
        offset = now.steps_per_epoch * (epoch - 1) + self.late
        return [Pass(lr=lambda step, n_steps: self.peak * factor(offset + step, self.warm, self.total))]


def early_loss(lab: Lab, epochs: int | None = None, augmented: bool | None = None) -> Tensor:
    """Mean CLIP loss (n,) of each pair after each of the first epochs of plain CLIP, measured without augmentation.

    The training is the beginning of the run's own, at the same rates.
    """
    settings = lab.train_settings
    epochs = n_early(settings.epochs) if epochs is None else min(epochs, settings.epochs)
    steps = len(lab.pairs) // settings.batch_size
    total = steps * settings.epochs
    watched = _Watched(peak=settings.lr, warm=warmup(settings, total), total=total, late=steps if settings.schedule == "official" else 0)
    trained = lab.train(watched, epochs=epochs, warmup_frac=0.0, augmented=augmented)
    image, text = lab.features(trained.model)
    batch_size = min(settings.batch_size, len(image))
    losses = pair_losses(image, text, float(trained.model.scale.detach()), batch_size, torch.Generator().manual_seed(epochs))
    return (losses + trained.state["losses"]) / epochs if "losses" in trained.state else losses
