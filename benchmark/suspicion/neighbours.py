"""Scores of points by their nearest neighbours in a reference set (docs/methods/filters.md has the formulas)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK_BYTES = 64 << 20
_TINY_RATIO = 1e-12
_TINY_DISTANCE = 1e-9  # times the median distance to the k-th neighbour


@dataclass(frozen=True)
class Points:
    """Features of images and texts, and the pair that each belongs to.

    Attributes:
        features: (n, d).
        pairs: int64 (n,). A point is never a neighbour of its own pair; points from outside the rows have numbers below 0.
    """

    features: Tensor
    pairs: Tensor

    def __len__(self) -> int:
        return len(self.features)

    def to(self, device: torch.device) -> Points:
        """The same points on a device."""
        return Points(self.features.to(device), self.pairs.to(device))


@dataclass(frozen=True)
class Neighbours:
    """The k nearest of each point, ascending: distances (n, k), and places in the reference int64 (n, k)."""

    distances: Tensor
    places: Tensor


def nearest(queries: Points, reference: Points, k: int) -> Neighbours:
    """The k nearest reference points of each query that are not of its own pair; ties go to the smaller place.

    Distances are Euclidean and come from differences, not from inner products, which lose the small ones. Memory stays at a
    few blocks of 64 MiB, however many queries there are.
    """
    size = max(1, _BLOCK_BYTES // (len(reference) * queries.features.element_size()))
    distances, places = [], []
    for begin in range(0, len(queries), size):
        block = torch.cdist(queries.features[begin : begin + size], reference.features, compute_mode="donot_use_mm_for_euclid_dist")
        block[queries.pairs[begin : begin + size, None] == reference.pairs[None]] = torch.inf
        ordered = block.sort(dim=1, stable=True)
        distances.append(ordered.values[:, :k].clone())
        places.append(ordered.indices[:, :k].clone())
    return Neighbours(torch.cat(distances), torch.cat(places))


def kdist(queries: Points, reference: Points, k: int) -> Tensor:
    """Distance (n,) to the k-th nearest reference point."""
    return nearest(queries, reference, k).distances[:, -1]


def slof(queries: Points, reference: Points, k: int) -> Tensor:
    """Simplified local outlier factor (n,): mean over the k nearest y of d_k(point) / d_k(y)."""
    found, own = nearest(queries, reference, k), nearest(reference, reference, k)
    scale, scales = _clamped(found.distances[:, -1], own), _clamped(own.distances[:, -1], own)
    return (scale[:, None] / scales[found.places]).mean(dim=1)


def lid(queries: Points, reference: Points, k: int) -> Tensor:
    """Local intrinsic dimension (n,) by maximum likelihood: -1 / mean over j of ln(d_j / d_k); infinite where all are equal."""
    return _dimension(nearest(queries, reference, k), nearest(reference, reference, k))


def dao(queries: Points, reference: Points, k: int) -> Tensor:
    """Dimension-aware outlier factor (n,): mean over the k nearest y of LID_k(y) ln(d_k(point) / d_k(y))."""
    found, own = nearest(queries, reference, k), nearest(reference, reference, k)
    scale, scales = _clamped(found.distances[:, -1], own), _clamped(own.distances[:, -1], own)
    dimensions = _dimension(own, own)
    known = dimensions[torch.isfinite(dimensions)]
    dimensions = torch.where(torch.isfinite(dimensions), dimensions, known.max() if len(known) else torch.ones_like(scales[0]))
    return (dimensions[found.places] * (scale[:, None] / scales[found.places]).log()).mean(dim=1)


def finite(values: Tensor) -> tuple[Tensor, int]:
    """Scores (n,) without infinities: NaN and +inf one above the largest finite one, -inf one below the smallest. And how many."""
    fine = torch.isfinite(values)
    n_odd = int((~fine).sum())
    if n_odd == 0:
        return values, 0
    known = values[fine] if bool(fine.any()) else values.new_zeros(1)
    return torch.where(fine, values, torch.where(values == -torch.inf, known.min() - 1, known.max() + 1)), n_odd


def _dimension(found: Neighbours, own: Neighbours) -> Tensor:
    scale = _clamped(found.distances[:, -1:], own)
    ratios = (_clamped(found.distances, own) / scale).clamp(min=_TINY_RATIO)
    return 1 / ratios.log().mean(dim=1).abs()  # logarithms are at most 0; of equal distances the dimension is +inf


def _clamped(distances: Tensor, own: Neighbours) -> Tensor:
    """Distances as they stand in ratios: copies of one point are at 0, and 0 / 0 counts as 1."""
    floor = _TINY_DISTANCE * float(own.distances[:, -1].median())
    return distances.clamp(min=max(floor, torch.finfo(distances.dtype).tiny))
