"""What a defense's split of the rows was worth in an epoch: how much poison it let in, and where the poison ranks."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

TOP_SHARES = (0.1, 0.15, 0.3)


def measure(kept: NDArray[np.bool_], scores: NDArray[np.float64], poisoned: NDArray[np.bool_]) -> dict[str, float]:
    """The values of one split as `name/split`; without poison its size alone. Shares of an empty set are left out.

    Args:
        kept: rows of the safe set (n,).
        scores: of each row (n,), higher = safer; those of the poison should be low.
        poisoned: rows of the sealed record (n,).

    `safe_poison_share` is poison / safe set, `safe_poison_recall` the part of all poison in it, `safe_poison_lift` the first over the
    poison rate, `risky_precision` and `risky_recall` the same for the other rows, `poison_in_top_Q` the part of all poison among the share Q of
    the rows with the highest scores (equal scores at its edge count in part), `split_auroc` that of minus the score.
    """
    n, n_poison, n_safe = len(poisoned), int(poisoned.sum()), int(kept.sum())
    found = {"safe_share": n_safe / n}
    if 0 < n_poison < n:
        inside = int((kept & poisoned).sum())
        found |= {"safe_poison_recall": inside / n_poison, "risky_recall": 1 - inside / n_poison}
        if n_safe:
            found |= {"safe_poison_share": inside / n_safe, "safe_poison_lift": inside / n_safe / (n_poison / n)}
        if n_safe < n:
            found["risky_precision"] = (n_poison - inside) / (n - n_safe)
        found |= {f"poison_in_top_{share:g}": in_top(scores, poisoned, round(share * n)) for share in TOP_SHARES}
        found["split_auroc"] = float(roc_auc_score(poisoned, -scores))
    return {f"{name}/split": value for name, value in found.items()}


def in_top(scores: NDArray[np.float64], poisoned: NDArray[np.bool_], size: int) -> float:
    """The part of all poison among the `size` rows with the highest scores, over all orders of equal scores."""
    if size == 0:
        return 0.0
    edge = np.sort(scores)[::-1][size - 1]
    above, level = scores > edge, scores == edge
    room = (size - int(above.sum())) / int(level.sum())
    return float((poisoned & above).sum() + room * (poisoned & level).sum()) / int(poisoned.sum())
