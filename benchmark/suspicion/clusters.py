"""k-means on the unit sphere: small, seeded, in blocks."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

_BLOCK = 16384
_FITTED_ON = 100_000
_ROUNDS = 25


def usual_number(n: int) -> int:
    """How many clusters n images are cut into: half the root of n, from 8 to 512."""
    return int(np.clip(round(np.sqrt(n) / 2), 8, 512))


def spherical_kmeans(features: Tensor, n_clusters: int, rng: np.random.Generator, starts: int = 3) -> Tensor:
    """Cluster int64 (n,) of each feature (n, d) by cosine; the best of several seeded starts.

    Centres are fitted on at most 100,000 rows; then every row goes to its nearest.
    """
    n = len(features)
    some = torch.from_numpy(np.sort(rng.permutation(n)[:_FITTED_ON]))
    fitted = functional.normalize(features[some].float(), dim=-1)
    found = [_fit(fitted, min(n_clusters, len(fitted)), rng) for _ in range(starts)]
    centres = max(found, key=lambda one: one[1])[0]
    return _nearest(functional.normalize(features.float(), dim=-1), centres)[0]


def _fit(x: Tensor, n_clusters: int, rng: np.random.Generator) -> tuple[Tensor, float]:
    """Centres, and the sum of cosines to them."""
    centres = _spread(x, n_clusters, rng)
    total = -np.inf
    for _ in range(_ROUNDS):
        places, cosines = _nearest(x, centres)
        moved = torch.zeros_like(centres).index_add_(0, places, x)
        alone = torch.bincount(places, minlength=n_clusters) == 0
        centres = torch.where(alone[:, None], centres, functional.normalize(moved, dim=-1))
        before, total = total, float(cosines.sum())
        if total - before < 1e-6 * len(x):
            break
    return centres, total


def _spread(x: Tensor, n_clusters: int, rng: np.random.Generator) -> Tensor:
    """First centres by k-means++: each drawn with a chance that grows with its distance from those there are."""
    chosen = [int(rng.integers(len(x)))]
    distance = (1 - x @ x[chosen[0]]).clamp(min=0)
    while len(chosen) < n_clusters:
        weights = distance.double().numpy()
        total = weights.sum()
        chosen.append(int(rng.choice(len(x), p=weights / total)) if total > 0 else int(rng.integers(len(x))))
        distance = torch.minimum(distance, (1 - x @ x[chosen[-1]]).clamp(min=0))
    return x[torch.tensor(chosen)].clone()


def _nearest(x: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    places, cosines = [], []
    for begin in range(0, len(x), _BLOCK):
        best = (x[begin : begin + _BLOCK] @ centres.T).max(dim=1)
        places.append(best.indices)
        cosines.append(best.values)
    return torch.cat(places), torch.cat(cosines)


def shares(clusters: NDArray[np.int64], n_clusters: int) -> NDArray[np.float64]:
    """Share of the rows in each cluster (C,)."""
    return np.bincount(clusters, minlength=n_clusters) / len(clusters)
