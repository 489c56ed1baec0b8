"""How well a defense tells triggered queries from clean ones at test time, and what rejecting them does to the attack."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor

from benchmark.evaluate.detection import fpr_at
from benchmark.evaluate.metric import Metric, rate

Suspicion = Callable[[NDArray[np.uint8]], tuple[Tensor, float]]


@dataclass(frozen=True)
class Judged:
    """Suspicion float64 (n,) of some queries as the defense gave it, and the threshold above which they are rejected."""

    values: NDArray[np.float64]
    threshold: float

    @property
    def rejected(self) -> NDArray[np.bool_]:
        """Which queries are rejected; one whose score is NaN or +inf is."""
        return (self.values > self.threshold) | np.isnan(self.values) | np.isposinf(self.values)

    @property
    def n_not_finite(self) -> int:
        """How many scores are not finite."""
        return int((~np.isfinite(self.values)).sum())

    def at(self, chosen: NDArray[np.bool_]) -> Judged:
        """The same of some of the queries."""
        return Judged(self.values[chosen], self.threshold)


def judged(suspicion: Suspicion, images: NDArray[np.uint8]) -> Judged:
    """What the defense says of these images (n, S, S, 3).

    Raises:
        ValueError: not one score for each image, or a threshold that is no number.
    """
    scores, threshold = suspicion(images)
    values = scores.detach().cpu().numpy().astype(np.float64)
    if values.shape != (len(images),) or np.isnan(threshold):
        raise ValueError(f"suspicion must return one score for each of {len(images)} images and a threshold, got shape {values.shape} and {threshold}")
    return Judged(values, float(threshold))


def ordered(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scores that can be ranked: NaN and +inf become one more than the largest finite score of all, -inf one less than the smallest."""
    finite = values[np.isfinite(values)]
    lowest, highest = (finite.min(), finite.max()) if len(finite) else (0.0, 0.0)
    return np.nan_to_num(values, nan=highest + 1, posinf=highest + 1, neginf=lowest - 1)


def query_detection(of: str, clean: Judged, attacked: Judged, reached: NDArray[np.bool_], card: str, units: str = "queries") -> list[Metric]:
    """Metrics of scores of attacked queries against those of clean ones; nothing is flipped.

    Args:
        reached: which of the attacked queries reach the attacker's goal if nobody rejects them.
        units: what an attacked query is: `queries`, or `targets` of a targeted attack.
    """
    if not len(clean.values) or not len(attacked.values):
        return []
    values = ordered(np.concatenate([clean.values, attacked.values]))
    positive = np.arange(len(values)) >= len(clean.values)
    n = len(attacked.values)
    hits, alarms = int(attacked.rejected.sum()), int(clean.rejected.sum())
    return [
        Metric("query_auroc", of, float(roc_auc_score(positive, values)), len(values), card=card),
        Metric("query_average_precision", of, float(average_precision_score(positive, values)), len(values), card=card),
        Metric("query_base_rate", of, n / len(values), len(values), card=card),
        Metric("query_fpr_at_tpr_0.95", of, fpr_at(values, positive, 0.95), len(clean.values), card=card),
        Metric("query_f1_own", of, 2 * hits / (n + hits + alarms), len(values), card=card),
        rate("query_tpr_own", of, hits, n, card, units),
        rate("query_fpr_own", of, alarms, len(clean.values), card),
        rate("asr_after_rejection", of, int((reached & ~attacked.rejected).sum()), n, card, units),
    ]


def query_table(ids: Sequence[str], seen: Judged, triggered: bool, reached: NDArray[np.bool_] | None = None) -> pd.DataFrame:
    """A prediction row for each query."""
    known = np.full(len(ids), None, dtype=object) if reached is None else reached
    return pd.DataFrame({"query_id": list(ids), "triggered": triggered, "score": seen.values, "rejected": seen.rejected, "reached_goal": pd.array(known, dtype="boolean")})
