"""What every filter does: train a suspect model, score rows, drop the most suspicious, train again for as many steps."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from benchmark.contract import Defense
from benchmark.errors import BenchError
from benchmark.suspicion.neighbours import finite
from benchmark.train.lab import Lab, Neighbourhood
from benchmark.train.model import Model
from defenses._warmup import of_epochs
from defenses.clip import Clip


class Filter(Defense):
    """Drops rows by a score and trains plain CLIP on the others.

    Source: the filter that inherits from this.
    """

    kind = "filter"

    drop: float | None = Field(0.2, gt=0, lt=0.5, description="Share of the rows to drop, the most suspicious first. null: the rows that the score's own threshold flags.")
    suspect_epochs: int | None = Field(None, ge=1, description="Epochs of the model under which rows are scored; null: the whole run, the very training of `clip`.")

    def suspect(self, lab: Lab) -> Model:
        """The model under which rows are scored."""
        return lab.train(Clip(), epochs=self.suspect_epochs, warmup_frac=of_epochs(lab, self.suspect_epochs)).model

    def without_the_most_suspicious(self, lab: Lab, name: str, scores: Tensor, flagged: NDArray[np.bool_], neighbourhood: Neighbourhood | None = None) -> Model:
        """Hands in scores (n,) and the rows that the score's own threshold flags, and trains without those to be dropped."""
        scores, n_odd = finite(scores.double())
        if n_odd:
            lab.warn(f"{name}: {n_odd} scores were not finite and count as the most or least suspicious")
        lab.scores(name, scores, flagged, neighbourhood)
        if self.drop is not None:
            return retrain(lab, kept(scores.numpy(), self.drop))
        if flagged.all() or not flagged.any():
            raise BenchError(f"the own threshold of {name} flags {int(flagged.sum())} of {len(flagged)} rows, so there is nothing to train; give a share with defense.drop")
        return retrain(lab, np.flatnonzero(~flagged))


def kept(scores: NDArray[np.float64], share: float) -> NDArray[np.int64]:
    """Rows that are left when round(share n) of the highest scores go; of equal scores the lower row goes first."""
    order = np.argsort(-scores, kind="stable")
    return np.sort(order[round(share * len(scores)) :])


def retrain(lab: Lab, rows: NDArray[np.int64]) -> Model:
    """Plain CLIP on these rows, for as many steps as all rows get, rounded up to whole sweeps."""
    settings = lab.train_settings
    return lab.train(Clip(), rows=rows, steps=len(lab.pairs) // settings.batch_size * settings.epochs).model


def above_the_usual(scores: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Rows above the median by three robust standard deviations: a threshold that needs no labels."""
    middle = float(np.median(scores))
    return np.asarray(scores > middle + 3 * 1.4826 * float(np.median(np.abs(scores - middle))))


def top(scores: NDArray[np.float64], share: float) -> NDArray[np.bool_]:
    """The round(share n) rows with the highest scores."""
    flagged = np.ones(len(scores), dtype=np.bool_)
    flagged[kept(scores, share)] = False
    return flagged
