"""SafeCLIP's safe set: which rows are in it, how it grows, and the learning rates of the stages around it."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from benchmark.train.schedule import factor

RankBy = Literal["similarity", "posterior"]


def sizes(first: int, n_rows: int, n_epochs: int, growth: float, cap: float) -> list[int]:
    """Rows of the safe set in each epoch after the first split into `first` and the rest.

    The share grows by `growth` an epoch up to `cap`; the first split is not capped.
    """
    shares = [first / n_rows]
    for _ in range(n_epochs - 1):
        shares.append(min(shares[-1] + growth, cap))
    return [first, *(int(share * n_rows + 1e-9) for share in shares[1:])]  # a share is a rounded fraction


def ranked(similarity: NDArray[np.float64], posterior: NDArray[np.float64], rank_by: RankBy) -> NDArray[np.int64]:
    """Rows (n,), the safest first; ties in the order of rows.

    By posterior, rows of one probability stand in the order of their similarity, as the released code sorts twice.
    """
    order = np.argsort(-similarity, kind="stable")
    if rank_by == "posterior":
        order = order[np.argsort(-posterior[order], kind="stable")]
    return order


def total_of_released_schedule(share: float, growth: float, n_epochs: int, steps_per_epoch: int) -> int:
    """T3: the number of safe batches that the released code expects in its mixed stage. Its two cosines both end there."""
    return int(sum(share + growth * index for index in range(n_epochs)) * steps_per_epoch)


def rate(base: float, offset: int, warm: int, total: int, step: int) -> float:
    """Linear warm-up, then a cosine to zero at `total`, at a step counted from `offset`; past `total` the cosine rises again."""
    return base * factor(offset + step, warm, total)
