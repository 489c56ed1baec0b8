"""Distances between features of queries and of labelled images."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

BLOCK_BYTES = 256 << 20


def blocks(n_queries: int, bytes_of_each: int) -> Iterator[slice]:
    """Queries in order, as many at once as take 256 MiB; at least one."""
    size = max(1, BLOCK_BYTES // max(1, bytes_of_each))
    return (slice(begin, begin + size) for begin in range(0, max(1, n_queries), size))


def cosine_distances(queries: Tensor, support: Tensor) -> NDArray[np.float64]:
    """1 - cosine (m, n) of unit-length features, in float64."""
    return np.asarray((1 - queries.double() @ support.double().T).numpy())


def typical_radius(features: Tensor, share: float) -> float:
    """Cosine distance within which half of these features (n, d) have at least this share of the others (at least one)."""
    distances = cosine_distances(features, features)
    np.fill_diagonal(distances, np.inf)
    nearest = np.sort(distances, axis=1)[:, max(1, round(share * (len(features) - 1))) - 1]
    return float(np.median(nearest))
