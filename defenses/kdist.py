"""Filter by the distance to the k-th nearest neighbour."""

from __future__ import annotations

from torch import Tensor

from benchmark.suspicion.neighbours import Points, kdist
from defenses._neighbour_filter import NeighbourFilter


class KDist(NeighbourFilter):
    """Drops images that are far from the k-th nearest point of a reference.

    Poisoned images sit where few others do. But poisons of one attack are alike: from k of them on in the reference they are each
    other's neighbours and look dense, so the reference has to hold far fewer, or none.

    Source: Ramaswamy et al., SIGMOD 2000; as a detector Huang et al., ICLR 2025, arXiv 2502.01385.
    Differs from the paper: the k-th neighbour is the k-th, in the released code the k+1-th; trusted pairs are the default reference.
    """

    paper = "Ramaswamy et al. 2000; Huang et al. 2025, arXiv 2502.01385"

    def estimate(self, queries: Points, reference: Points) -> Tensor:
        return kdist(queries, reference, self.k)
