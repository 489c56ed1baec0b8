"""Filter by the dimension-aware outlier factor."""

from __future__ import annotations

from torch import Tensor

from benchmark.suspicion.neighbours import Points, dao
from defenses._neighbour_filter import NeighbourFilter


class DAO(NeighbourFilter):
    """Drops images by the log of the distance ratio of `slof`, weighted with the local intrinsic dimension of each neighbour.

    In a region of high dimension a small excess in distance already means a much thinner neighbourhood.

    Source: Anderberg et al., SDM 2024, arXiv 2401.05453; as a detector Huang et al., ICLR 2025, arXiv 2502.01385.
    Differs from the paper: neighbours under their own numbers, no zero self-distance in the dimension, nothing added inside
    logarithms; trusted pairs are the default reference.
    """

    paper = "Anderberg et al. 2024, arXiv 2401.05453; Huang et al. 2025, arXiv 2502.01385"

    def estimate(self, queries: Points, reference: Points) -> Tensor:
        return dao(queries, reference, self.k)
