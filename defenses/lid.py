"""Filter by local intrinsic dimension."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from benchmark.suspicion.neighbours import Points, lid
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

    def estimate(self, queries: Points, reference: Points) -> Tensor:
        return lid(queries, reference, self.k)
