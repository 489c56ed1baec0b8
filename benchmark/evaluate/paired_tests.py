"""Tests of one method against another: paired over runs, paired over targets, unpaired counts; and Holm's correction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from benchmark.seeding import generator

EXACT_RUNS = 6
_LARGEST_EXACT = 18
_FLIPS = 100_000


@dataclass(frozen=True)
class Verdict:
    """A two-sided p value and the test it comes from; p is None where none can be had, and `kind` says why."""

    p: float | None
    kind: str


def over_pairs(left: Sequence[float], right: Sequence[float]) -> Verdict:
    """Whether two methods differ, from one value of each a run on the same poison.

    From six runs on the exact sign-flip permutation test of the mean difference, whose smallest p is 2 / 2 ** runs, so that
    fewer could never reach .05; from three to five the paired t test, which takes normal differences for granted.
    """
    differences = np.array(left, dtype=np.float64) - np.array(right, dtype=np.float64)
    n = len(differences)
    if n < 3:
        return Verdict(None, f"{n} shared {'run' if n == 1 else 'runs'}, no test")
    if n >= EXACT_RUNS:
        return Verdict(sign_flip(differences), f"sign flips of {n} runs, exact" if n <= _LARGEST_EXACT else f"sign flips of {n} runs, {_FLIPS} drawn")
    sd = float(differences.std(ddof=1))
    if np.ptp(differences) < 1e-12:
        return Verdict(1.0, f"all {n} differences are 0") if abs(differences[0]) < 1e-12 else Verdict(None, f"all {n} differences equal, no t test")
    t = float(differences.mean()) / (sd / math.sqrt(n))
    return Verdict(float(2 * stats.t.sf(abs(t), n - 1)), f"paired t over {n} runs (few: normality is taken for granted)")


def sign_flip(differences: Sequence[float] | np.ndarray) -> float:
    """Exact two-sided p of the mean: the share of sign patterns whose mean is at least as far from 0. Drawn above 18 runs."""
    values = np.asarray(differences, dtype=np.float64)
    n = len(values)
    if n <= _LARGEST_EXACT:
        patterns = np.arange(2**n)
        signs = 1.0 - 2.0 * ((patterns[:, None] >> np.arange(n)) & 1)
        extra = 0
    else:
        signs = generator("sign flips", n).choice([-1.0, 1.0], (_FLIPS, n))
        extra = 1
    means = np.abs(signs @ values)
    reached = int((means >= abs(values.sum()) * (1 - 1e-12)).sum())
    return (reached + extra) / (len(signs) + extra)


def mcnemar(only_left: int, only_right: int) -> float:
    """Exact two-sided p of discordant targets: hit with one method only, hit with the other only (McNemar, Psychometrika 1947)."""
    n = only_left + only_right
    return 1.0 if n == 0 else min(1.0, 2 * float(stats.binom.cdf(min(only_left, only_right), n, 0.5)))


def fisher(left: int, n_left: int, right: int, n_right: int) -> float:
    """Exact two-sided p of two unpaired counts."""
    return float(stats.fisher_exact(np.array([[left, n_left - left], [right, n_right - right]])).pvalue)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjusted p values of one family, in the given order (Holm, Scand. J. Stat. 1979). Missing ones stay missing and do not count."""
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for place, (p, index) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - place) * p))
        adjusted[index] = largest
    return adjusted
