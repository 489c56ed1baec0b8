"""Certificate: few-shot classification by trimmed mean distances, on the image features of plain CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from benchmark.contract import Certificates, Defense, View
from benchmark.errors import BenchError
from benchmark.train.lab import Lab
from benchmark.train.model import Model
from defenses._certificates import few_shot_radii
from defenses._distances import cosine_distances
from defenses.clip import Clip


class FCert(Defense):
    """Classifies by the middle of the distances to a few labelled images of each class, and says how many of those may be changed.

    The nearest and the farthest images of a class do not count, so a few changed ones cannot move its distance far. The proof
    trusts the encoder: it does not cover poisoned pre-training.

    Source: Wang, Zou, Jia, IEEE S&P 2024, arXiv 2404.08631.
    Differs from the paper: all classes of the evaluation set at once instead of episodes of some, on CLIP trained by the run.
    """

    kind = "certificate"
    paper = "Wang et al. 2024, arXiv 2404.08631"
    trusts = "the encoder"
    needs_support = True

    shots: int = Field(15, ge=1, description="Labelled images of each class, the first in order; fewer where the smallest class has fewer. Released code: 10 to 15.")
    distance: Literal["squared", "euclidean"] = Field("squared", description="squared: of unit-length features, as the released code; euclidean: its root.")

    def defend(self, lab: Lab) -> Model:
        return lab.train(Clip()).model

    def certify(self, views: Sequence[View], labels: Tensor, n_classes: int) -> list[Certificates]:
        (view,) = views
        chosen = first_of_each(labels.numpy(), n_classes, self.shots)
        distances = 2 * cosine_distances(view.queries, view.support[chosen.ravel()]).reshape(len(view.queries), *chosen.shape)
        if self.distance == "euclidean":
            distances = np.sqrt(np.maximum(distances, 0))
        shots = chosen.shape[1]
        about, cut = f"trimmed mean distances to {shots} labelled images of each of {n_classes} classes", (shots - 1) // 2
        found = []
        for name, everywhere, unit in (("group", False, "labelled images changed in all"), ("individual", True, "labelled images changed in every class")):
            predicted, radius = few_shot_radii(distances, everywhere)
            found.append(Certificates(name, predicted, radius, unit, "encoder", about, cut, shots))
        return found


def first_of_each(labels: NDArray[np.int64], n_classes: int, shots: int) -> NDArray[np.int64]:
    """Places (C, K) of the first images of each class; K is the smallest class's size if that is less than `shots`.

    Raises:
        BenchError: a class without an image.
    """
    places = [np.flatnonzero(labels == one)[:shots] for one in range(n_classes)]
    fewest = min(map(len, places))
    if fewest == 0:
        raise BenchError(
            f"class {next(one for one, of in enumerate(places) if not len(of))} of the evaluation set has no labelled image, and a few-shot classifier needs one of each class"
        )
    return np.stack([of[:fewest] for of in places])
