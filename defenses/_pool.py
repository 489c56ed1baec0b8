"""A first-in-first-out pool of caption features, and the search in it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Wrap = Literal["ring", "drop"]


def enqueue(pool: Tensor, pointer: int, features: Tensor, wrap: Wrap) -> int:
    """Writes features (b, d) into the pool (P, d) in place and returns the next pointer.

    `ring` writes slot (pointer + r) mod P and drops nothing; of a batch longer than the pool it keeps the last P. `drop`
    writes up to the end of the pool, drops the rest of the batch and starts again at 0, as the released code does.
    """
    size = len(pool)
    if wrap == "ring":
        features = features[-size:]
        slots = (pointer + torch.arange(len(features), device=pool.device)) % size
        pool[slots] = features
        return (pointer + len(features)) % size
    if pointer + len(features) >= size:
        pool[pointer:] = features[: size - pointer]
        return 0
    pool[pointer : pointer + len(features)] = features
    return pointer + len(features)


def nearest(queries: Tensor, pool: Tensor, barred: Tensor | None = None) -> Tensor:
    """Index (b,) of the pool entry with the highest cosine to each query; ties go to the lowest index.

    `barred`, bool (b, P), marks entries that a query must not pick.
    """
    return _cosines(queries, pool, barred).argmax(dim=1)


def nearest_without_repeats(queries: Tensor, pool: Tensor, barred: Tensor | None = None) -> Tensor:
    """As `nearest`, but images that pick one entry take their next best free one, the most similar image first."""
    cosines = _cosines(queries, pool, barred)
    chosen = torch.full((len(queries),), -1, dtype=torch.int64, device=queries.device)
    taken = torch.zeros(len(pool), dtype=torch.bool, device=queries.device)
    for query in cosines.amax(dim=1).argsort(descending=True, stable=True).tolist():
        free = cosines[query].masked_fill(taken, -3.0) if len(pool) >= len(queries) else cosines[query]
        chosen[query] = free.argmax()
        taken[chosen[query]] = True
    return chosen


def _cosines(queries: Tensor, pool: Tensor, barred: Tensor | None) -> Tensor:
    cosines = queries @ torch.nn.functional.normalize(pool, dim=-1).T
    return cosines if barred is None else cosines.masked_fill(barred, -2.0)
