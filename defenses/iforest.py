"""Filter by an isolation forest."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from benchmark.train.lab import Lab
from benchmark.train.model import Model
from defenses._filter import Filter
from defenses._neighbour_filter import trusted_pairs

OWN_THRESHOLD = 0.5
_BLOCK = 65536


class IForest(Filter):
    """Drops images whose features few random cuts set apart from the others.

    Source: Liu, Ting, Zhou, ICDM 2008; as a detector Huang et al., ICLR 2025, arXiv 2502.01385.
    Differs from the paper: one forest for all rows, where the released code grows one for each batch; images alone are the points
    it is grown on, since cuts of features as the towers give them fall where the longer ones are, among the captions.
    """

    paper = "Liu et al. 2008; Huang et al. 2025, arXiv 2502.01385"

    n_trees: int = Field(100, ge=1, description="Trees. Paper: 100.")
    reference: Literal["sample", "clean"] = Field("sample", description="What the trees are grown on: a random sample of the rows, or trusted pairs.")
    reference_size: int = Field(2048, ge=16, description="Pairs in the reference. Paper: 2,048.")
    modalities: Literal["both", "image"] = Field("image", description="both: captions are points of the reference too, as in the paper.")
    normalize: bool = Field(False, description="Features of unit length. Paper: as the towers give them.")

    def clean_wanted(self) -> int:
        return self.reference_size if self.reference == "clean" else 0

    def defend(self, lab: Lab) -> Model:
        if self.reference == "clean":
            trusted_pairs(lab, self.reference_size)
        model = self.suspect(lab)
        image, text = (self._shaped(part) for part in lab.features(model, raw=True))
        rng = lab.rng("forest")
        if self.reference == "clean":
            trusted = trusted_pairs(lab, self.reference_size)
            known = self._shaped(model.encode_images(trusted.pairs.images, raw=True))
            captions = self._shaped(model.encode_tokens(model.tokenizer.encode(trusted.pairs.captions, lab.train_settings.eot)[0], raw=True))
        else:
            rows = torch.from_numpy(np.sort(rng.permutation(len(image))[: self.reference_size]))
            known, captions = image[rows], text[rows]
        points = torch.cat([known, captions]) if self.modalities == "both" else known
        scores = isolation(image.numpy(), points.numpy(), self.n_trees, int(rng.integers(2**31)))
        return self.without_the_most_suspicious(lab, "iforest", torch.from_numpy(scores), scores > OWN_THRESHOLD)

    def _shaped(self, features: Tensor) -> Tensor:
        return functional.normalize(features, dim=-1) if self.normalize else features


def isolation(queries: NDArray[np.float32], reference: NDArray[np.float32], n_trees: int, seed: int) -> NDArray[np.float64]:
    """2^(-E[h] / c(256)) of each query (n,), in (0, 1]: h is the depth at which a tree over 256 reference points isolates it."""
    from sklearn.ensemble import IsolationForest

    forest = IsolationForest(n_estimators=n_trees, max_samples=min(256, len(reference)), random_state=seed).fit(reference)
    parts = [-forest.score_samples(queries[begin : begin + _BLOCK]) for begin in range(0, len(queries), _BLOCK)]
    return np.concatenate(parts).astype(np.float64)
