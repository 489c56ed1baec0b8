"""Control: drops exactly the poisoned rows."""

import numpy as np

from benchmark.contract import Defense
from benchmark.train.lab import Lab, ToldLab
from benchmark.train.model import Model
from defenses.clip import Clip


class Oracle(Defense):
    """Trains plain CLIP on everything but the poisoned rows, which it is told.

    What a perfect filter would reach; not a defense that anybody could run.

    Source: this project.
    Differs from the paper: none exists.
    """

    default = False
    kind = "control"
    told = "record"

    def defend(self, lab: Lab) -> Model:
        assert isinstance(lab, ToldLab)
        poisoned = set(lab.told_rows())
        keep = np.array([row for row in range(len(lab.pairs)) if row not in poisoned])
        return lab.train(Clip(), rows=keep).model
