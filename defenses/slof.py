"""Filter by the simplified local outlier factor."""

from __future__ import annotations

from torch import Tensor

from benchmark.suspicion.neighbours import Points, slof
from defenses._neighbour_filter import NeighbourFilter


class SLOF(NeighbourFilter):
    """Drops images whose k-th neighbour is far away compared with how far its neighbours' k-th neighbours are.

    Unlike the distance itself the ratio does not mistake every sparse region for poison.

    Source: Schubert, Zimek, Kriegel, DMKD 2014; as a detector Huang et al., ICLR 2025, arXiv 2502.01385.
    Differs from the paper: neighbours are looked up under their own numbers, which the released code shifts by one or two; query
    and reference take the same k-th distance; trusted pairs are the default reference.
    """

    paper = "Schubert et al. 2014; Huang et al. 2025, arXiv 2502.01385"

    def estimate(self, queries: Points, reference: Points) -> Tensor:
        return slof(queries, reference, self.k)
