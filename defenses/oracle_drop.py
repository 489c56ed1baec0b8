"""Control: drops the poisoned rows and, at random, as many others as a filter would."""

import numpy as np
from pydantic import Field

from benchmark.contract import Defense
from benchmark.errors import BenchError
from benchmark.train.lab import Lab, ToldLab
from benchmark.train.model import Model
from defenses._filter import retrain


class OracleDrop(Defense):
    """Trains plain CLIP without the poisoned rows, which it is told, and without random others up to a share of all rows.

    What the false alarms of a filter that drops this share cost by themselves.

    Source: this project.
    Differs from the paper: none exists.
    """

    default = False
    kind = "control"
    told = "record"

    drop: float = Field(0.2, gt=0, lt=0.5, description="Share of the rows to drop, the poisoned ones among them.")

    def defend(self, lab: Lab) -> Model:
        assert isinstance(lab, ToldLab)
        n, poisoned = len(lab.pairs), np.array(sorted(lab.told_rows()), dtype=np.int64)
        quota = round(self.drop * n)
        if len(poisoned) > quota:
            raise BenchError(f"{len(poisoned)} rows are poisoned and defense.drop = {self.drop:g} drops {quota} of {n}; raise it to {len(poisoned) / n:.4f} or more")
        clean = np.setdiff1d(lab.rng("drop").permutation(n), poisoned, assume_unique=True)
        return retrain(lab, np.sort(clean[quota - len(poisoned) :]))
