"""Control: drops as many rows as are poisoned, at random."""

import numpy as np

from benchmark.contract import Defense
from benchmark.train.lab import Lab, ToldLab
from benchmark.train.model import Model
from defenses.clip import Clip


class Random(Defense):
    """Trains plain CLIP on all rows but a random draw of as many as are poisoned; it is told how many.

    What a filter is worth that knows nothing.

    Source: this project.
    Differs from the paper: none exists.
    """

    default = False
    kind = "control"
    told = "count"

    def defend(self, lab: Lab) -> Model:
        assert isinstance(lab, ToldLab)
        order = lab.rng("drop").permutation(len(lab.pairs))
        return lab.train(Clip(), rows=np.sort(order[lab.told_count() :])).model
