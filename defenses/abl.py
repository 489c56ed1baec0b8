"""ABL for CLIP: isolate the pairs that are learned first, then unlearn them."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from benchmark.contract import Batch, Defense, Pass
from benchmark.errors import BenchError
from benchmark.train.lab import Lab
from benchmark.train.loop import Now
from benchmark.train.loss import contrastive
from benchmark.train.model import Model
from defenses._early_loss import early_loss
from defenses._repair import poisoned
from defenses.clip import Clip

Unlearn = Literal["constraint", "ascent", "filter"]
ASCENT_LR = 1e-6


class ABL(Defense):
    """Isolates the pairs that plain CLIP learns first, then trains the poisoned model until it no longer holds them.

    A backdoor is a shortcut, so its pairs should be learned early. A known weak baseline: pairs of frequent, easy content are learned early too.

    Source: the idea of Anti-Backdoor Learning, Li et al., NeurIPS 2021, arXiv 2110.11571, as CleanCLIP's and Semantic-Shield's released code carry it over to CLIP.
    Differs from the paper: pairs instead of labelled images; the released code of CleanCLIP pulls isolated pairs together (target_cos=1), which is not unlearning.
    """

    kind = "repair"
    paper = "after Li et al. 2021, arXiv 2110.11571"
    tiny: ClassVar = {"isolate_frac": 0.2, "epochs": 2}

    isolate_frac: float = Field(0.02, gt=0, lt=1, description="Share of the pairs that are isolated. CleanCLIP's code: 0.02; Semantic-Shield's: 0.001.")
    score: Literal["early_loss", "similarity_high"] = Field("early_loss", description="What is suspicious: a low loss in the first epochs, or a high similarity after training.")
    early_epochs: int | None = Field(None, ge=1, description="Epochs whose losses count; None is 10 of 32 of the run, at least 3. Huang et al. 2025: 10 of 32.")
    unlearn: Unlearn = Field(
        "constraint",
        description="constraint: pull the cosine of isolated pairs to target_cos, beside the CLIP loss on the others. ascent: raise their loss. filter: retrain without them.",
    )
    target_cos: float = Field(0.0, ge=-1, le=1, description="Cosine that isolated pairs are pulled to. CleanCLIP's code amounts to 1.")
    weight: float = Field(1.0, ge=0, description="Weight of the constraint. CleanCLIP's code: 1.")
    lr: float | None = Field(None, gt=0, description="Learning rate of unlearning; None is constraint_lr for the constraint and 1e-6 for ascent. Semantic-Shield's code: 1e-8.")
    constraint_lr: float = Field(1e-5, gt=0, description="Rate of the constraint where lr is None; scales set it.")
    epochs: int = Field(5, ge=1, description="Epochs of unlearning. Semantic-Shield's code: 5.")

    def defend(self, lab: Lab) -> Model:
        n = len(lab.pairs)
        n_isolated = round(self.isolate_frac * n)
        if n_isolated < 2 or n - n_isolated < 2:
            raise BenchError(f"abl isolates {n_isolated} of {n} pairs at defense.isolate_frac={self.isolate_frac:g}; unlearning needs at least 2, and 2 others")
        suspicion = self._suspicion(lab)
        order = isolation_order(suspicion)
        isolated = order[:n_isolated]
        lab.scores("isolation", suspicion, np.isin(np.arange(n), isolated))
        if self.unlearn == "filter":
            settings = lab.train_settings
            return lab.train(Clip(), rows=np.sort(order[n_isolated:]), steps=settings.epochs * (n // settings.batch_size)).model
        lr = self.rate()
        worker = _Unlearning(n_isolated=n_isolated, how=self.unlearn, target_cos=self.target_cos, weight=self.weight, lr=lr)
        given: dict[str, Any] = {"epochs": self.epochs, "lr": lr, "warmup_frac": 0.0, "schedule": "fixed"}
        if self.unlearn == "ascent":
            given |= {"batch_size": min(lab.train_settings.batch_size, n_isolated), "betas": (0.9, 0.98), "weight_decay": 0.002}
        rows = np.concatenate([np.sort(isolated), np.sort(order[n_isolated:])])
        model = lab.train(worker, rows=rows, start=poisoned(lab), **given).model
        lab.kept_rows = None  # all rows were trained on, those in front to unlearn them
        return model

    def rate(self) -> float:
        """Learning rate of unlearning: the user's, else that of the way in which is unlearned."""
        return self.lr or (self.constraint_lr if self.unlearn == "constraint" else ASCENT_LR)

    def _suspicion(self, lab: Lab) -> NDArray[np.float64]:
        if self.score == "early_loss":
            return -early_loss(lab, self.early_epochs, augmented=False).double().numpy()
        image, text = lab.features(poisoned(lab))
        return (image * text).sum(dim=1).double().numpy()


class _Unlearning(Defense):
    """Trains on all rows, of which the first `n_isolated` are to be unlearned."""

    n_isolated: int = Field(description="Rows in front that are isolated.")
    how: Unlearn = Field(description="Constraint or ascent.")
    target_cos: float = Field(description="Where the constraint pulls cosines.")
    weight: float = Field(description="Weight of the constraint.")
    lr: float = Field(description="Rate of ascent.")

    def plan(self, epoch: int, now: Now) -> list[Pass]:
        if self.how == "constraint":
            return [Pass(phase="unlearn")]
        image, text = now.features(np.arange(self.n_isolated, min(now.n_rows, self.n_isolated + 1024)))
        now.log("loss_rest", contrastive(image, text, now.model.scale.detach().cpu()))
        return [Pass(np.arange(self.n_isolated), self.ascent_loss, self._rate, "ascent")]

    def loss(self, model: Model, batch: Batch, now: Now) -> Tensor:
        """The CLIP loss of the rows that are not isolated, and the constraint on those that are."""
        image, text, rows = now.gather(model.image(batch.images)), now.gather(model.text(batch.tokens[0])), now.gather(batch.rows)
        isolated = rows < self.n_isolated
        loss = 0.0 * model.scale
        if int((~isolated).sum()) > 1:
            loss = loss + contrastive(image[~isolated], text[~isolated], model.scale)
        if bool(isolated.any()):
            cosines = (image * text).sum(dim=1)[isolated]
            now.log("cos_isolated", cosines.mean())
            loss = loss + self.weight * constraint(cosines, self.target_cos)
        return loss

    def ascent_loss(self, model: Model, batch: Batch, now: Now) -> Tensor:
        """Minus the CLIP loss; nothing moves any more once it has come to ln(batch), the value of chance."""
        if self.state.get("at_chance"):
            now.tally("steps_at_chance")
            return 0.0 * model.scale
        image, text = now.gather(model.image(batch.images)), now.gather(model.text(batch.tokens[0]))
        loss = contrastive(image, text, model.scale)
        now.log("loss_isolated", loss)
        self.state["at_chance"] = bool(loss.detach() >= math.log(len(image)))
        return -loss

    def _rate(self, step: int, n_steps: int) -> float:
        return 0.0 if self.state.get("at_chance") else self.lr


def isolation_order(suspicion: NDArray[np.float64]) -> NDArray[np.int64]:
    """Rows (n,), the most suspicious first, ties in the order of rows."""
    return np.argsort(-suspicion, kind="stable")


def constraint(cosines: Tensor, target: float) -> Tensor:
    """Mean squared distance of cosines (n,) from the target."""
    return (cosines - target).square().mean()
