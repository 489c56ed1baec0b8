"""What filters by neighbours share: which points are the reference, and whether it can hold too much poison or too little of the rest."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from benchmark.errors import BenchError
from benchmark.suspicion.neighbours import Points
from benchmark.train.lab import Granted, Lab, Neighbourhood
from benchmark.train.model import Model
from defenses._filter import Filter, above_the_usual

TRUSTED = 2000
Groups = tuple[NDArray[np.int64], ...]


class NeighbourFilter(Filter):
    """Scores an image by its neighbours among the features of a reference set.

    Source: the filter that inherits from this.
    """

    clean_pairs_needed = TRUSTED
    tiny: ClassVar = {"reference_size": 64, "k": 8}

    k: int = Field(16, ge=2, description="How many neighbours. Paper: 16.")
    reference: Literal["clean", "sample", "batch", "all"] = Field(
        "clean", description="Where neighbours come from: trusted pairs, one random sample of the rows, the random batch of a row (paper), or all rows."
    )
    reference_size: int | None = Field(
        None,
        ge=1,
        description="M, pairs in the reference. null: 2,000 trusted pairs; k / (4 rho_max) rows of a sample or batch, half of that where captions are points too. Paper: 2,048.",
    )
    rho_max: float = Field(0.01, gt=0, lt=1, description="Largest poison rate to reckon with: a reference should hold at most k / 4 poisoned rows.")
    modalities: Literal["both", "image"] = Field("image", description="both: captions are points of the reference too, as in the paper; they are seldom near an image.")
    normalize: bool = Field(False, description="Features of unit length. Paper: as the towers give them.")

    def clean_wanted(self) -> int:
        return (self.reference_size or TRUSTED) if self.reference == "clean" else 0

    def estimate(self, queries: Points, reference: Points) -> Tensor:
        """Scores (n,) of queries."""
        raise NotImplementedError

    def defend(self, lab: Lab) -> Model:
        size = self.size(len(lab.pairs))
        if self.reference == "clean":
            trusted_pairs(lab, size)
        model = self.suspect(lab)
        scores, groups = self.scored(lab, model, size)
        for line in coverage(self.k, size, len(lab.task.classnames)):
            lab.warn(f"{self.name()}: {line}")
        poison = self.rho_max * size * self.points_of_a_pair
        if self.reference != "clean" and poison > self.k / 4:
            points = "rows" if self.points_of_a_pair == 1 else "images and captions"
            lab.warn(
                f"{self.name()}: at rho_max = {self.rho_max:g} a reference of {size} rows is expected to hold {poison:.1f} poisoned {points}, more than k/4 = {self.k / 4:g}; "
                "from about k on the order of the scores turns round"
            )
        flagged = above_the_usual(scores.double().numpy())
        entries = tuple(np.repeat(group, self.points_of_a_pair) for group in groups)  # each point counts, so that a row may be there twice
        return self.without_the_most_suspicious(lab, self.name(), scores, flagged, Neighbourhood(self.k, entries))

    @property
    def points_of_a_pair(self) -> int:
        """How many points of the reference each pair is: its image, and with modalities=both its caption."""
        return 2 if self.modalities == "both" else 1

    @classmethod
    def name(cls) -> str:
        """What the scores are called."""
        return cls.__module__.rpartition(".")[2]

    def size(self, n: int) -> int:
        """M for n rows.

        Raises:
            BenchError: fewer than 4k + 1.
        """
        share = 4 * self.points_of_a_pair
        usual = TRUSTED if self.reference == "clean" else int(self.k / (share * self.rho_max))
        size = n if self.reference == "all" else usual if self.reference_size is None else self.reference_size
        size = size if self.reference == "clean" else min(size, n)
        if size < 4 * self.k + 1:
            how = f"k/({share} rho_max) = {self.k}/({share} x {self.rho_max:g})" if self.reference_size is None and self.reference != "all" else f"reference={self.reference}"
            raise BenchError(f"{how} gives a reference of {size} pairs, and k = {self.k} needs at least 4k + 1 = {4 * self.k + 1}; use defense.reference=clean or lower defense.k")
        return size

    def scored(self, lab: Lab, model: Model, size: int) -> tuple[Tensor, Groups]:
        """Scores (n,) of all rows, and which rows each reference holds; none for trusted pairs."""
        image, text = (self._shaped(part) for part in lab.features(model, raw=True))
        rows = torch.arange(len(image))
        queries = Points(image, rows)
        if self.reference == "clean":
            trusted = trusted_pairs(lab, size)
            known = model.encode_images(trusted.pairs.images, raw=True), model.tokenizer.encode(trusted.pairs.captions, lab.train_settings.eot)[0]
            points = self._points(self._shaped(known[0]), self._shaped(model.encode_tokens(known[1], raw=True)), -1 - torch.arange(size))
            return self._in_blocks(lab, queries, points, model.device), ()
        if self.reference == "batch":
            return self._in_batches(lab, image, text, size, model.device)
        chosen = rows if self.reference == "all" else torch.from_numpy(np.sort(lab.rng("reference").permutation(len(rows))[:size]))
        return self._in_blocks(lab, queries, self._points(image[chosen], text[chosen], chosen), model.device), (chosen.numpy(),)

    def _in_batches(self, lab: Lab, image: Tensor, text: Tensor, size: int, device: torch.device) -> tuple[Tensor, Groups]:
        """Every row is scored once, within its batch; the last batch is filled up with rows that have their score already."""
        scores = torch.empty(len(image))
        order = torch.from_numpy(lab.rng("reference").permutation(len(image)))
        groups = []
        with lab.progress.bar(f"scoring rows by {self.name()}", len(order), "rows") as advance:
            for begin in range(0, len(order), size):
                rows = order[begin : begin + size]
                batch = torch.cat([rows, order[: size - len(rows)]])
                reference = self._points(image[batch], text[batch], batch).to(device)
                scores[rows] = self.estimate(Points(image[rows], rows).to(device), reference).cpu()
                groups.append(batch.numpy())
                advance(len(rows))
        return scores, tuple(groups)

    def _in_blocks(self, lab: Lab, queries: Points, reference: Points, device: torch.device, size: int = 65536) -> Tensor:
        parts, reference = [], reference.to(device)
        with lab.progress.bar(f"scoring rows by {self.name()}", len(queries), "rows") as advance:
            for begin in range(0, len(queries), size):
                block = Points(queries.features[begin : begin + size], queries.pairs[begin : begin + size])
                parts.append(self.estimate(block.to(device), reference).cpu())
                advance(len(block))
        return torch.cat(parts)

    def _points(self, image: Tensor, text: Tensor, pairs: Tensor) -> Points:
        return Points(torch.cat([image, text]), torch.cat([pairs, pairs])) if self.modalities == "both" else Points(image, pairs)

    def _shaped(self, features: Tensor) -> Tensor:
        return functional.normalize(features, dim=-1) if self.normalize else features


def trusted_pairs(lab: Lab, size: int) -> Granted:
    """Granted clean pairs.

    Raises:
        BenchError: there are fewer; names the options that help.
    """
    try:
        return lab.clean_pairs(size)
    except BenchError as error:
        raise BenchError(f"{error}: a smaller defense.reference_size, or defense.reference=sample, which needs none") from None


def coverage(k: int, size: int, n_classes: int) -> list[str]:
    """A warning if a reference holds no more than k points of a class on average: neighbourhoods then reach across classes."""
    if size > k * n_classes:
        return []
    return [f"a reference of {size} pairs holds about {size / n_classes:.0f} of each of {n_classes} classes, not more than k = {k}, so that clean images look like outliers too"]
