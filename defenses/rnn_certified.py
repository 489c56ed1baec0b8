"""Certificate: the vote of all labelled images within a radius, on the image features of plain CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from pydantic import Field
from torch import Tensor

from benchmark.contract import Certificates, Defense, View
from benchmark.train.lab import Lab
from benchmark.train.model import Model
from defenses._certificates import ball_votes, gaps, joint_turned, winners
from defenses._distances import blocks, cosine_distances, typical_radius
from defenses.clip import Clip


class RNNCertified(Defense):
    """Classifies by a vote of the labelled images in a ball around the query, and says how many of those may be changed.

    An image in the ball counts whatever the others are, so that attacks on many queries at once cost the attacker more; the
    joint certificate counts that. The proof trusts the encoder: it does not cover poisoned pre-training.

    Source: Jia, Liu, Cao, Gong, AAAI 2022, arXiv 2012.03765.
    Differs from the paper: the joint certificate is this project's, in its spirit; the ball's radius comes from clean pairs.
    """

    kind = "certificate"
    paper = "Jia et al. 2022, arXiv 2012.03765"
    trusts = "the encoder"
    needs_support = True

    radius: float | None = Field(None, gt=0, le=2, description="Cosine distance of the ball; None chooses it on clean pairs.")
    share: float = Field(0.05, gt=0, le=1, description="Share of the images that a typical ball holds, where the radius is chosen.")
    n_clean: int = Field(200, ge=2, description="Clean pairs on which the radius is chosen; their captions are not used.")
    longest: int = Field(256, ge=1, description="Largest radius against images added or taken away that is shown; larger ones are cut to it.")

    _radius: float | None = None

    def clean_wanted(self) -> int:
        return self.n_clean if self.radius is None else 0

    def defend(self, lab: Lab) -> Model:
        clean = lab.clean_pairs(self.n_clean) if self.radius is None else None  # asked for before anything is trained
        model = lab.train(Clip()).model
        self._radius = self.radius if clean is None else typical_radius(model.encode_images(clean.pairs.images), self.share)
        return model

    def certify(self, views: Sequence[View], labels: Tensor, n_classes: int) -> list[Certificates]:
        (view,) = views
        assert self._radius is not None
        parts = blocks(len(view.queries), 24 * len(labels))  # distances, and which of them are short
        votes = np.concatenate([ball_votes(cosine_distances(view.queries[part], view.support), labels.numpy(), n_classes, self._radius) for part in parts])
        best, ahead, empty = winners(votes), gaps(votes), votes.sum(axis=1) == 0
        longest, tau = min(self.longest, len(labels)), self._radius
        single = np.where(empty, -1, np.minimum(ahead, longest))
        about = f"the vote of the labelled images in a ball around the query, of {len(labels)}; queries with an empty ball are not certified"
        return [
            Certificates("insert", best, single, "labelled images added", "encoder", about, longest, tau),
            Certificates(
                "modify", best, np.where(empty, -1, np.minimum(ahead // 2, longest)), "labelled images changed", "encoder", about, longest, tau, partial(joint_turned, ahead, best)
            ),
            Certificates("delete", best, single, "labelled images taken away", "encoder", about, longest, tau),
        ]
