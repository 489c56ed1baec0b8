"""Intervals: over units within one run, over runs of one cell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

Z = 1.959964
# What n counts where each target has several images. They share caption class and training rows, so that an interval over them would be too narrow.
TARGET_IMAGES = "images of targets"


@dataclass(frozen=True)
class Interval:
    """A 95 % interval within [0, 1]; `low` and `high` are None where none can be given, and `kind` says why or which."""

    low: float | None
    high: float | None
    kind: str


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Wilson's score interval of a rate.

    Source: Wilson, JASA 1927. Its exact coverage at n = 16 is .85 (p = .01), .92 (p = .03 and .5).
    """
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    denominator = 1 + Z * Z / n
    centre = (share + Z * Z / (2 * n)) / denominator
    half = Z / denominator * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def over_runs(values: Sequence[float], n_units: int | None = None, units: str = "queries") -> Interval:
    """The interval of a cell from one value a run (seed).

    One run: Wilson over its units. Two: none. Three or more: t over the runs, clipped to [0, 1]; where all runs agree, and
    t would claim to know the rate, Wilson over the targets of all runs or, of rates over queries, over the runs. A mean of
    several rates on which all runs agree has none, unless it is 0 or 1.

    Args:
        n_units: queries or targets of one run, if the value is a rate over units.
        units: `targets` are drawn anew with each seed, so they count as units of all runs; queries do not. Images of targets are
            no units at all: one run has no interval.
    """
    runs = len(values)
    if runs == 1:
        if n_units is None:
            return Interval(None, None, "one run, no units")
        if units == TARGET_IMAGES:
            return Interval(None, None, "none: images of one target are not independent, one training run")
        low, high = wilson(values[0] * n_units, n_units)
        return Interval(low, high, f"Wilson over {n_units} {units}, one training run")
    if runs == 2:
        return Interval(None, None, "2 runs")
    mean = sum(values) / runs
    sd = math.sqrt(sum((value - mean) ** 2 for value in values) / (runs - 1))
    if max(values) - min(values) < 1e-12:
        if n_units is None and 1e-12 < mean < 1 - 1e-12:
            return Interval(None, None, f"all {runs} runs equal, no units")
        effective = runs * n_units if units == "targets" and n_units else runs
        low, high = wilson(mean * effective, effective)
        return Interval(low, high, f"all {runs} runs equal, Wilson over {effective}")
    half = float(stats.t.ppf(0.975, runs - 1)) * sd / math.sqrt(runs)
    return Interval(max(0.0, mean - half), min(1.0, mean + half), f"t over {runs} runs")


def paired_difference(left: Sequence[float], right: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean of left - right over paired runs, and its t interval from three pairs on that do not all differ by the same."""
    differences = [a - b for a, b in zip(left, right, strict=True)]
    mean = sum(differences) / len(differences)
    if len(differences) < 3:
        return mean, None, None
    if max(differences) - min(differences) < 1e-12:
        return mean, None, None
    sd = math.sqrt(sum((d - mean) ** 2 for d in differences) / (len(differences) - 1))
    half = float(stats.t.ppf(0.975, len(differences) - 1)) * sd / math.sqrt(len(differences))
    return mean, mean - half, mean + half
