"""How well a defense's scores tell poisoned pairs from clean ones. Higher is more suspicious; nothing is flipped."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, roc_auc_score

from benchmark.evaluate.metric import Metric, rate


def detection(name: str, values: NDArray[np.float64], flagged: NDArray[np.bool_] | None, poisoned: NDArray[np.bool_]) -> list[Metric]:
    """Metrics of one score a row (n,) against the sealed record's rows; empty without poison."""
    n, n_poison = len(poisoned), int(poisoned.sum())
    if n_poison in (0, n):
        return []
    top = np.argsort(-values, kind="stable")[:n_poison]
    metrics = [
        Metric("auroc", name, float(roc_auc_score(poisoned, values)), n, "pairs"),
        Metric("average_precision", name, float(average_precision_score(poisoned, values)), n, "pairs"),
        Metric("base_rate", name, n_poison / n, n, "pairs"),
        rate("precision_at_n", name, int(poisoned[top].sum()), n_poison, "", "pairs"),
        Metric("fpr_at_tpr_0.95", name, fpr_at(values, poisoned, 0.95), n - n_poison, "pairs"),
    ]
    if flagged is not None:
        metrics.append(rate("tpr_own", name, int((flagged & poisoned).sum()), n_poison, "", "pairs"))
        metrics.append(rate("fpr_own", name, int((flagged & ~poisoned).sum()), n - n_poison, "", "pairs"))
    return metrics


def filtering(kept: NDArray[np.int64], poisoned: NDArray[np.bool_]) -> list[Metric]:
    """What the rows of the last training were: kept, and poisoned among them."""
    n = len(poisoned)
    n_poison_kept = int(poisoned[kept].sum())
    lost = (n - int(poisoned.sum())) - (len(kept) - n_poison_kept)
    return [
        Metric("n_kept", "filter", float(len(kept)), n, "pairs"),
        Metric("n_poison_kept", "filter", float(n_poison_kept), int(poisoned.sum()), "pairs"),
        Metric("clean_lost", "filter", lost / max(1, n - int(poisoned.sum())), n - int(poisoned.sum()), "pairs"),
    ]


def fpr_at(values: NDArray[np.float64], poisoned: NDArray[np.bool_], tpr: float) -> float:
    """Smallest false positive rate among thresholds that catch at least this share of the poison."""
    needed = int(np.ceil(tpr * poisoned.sum()))
    threshold = np.sort(values[poisoned])[::-1][needed - 1]
    return float((values[~poisoned] >= threshold).mean())
