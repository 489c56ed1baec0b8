"""How well a defense's scores tell poisoned pairs from clean ones. Higher is more suspicious; nothing is flipped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score

from benchmark.evaluate.metric import Metric, rate
from benchmark.seeding import generator


class Scored(Protocol):
    """Scores of all rows, float64 (n,), with a name, and what would be flagged, bool (n,), if anything."""

    @property
    def name(self) -> str:
        """Of the score."""
        ...

    @property
    def values(self) -> NDArray[np.float64]:
        """Higher is more suspicious."""
        ...

    @property
    def flagged(self) -> NDArray[np.bool_] | None:
        """At the defense's own threshold."""
        ...


TOP_SHARES = (0.001, 0.01, 0.05, 0.1, 0.15)
SMALL_FPR = (0.01, 0.001)
INVERTED = 0.25
_DRAWS = 2000


def detection(name: str, values: NDArray[np.float64], flagged: NDArray[np.bool_] | None, poisoned: NDArray[np.bool_], images: NDArray[np.int64] | None = None) -> list[Metric]:
    """Metrics of one score a row (n,) against the sealed record's rows; empty without poison. All rows, so at the true base rate.

    Args:
        flagged: what the defense itself would flag, at a threshold that it chose without labels.
        images: which image each poisoned row shows (n,). The interval of the AUROC is a bootstrap over these images, because
            captions of one image share its score or nearly so; None takes every row for an image of its own.
    """
    n, n_poison = len(poisoned), int(poisoned.sum())
    if n_poison in (0, n):
        return []
    n_clean = n - n_poison
    above = _share_below(values[poisoned], values[~poisoned])
    low, high = _bootstrap(above, np.arange(n_poison) if images is None else images[poisoned])
    order = np.argsort(-values, kind="stable")
    base_rate = n_poison / n
    fpr_95 = fpr_at(values, poisoned, 0.95)
    metrics = [
        Metric("auroc", name, float(above.mean()), n, "pairs", low, high),
        Metric("average_precision", name, float(average_precision_score(poisoned, values)), n, "pairs"),
        Metric("base_rate", name, base_rate, n, "pairs"),
        rate("precision_at_n", name, int(poisoned[order[:n_poison]].sum()), n_poison, "", "pairs"),
        Metric("fpr_at_tpr_0.95", name, fpr_95, n_clean, "pairs"),
        Metric("precision_at_tpr_0.95", name, precision_at(0.95, fpr_95, base_rate), n, "pairs"),
    ]
    metrics += [rate(f"recall_at_{share:g}", name, int(poisoned[order[: round(share * n)]].sum()), n_poison, "", "pairs") for share in TOP_SHARES]
    metrics += [rate(f"tpr_at_fpr_{x:g}", name, round(_tpr_at(values, poisoned, x) * n_poison), n_poison, "", "pairs") for x in SMALL_FPR if n_clean >= 10 / x]
    return metrics if flagged is None else metrics + _own(name, flagged, poisoned)


def precision_at(tpr: float, fpr: float, base_rate: float) -> float:
    """Share of poison among what is flagged, where poison is this share of all rows: TPR pi / (TPR pi + FPR (1 - pi))."""
    found = tpr * base_rate
    return found / (found + fpr * (1 - base_rate)) if found > 0 else 0.0


def filtering(kept: NDArray[np.int64], poisoned: NDArray[np.bool_]) -> list[Metric]:
    """What the rows of the last training were: kept, and poisoned among them."""
    n, n_poison = len(poisoned), int(poisoned.sum())
    n_poison_kept = int(poisoned[kept].sum())
    lost = (n - n_poison) - (len(kept) - n_poison_kept)
    return [
        Metric("n_kept", "filter", float(len(kept)), n, "pairs"),
        Metric("n_dropped", "filter", float(n - len(kept)), n, "pairs"),
        Metric("n_poison_kept", "filter", float(n_poison_kept), n_poison, "pairs"),
        Metric("poison_rate_kept", "filter", n_poison_kept / max(1, len(kept)), len(kept), "pairs"),
        Metric("clean_lost", "filter", lost / max(1, n - n_poison), n - n_poison, "pairs"),
        rate("recall_dropped", "filter", n_poison - n_poison_kept, n_poison, "", "pairs"),
        rate("precision_dropped", "filter", n_poison - n_poison_kept, n - len(kept), "", "pairs"),
    ]


def dropped_by_class(kept: NDArray[np.int64], poisoned: NDArray[np.bool_], shown: Sequence[str | None] | None) -> list[Metric]:
    """The share of each class's clean rows that was dropped, as a filter may erase a class; n is the clean rows that show it.

    Args:
        shown: the class that each row (n,) shows, None where it is not known; None for data that do not say.
    """
    if shown is None:
        return []
    stays = np.zeros(len(poisoned), dtype=bool)
    stays[kept] = True
    classes = np.array([name or "" for name in shown])
    found = []
    for name in sorted(set(classes[~poisoned]) - {""}):
        rows = ~poisoned & (classes == name)
        found.append(rate("dropped_by_class", str(name), int((rows & ~stays).sum()), int(rows.sum()), "", "pairs"))
    return found


def poisoned_rows(scores: Sequence[Scored], kept: NDArray[np.int64] | None, poisoned: NDArray[np.bool_], images: NDArray[np.int64]) -> pd.DataFrame:
    """A row for each poisoned row, from which the metrics of `detection` can be had again: which image it shows, whether it was
    kept, and for each score how many clean rows lie above it and level with it, its place among the poisoned rows (from 0; equal
    scores share one), and whether it was flagged.
    """
    table: dict[str, Any] = {"image": images[poisoned]}
    if kept is not None:
        table["kept"] = np.isin(np.flatnonzero(poisoned), kept)
    for one in scores:
        clean = np.sort(one.values[~poisoned])
        below, up_to = (np.searchsorted(clean, one.values[poisoned], side) for side in ("left", "right"))
        order = np.unique(-one.values[poisoned], return_inverse=True)[1]
        table |= {f"above_{one.name}": len(clean) - up_to, f"level_{one.name}": up_to - below, f"order_{one.name}": order}
        if one.flagged is not None:
            table[f"flagged_{one.name}"] = one.flagged[poisoned]
    return pd.DataFrame(table)


def poison_among_neighbours(name: str, k: int, groups: Sequence[NDArray[np.int64]], poisoned: NDArray[np.bool_]) -> tuple[list[Metric], list[str]]:
    """Poisoned rows in a detector's reference sets as a share of k, expected and at most, and a warning above a quarter.

    Poisons of one attack are each other's neighbours: once a reference holds about k of them they look dense and the order of
    the scores turns round (docs/methods/filters.md).
    """
    sizes = [len(group) for group in groups]
    expected = float(poisoned.mean()) * max(sizes, default=0) / k
    most = max((int(poisoned[group].sum()) for group in groups), default=0) / k
    metrics = [Metric("expected_poison_over_k", name, expected, max(sizes, default=0), "pairs"), Metric("most_poison_over_k", name, most, max(sizes, default=0), "pairs")]
    if max(expected, most) <= INVERTED:
        return metrics, []
    line = f"{name}: inverted regime. A reference of {max(sizes)} rows holds {expected * k:.1f} poisoned rows on average and up to {most * k:.0f}, more than a quarter of k = {k}"
    return metrics, [line]


def _own(name: str, flagged: NDArray[np.bool_], poisoned: NDArray[np.bool_]) -> list[Metric]:
    """At the threshold that the defense itself chose."""
    n, n_poison, n_flagged, n_hit = len(poisoned), int(poisoned.sum()), int(flagged.sum()), int((flagged & poisoned).sum())
    return [
        rate("tpr_own", name, n_hit, n_poison, "", "pairs"),
        rate("fpr_own", name, n_flagged - n_hit, n - n_poison, "", "pairs"),
        rate("precision_own", name, n_hit, n_flagged, "", "pairs"),
        Metric("f1_own", name, 2 * n_hit / (n_flagged + n_poison), n, "pairs"),
        rate("flagged_share", name, n_flagged, n, "", "pairs"),
    ]


def _share_below(positives: NDArray[np.float64], negatives: NDArray[np.float64]) -> NDArray[np.float64]:
    """For each positive the share of negatives below it, ties counted as half; their mean is the AUROC."""
    ranks = rankdata(np.concatenate([positives, negatives]))[: len(positives)]
    return np.asarray((ranks - rankdata(positives)) / len(negatives), dtype=np.float64)


def _bootstrap(above: NDArray[np.float64], groups: NDArray[np.int64]) -> tuple[float | None, float | None]:
    """A 95 % interval of the AUROC from draws of whole groups of poisoned rows; None for fewer than two groups."""
    _, inverse = np.unique(groups, return_inverse=True)
    n = int(inverse.max()) + 1
    if n < 2:
        return None, None
    sums, sizes = np.asarray(np.bincount(inverse, above), dtype=np.float64), np.asarray(np.bincount(inverse), dtype=np.float64)
    rng = generator("bootstrap", "auroc")
    draws = np.concatenate([_draw(rng, sums, sizes, n) for _ in range(max(1, _DRAWS // 100))])
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def _draw(rng: np.random.Generator, sums: NDArray[np.float64], sizes: NDArray[np.float64], n: int) -> NDArray[np.float64]:
    """A hundred draws of n groups."""
    chosen = rng.integers(0, n, (100, n))
    return np.asarray(sums[chosen].sum(axis=1) / sizes[chosen].sum(axis=1), dtype=np.float64)


def fpr_at(values: NDArray[np.float64], poisoned: NDArray[np.bool_], tpr: float) -> float:
    """Smallest false positive rate among thresholds that catch at least this share of the poison."""
    needed = int(np.ceil(tpr * poisoned.sum()))
    threshold = np.sort(values[poisoned])[::-1][needed - 1]
    return float((values[~poisoned] >= threshold).mean())


def _tpr_at(values: NDArray[np.float64], poisoned: NDArray[np.bool_], fpr: float) -> float:
    """Largest true positive rate among thresholds with at most this false positive rate."""
    clean = np.sort(values[~poisoned])[::-1]
    allowed = int(np.floor(fpr * len(clean)))
    return float((values[poisoned] > clean[allowed]).mean()) if allowed < len(clean) else 1.0
