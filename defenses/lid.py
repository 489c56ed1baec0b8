"""Filter by local intrinsic dimension."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from benchmark.suspicion.neighbours import Points, lid
from benchmark.train.lab import Lab
from benchmark.train.model import Model
from defenses._neighbour_filter import NeighbourFilter


class LID(NeighbourFilter):
    """Drops images around which the neighbourhood has a high intrinsic dimension, by its maximum-likelihood estimate.

    A few poisons in the reference already turn the order of these scores round, so it needs a trusted one.

    Source: Amsaleg et al., KDD 2015; as a detector Huang et al., ICLR 2025, arXiv 2502.01385.
    Differs from the paper: the k-th distance is the scale, in the released code the k+1-th; nothing is added inside the
    logarithms; trusted pairs are the default reference.
    """

    paper = "Amsaleg et al. 2015; Huang et al. 2025, arXiv 2502.01385"

    k: int = Field(64, ge=2, description="How many neighbours. Paper: 64.")

    def defend(self, lab: Lab) -> Model:
        if self.reference != "clean":
            lab.warn(
                f"lid: a reference of the rows themselves (defense.reference={self.reference}) may hold poison, and fewer than k/4 = {self.k / 4:g} poisoned rows can already turn "
                "the order of these scores round; defense.reference=clean takes trusted pairs"
            )
        return super().defend(lab)

    def estimate(self, queries: Points, reference: Points) -> Tensor:
        return lid(queries, reference, self.k)
