"""Filter by words that go with one kind of image against the rest of their captions."""

from __future__ import annotations

import numpy as np
import torch
from pydantic import Field

from benchmark.suspicion.clusters import spherical_kmeans, usual_number
from benchmark.suspicion.words import word_lift
from benchmark.train.lab import Lab
from benchmark.train.model import Model
from defenses._filter import Filter

SHOWN = 5


class NgramLift(Filter):
    """Drops captions with a group of words that stands with one kind of image although the rest of the caption argues for another.

    That is what a text trigger is: a rare word or a sentence whose captions tell of many things and whose images show one. A
    class word goes with one kind of image too, but then the rest of the caption agrees or is silent.

    Source: this project (docs/methods/filters.md).
    Differs from the paper: none exists.
    """

    paper = "this project"

    min_rows: int = Field(5, ge=2, description="Words in fewer captions are not looked at.")
    jaccard: float = Field(0.8, gt=0, le=1, description="Words that share this part of their captions are one group.")
    n_clusters: int | None = Field(None, ge=2, description="Kinds of images; null: half the root of the number of rows, from 8 to 512.")

    def defend(self, lab: Lab) -> Model:
        image, _ = lab.features(self.suspect(lab))
        clusters = spherical_kmeans(image, self.n_clusters or usual_number(len(image)), lab.rng("clusters"))
        found = word_lift(lab.pairs.captions, clusters.numpy(), self.min_rows, self.jaccard)
        for group in np.argsort(-found.scores, kind="stable")[:SHOWN].tolist():
            if found.scores[group] > 0:
                lab.log(f"ngram_lift: {' '.join(found.words[group])!r} in {found.n_rows[group]} captions, score {found.scores[group]:.2f}")
        return self.without_the_most_suspicious(lab, "ngram_lift", torch.from_numpy(found.rows), found.rows > 0)
