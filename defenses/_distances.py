"""Distances between features of queries and of labelled images."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


def cosine_distances(queries: Tensor, support: Tensor) -> NDArray[np.float64]:
    """1 - cosine (m, n) of unit-length features, in float64."""
    return np.asarray((1 - queries.double() @ support.double().T).numpy())


def typical_radius(features: Tensor, share: float) -> float:
    """Cosine distance within which half of these features (n, d) have at least this share of the others (at least one)."""
    distances = cosine_distances(features, features)
    np.fill_diagonal(distances, np.inf)
    nearest = np.sort(distances, axis=1)[:, max(1, round(share * (len(features) - 1))) - 1]
    return float(np.median(nearest))
