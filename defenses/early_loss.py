"""Filter by the loss of a pair in the first epochs."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from benchmark.contract import Defense, Pass
from benchmark.errors import BenchError
from benchmark.train import schedule
from benchmark.train.lab import Lab
from benchmark.train.loop import Now
from benchmark.train.model import Model
from defenses._filter import Filter, top
from defenses._warmup import of_epochs

OWN_SHARE = 0.02


class EarlyLoss(Filter):
    """Drops pairs whose loss is low in the first epochs, averaged over them.

    A trigger with one target is easier to learn than what images show, so backdoored pairs should be learned first.
    `suspicious=high` takes the pairs that are learned last: captions that contradict their image.

    Source: Li et al. (ABL), NeurIPS 2021, arXiv 2110.11571; with the CLIP loss Huang et al., ICLR 2025, arXiv 2502.01385.
    Differs from the paper: rows are scored without augmentation, in random batches of the training's size.
    """

    paper = "Li et al. 2021, arXiv 2110.11571; Huang et al. 2025, arXiv 2502.01385"

    epochs: int | None = Field(None, ge=1, description="Epochs that are observed; null: 10/32 of the run, at least 3. Paper: 10 of 32.")
    suspicious: Literal["low", "high"] = Field("low", description="Which losses are suspicious. Paper: low.")

    def defend(self, lab: Lab) -> Model:
        settings = lab.train_settings
        epochs = max(3, round(settings.epochs * 10 / 32)) if self.epochs is None else self.epochs
        if epochs > settings.epochs:
            raise BenchError(f"early_loss observes {epochs} epochs and the run has {settings.epochs}; lower defense.epochs")
        steps = len(lab.pairs) // settings.batch_size * settings.epochs
        late = len(lab.pairs) // settings.batch_size if settings.schedule == "official" else 0
        first = _FirstEpochs(peak=settings.lr, steps=steps, warmup=schedule.warmup(settings, steps), late=late)
        trained = lab.train(first, epochs=epochs, warmup_frac=of_epochs(lab, epochs))  # its passes bring the rates of the whole run
        last = pair_losses(*lab.features(trained.model), float(trained.model.scale.detach()), _order(len(lab.pairs), lab.rng("batches")), settings.batch_size)
        mean = (trained.state.get("losses", torch.zeros(len(lab.pairs))) + last) / epochs
        scores = -mean if self.suspicious == "low" else mean
        return self.without_the_most_suspicious(lab, "early_loss", scores, top(scores.numpy(), OWN_SHARE))


class _FirstEpochs(Defense):
    """The first epochs of plain CLIP on the whole run's schedule; adds up the loss of every pair after each epoch but the last.

    Source: docs/methods/filters.md.
    """

    peak: float = Field(description="Peak learning rate of the whole run.")
    steps: int = Field(description="Steps of the whole run.")
    warmup: int = Field(description="Warm-up steps of the whole run.")
    late: int = Field(description="By how many steps the schedule is late.")

    def plan(self, epoch: int, now: Now) -> list[Pass]:
        if epoch > 1:
            image, text = now.features()
            found = pair_losses(image, text, float(now.model.scale.detach()), torch.randperm(now.n_rows, generator=now.generator(f"batches {epoch}")), now.batch_size)
            self.state["losses"] = self.state["losses"].cpu() + found if "losses" in self.state else found
        before = now.steps_per_epoch * (epoch - 1) + self.late
        return [Pass(lr=lambda index, n: self.peak * schedule.factor(before + index, self.warmup, self.steps))]


def pair_losses(image: Tensor, text: Tensor, scale: float, order: Tensor, batch_size: int) -> Tensor:
    """CLIP loss (n,) of each pair among the pairs of its batch: the mean of its two cross-entropies.

    Args:
        image, text: unit-length features (n, d).
        order: int64 (n,), rows in the order in which batches are cut; the last batch is filled up from the beginning.
    """
    losses = torch.empty(len(image))
    for begin in range(0, len(order), batch_size):
        rows = order[begin : begin + batch_size]
        batch = torch.cat([rows, order[: batch_size - len(rows)]])
        logits = scale * image[batch] @ text[batch].T
        own = torch.arange(len(batch))
        both = (functional.cross_entropy(logits, own, reduction="none") + functional.cross_entropy(logits.T, own, reduction="none")) / 2
        losses[rows] = both[: len(rows)]
    return losses


def _order(n: int, rng: np.random.Generator) -> Tensor:
    return torch.from_numpy(rng.permutation(n))
