"""How many targets and seeds a difference takes, and the smallest difference that a plan can show."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from scipy import stats

from benchmark.evaluate.paired_tests import EXACT_RUNS
from benchmark.evaluate.statistics import Z, wilson
from benchmark.seeding import generator

POWER = 0.8
_LEVEL = 0.05
_LIKE_T = 12
_DRAWS = 4000
_Z_POWER = float(stats.norm.ppf(POWER))


def half_width(n: int, p: float = 0.5) -> float:
    """Half the width of Wilson's interval of a rate p over n units."""
    low, high = wilson(p * n, n)
    return (high - low) / 2


def units_for_half_width(wanted: float) -> int:
    """The fewest units at which no rate's Wilson interval is wider than twice this."""
    n = max(1, math.floor(Z * Z * (0.25 / (wanted * wanted) - 1)))  # half = Z / 2 / sqrt(n + Z^2) at p = 1/2
    while half_width(n) > wanted:
        n += 1
    return n


def bound_of_zero(n: int) -> float:
    """The upper end of Wilson's interval where none of n units succeeded."""
    return wilson(0, n)[1]


def units_for_rates(first: float, second: float) -> int:
    """Units in each of two unpaired arms that tell two rates apart with 80 % power at the level .05."""
    mean = (first + second) / 2
    root = Z * math.sqrt(2 * mean * (1 - mean)) + _Z_POWER * math.sqrt(first * (1 - first) + second * (1 - second))
    return math.ceil(root**2 / (first - second) ** 2)


def units_for_discordance(only_first: float, only_second: float) -> int:
    """Paired units that show a difference with 80 % power, from the shares hit with one method only and with the other only."""
    total, difference = only_first + only_second, only_first - only_second
    root = Z * math.sqrt(total) + _Z_POWER * math.sqrt(total - difference**2)
    return math.ceil(root**2 / difference**2)


def factor_of_runs(runs: int) -> float:
    """Half-width of the t interval over this many runs (at least 2), in standard deviations between runs."""
    return float(stats.t.ppf(0.975, runs - 1)) / math.sqrt(runs)


def runs_for_half_width(sd: float, wanted: float, most: int = 1000) -> int | None:
    """The fewest runs (at least 3) whose t interval is no wider than twice this; None above `most`."""
    return next((runs for runs in range(3, most + 1) if sd * factor_of_runs(runs) <= wanted), None)


def detectable(sd: float, runs: int) -> float:
    """The smallest mean difference that the report's test over these runs (at least 3) finds with 80 % power, differences being normal.

    The paired t test below EXACT_RUNS, the exact sign-flip test from there on, by simulation. From 12 runs on it finds what the
    t test does, to within a hundredth.

    Args:
        sd: of the differences between the two methods from run to run.
    """
    return sd * (_by_sign_flips(runs) if EXACT_RUNS <= runs < _LIKE_T else _by_t(runs))


@lru_cache(maxsize=256)
def _by_t(runs: int) -> float:
    """What the paired t test finds, in standard deviations of the differences."""
    critical = float(stats.t.ppf(0.975, runs - 1))

    def power(shift: float) -> float:
        return float(stats.nct.sf(critical, runs - 1, shift) + stats.nct.cdf(-critical, runs - 1, shift))

    return _least(power, 1e-6) / math.sqrt(runs)


@lru_cache(maxsize=16)
def _by_sign_flips(runs: int) -> float:
    """The same for the exact sign-flip test: normal differences are drawn, their sign patterns enumerated."""
    draws = generator("power of sign flips", runs).standard_normal((_DRAWS, runs))
    # Half of the patterns will do, since a pattern and its opposite are as far from 0.
    signs = 1.0 - 2.0 * ((np.arange(2 ** (runs - 1))[:, None] >> np.arange(runs)) & 1)
    flipped, moved, whole = draws @ signs.T, signs.sum(axis=1), draws.sum(axis=1)
    rejected = math.ceil(_LEVEL * len(signs)) - 1  # the most patterns as far out as the one seen that leave p below the level

    def power(shift: float) -> float:
        reached = np.abs(flipped + shift * moved) >= np.abs(whole + shift * runs)[:, None] * (1 - 1e-12)
        return float((reached.sum(axis=1) <= rejected).mean())

    return _least(power, 1e-4)


def _least(power: Callable[[float], float], precision: float) -> float:
    """The smallest shift with 80 % power."""
    low, high = 0.0, 1.0
    while power(high) < POWER:
        high *= 2
    while high - low > precision:
        middle = (low + high) / 2
        low, high = (middle, high) if power(middle) < POWER else (low, middle)
    return high


def runs_to_detect(sd: float, difference: float, most: int = 200) -> int | None:
    """The fewest runs (at least 3) that find this difference with 80 % power; None above `most`. Six need not find what five do."""
    return next((runs for runs in range(3, most + 1) if detectable(sd, runs) <= difference), None)


def detectable_rate(base: float, n: int) -> float | None:
    """The nearest rate below `base` that n unpaired units in each arm tell from it with 80 % power; None if not even 0."""
    if base <= 0 or units_for_rates(base, 0.0) > n:
        return None
    low, high = 0.0, base
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if units_for_rates(base, middle) <= n else (low, middle)
    return low
