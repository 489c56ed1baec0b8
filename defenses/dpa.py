"""DPA: train a model on each of several disjoint parts of the pairs, and let them vote."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from benchmark.contract import Certificates, Defense, View
from benchmark.train.lab import Lab, PairsView
from benchmark.train.model import Model
from defenses._certificates import partition_certificates
from defenses._warmup import shrunk
from defenses.clip import Clip


class DPA(Defense):
    """Splits the pairs by a hash of their content, trains plain CLIP on each part from the same seed, and takes the majority's class.

    One image more or less changes one part, and so one vote: how many images an attacker needs at least can be counted off.

    Source: Levine and Feizi, ICLR 2021, arXiv 2006.14768, carried over from classifiers to pre-training by this project.
    Differs from the paper: the models are CLIP models that classify zero-shot. A demonstrator: small parts give weak models.
    """

    kind = "certificate"
    paper = "Levine and Feizi 2021, arXiv 2006.14768"
    trusts = "nothing"
    tiny: ClassVar = {"parts": 2}

    parts: int = Field(5, ge=1, description="How many parts; an odd number leaves fewer ties.")
    by: Literal["image", "row"] = Field("image", description="image: all captions of an image fall into one part, so the unit of the certificate is an image. row: it is a pair.")

    def defend(self, lab: Lab) -> list[Model]:
        names = [content_hash(lab.pairs, row, self.by) for row in range(len(lab.pairs))]
        parts = partition(names, [content_hash(lab.pairs, row, "row") for row in range(len(names))] if self.by == "image" else names, self.parts)
        lab.log(f"{self.parts} parts of {min(map(len, parts))} to {max(map(len, parts))} pairs")
        return [self._train(lab, part) for part in parts]

    def certify(self, views: Sequence[View], labels: Tensor, n_classes: int) -> list[Certificates]:
        return partition_certificates(np.stack([view.predicted.numpy() for view in views]), n_classes, "images" if self.by == "image" else "rows")

    def _train(self, lab: Lab, rows: list[int]) -> Model:
        """A function of the part's pairs alone; fewer than two of them train nothing."""
        if len(rows) < 2:
            return lab.untrained()
        settings = lab.train_settings
        batch_size = min(settings.batch_size, len(rows))
        steps = len(rows) // batch_size * settings.epochs
        # The whole run is reckoned from the part: the number of all pairs would let a row elsewhere change this model.
        return lab.train(Clip(), rows=rows, batch_size=batch_size, warmup_frac=shrunk(settings, steps, steps * self.parts)).model


def content_hash(pairs: PairsView, row: int, by: Literal["image", "row"]) -> str:
    """SHA-256 of a row's pixels, and of its caption too where rows are told apart by both."""
    hasher = hashlib.sha256(pairs.images[row].tobytes())
    if by == "row":
        hasher.update(b"\0" + pairs.captions[row].encode())
    return hasher.hexdigest()


def partition(names: list[str], order_by: list[str], parts: int) -> list[list[int]]:
    """Rows of each part: the name modulo the number of parts says which, and within a part the second name says the order.

    Where a row stands among the pairs plays no role, so that one more row elsewhere changes nothing here.
    """
    ordered = sorted(range(len(names)), key=lambda row: (names[row], order_by[row]))
    found: list[list[int]] = [[] for _ in range(parts)]
    for row in ordered:
        found[int(names[row], 16) % parts].append(row)
    return found
