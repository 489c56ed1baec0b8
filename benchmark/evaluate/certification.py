"""Certified accuracy against the size of the attack: curves of certificates that a defense gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from benchmark.contract import Certificates
from benchmark.evaluate.metric import Metric, rate

TRUST = {
    "encoder": "trusts the encoder: it bounds changes of the labelled support images and says nothing about poisoned pre-training, after which a triggered image can get a large radius for the wrong class",
    "none": "trusts the training code alone: it bounds changes of the pairs that the models are pre-trained on",
}


def sizes(largest: int) -> list[int]:
    """Attack sizes of a curve: 0 and the powers of two up to the largest. They do not depend on the radii, so that seeds have the same ones."""
    return [0, *(2**power for power in range(max(0, largest).bit_length()))]


def certified_curve(
    certificates: Certificates, of: str, true: NDArray[np.int64], card: str, goal: NDArray[np.int64] | None = None, counted: NDArray[np.bool_] | None = None
) -> list[Metric]:
    """Certified accuracy at each attack size, over the queries that count.

    A query without a certificate (radius -1) counts as wrong at every size. With goals (triggered queries), also the share
    that is read as the goal, and the share that provably stays another class than the goal.
    """
    chosen = np.ones(len(true), dtype=bool) if counted is None else counted
    predicted, radius = certificates.predicted[chosen], certificates.radius[chosen]
    correct = (predicted == true[chosen]) & (radius >= 0)
    name, n = f"{of}:{certificates.name}", int(chosen.sum())
    metrics = [rate(f"certified_acc_{size}", name, int((correct & (radius >= size)).sum()), n, card) for size in sizes(certificates.largest)]
    if certificates.joint is not None:
        whole = np.zeros(len(true), dtype=bool)
        whole[chosen] = correct
        kept = [int(correct.sum()) - certificates.joint(whole, size) for size in sizes(certificates.largest)]
        metrics += [Metric(f"joint_certified_acc_{size}", name, value / n if n else None, n, card=card) for size, value in zip(sizes(certificates.largest), kept, strict=True)]
    if goal is not None:
        other = (predicted != goal[chosen]) & (radius >= 0)
        metrics.append(rate("certified_asr", name, int(((predicted == goal[chosen]) & (radius >= 0)).sum()), n, card))
        metrics += [rate(f"certified_not_goal_{size}", name, int((other & (radius >= size)).sum()), n, card) for size in sizes(certificates.largest)]
    metrics += [
        Metric(metric, name, float(np.median(radius[those])) if those.any() else None, int(those.sum()), card=card)
        for metric, those in (("certified_radius_median", radius >= 0), ("certified_radius_median_correct", correct))
    ]
    metrics.append(Metric("certified_parameter", name, certificates.parameter, n, card=card))
    metrics.append(rate("certified_abstained", name, int((radius < 0).sum()), n, card))
    return metrics


def certificate_card(certificates: Certificates, about: dict[str, Any], queries: str, n_support: int, n_models: int) -> dict[str, Any]:
    """What a certificate's numbers refer to; values whose cards differ are never averaged."""
    return {
        **about,
        "certificate": certificates.name,
        "unit": certificates.unit,
        "trusts": certificates.trusts,
        "says": f"{certificates.says}; {TRUST[certificates.trusts]}",
        "joint": certificates.joint is not None,
        "ties": "smaller class",
        "n_support": n_support,
        "n_models": n_models,
        "queries": queries,
    }


def certificate_table(certificates: Sequence[Certificates], ids: Sequence[str], true: NDArray[np.int64]) -> pd.DataFrame:
    """A row for each query, with the prediction and the radius of each certificate; the whole curve can be drawn from it."""
    columns = {f"{what}_{one.name}": values for one in certificates for what, values in (("pred", one.predicted), ("radius", one.radius))}
    return pd.DataFrame({"query_id": list(ids), "true": true, **columns})
