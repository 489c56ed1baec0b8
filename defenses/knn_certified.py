"""Certificate: k nearest neighbours on the image features of plain CLIP."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field
from torch import Tensor

from benchmark.contract import Certificates, Defense, View
from benchmark.train.lab import Lab
from benchmark.train.model import Model
from defenses._certificates import Ints, knn_added, knn_modified, knn_removed, nearest_votes, winners
from defenses._distances import blocks, cosine_distances
from defenses.clip import Clip


class KNNCertified(Defense):
    """Classifies by a vote of the k nearest labelled images, and says how many of those an attacker may change.

    A vote that is clear stays whatever a few labelled images say. The proof trusts the encoder, which is plain CLIP trained on
    the pairs: it does not cover poisoned pre-training.

    Source: Jia, Liu, Cao, Gong, AAAI 2022, arXiv 2012.03765.
    Differs from the paper: separate certificates for images that are added or taken away, beside the paper's for changed ones.
    """

    kind = "certificate"
    paper = "Jia et al. 2022, arXiv 2012.03765"
    trusts = "the encoder"
    needs_support = True

    k: int | None = Field(None, ge=1, description="Neighbours that vote; None for a twentieth of the labelled images.")
    longest: int = Field(256, ge=1, description="Largest radius against images taken away that is looked for; larger ones are cut to it.")

    def defend(self, lab: Lab) -> Model:
        return lab.train(Clip()).model

    def certify(self, views: Sequence[View], labels: Tensor, n_classes: int) -> list[Certificates]:
        (view,) = views
        k = self.k or max(1, round(len(labels) / 20))
        longest = min(self.longest, len(labels))
        about = f"the vote of the {k} nearest of {len(labels)} labelled images"
        # For each query: distances and their order, and votes with what they are summed from.
        of_each = 24 * len(labels) + 24 * (k + longest + 1) * n_classes
        parts = [self._radii(view.queries[block], view.support, labels, n_classes, k, longest) for block in blocks(len(view.queries), of_each)]
        best, added, changed, removed = (np.concatenate(part) for part in zip(*parts, strict=True))
        return [
            Certificates("insert", best, added, "labelled images added", "encoder", about, k - 1, k),
            Certificates("modify", best, changed, "labelled images changed", "encoder", about, k // 2, k),
            Certificates("delete", best, removed, "labelled images taken away", "encoder", about, longest, k),
        ]

    @staticmethod
    def _radii(queries: Tensor, support: Tensor, labels: Tensor, n_classes: int, k: int, longest: int) -> tuple[Ints, Ints, Ints, Ints]:
        """Classes of queries, and radii against images added, changed and taken away (m,)."""
        votes = nearest_votes(cosine_distances(queries, support), labels.numpy(), n_classes, k + longest)
        return winners(votes[:, k]), knn_added(votes, k), knn_modified(votes, k), knn_removed(votes, k)
