"""Control: drops a share of the rows at random."""

import numpy as np
from pydantic import Field

from benchmark.contract import Defense
from benchmark.train.lab import Lab
from benchmark.train.model import Model
from defenses._filter import retrain


class RandomDrop(Defense):
    """Trains plain CLIP on all rows but a random share, for as many steps as all rows get.

    What a filter that drops the same share is worth if it knows nothing. It is told nothing.

    Source: this project.
    Differs from the paper: none exists.
    """

    default = False
    kind = "control"

    drop: float = Field(0.2, gt=0, lt=0.5, description="Share of the rows to drop.")

    def defend(self, lab: Lab) -> Model:
        n = len(lab.pairs)
        return retrain(lab, np.sort(lab.rng("drop").permutation(n)[round(self.drop * n) :]))
