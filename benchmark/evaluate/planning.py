"""How many targets and seeds a difference takes, and the smallest difference that a plan can show."""

from __future__ import annotations

import math

from scipy import stats

from benchmark.evaluate.statistics import Z, wilson

POWER = 0.8
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
    """The smallest mean difference that the paired t test over these runs (at least 3) finds with 80 % power.

    Args:
        sd: of the differences between the two methods from run to run.
    """
    critical = float(stats.t.ppf(0.975, runs - 1))

    def power(shift: float) -> float:
        return float(stats.nct.sf(critical, runs - 1, shift) + stats.nct.cdf(-critical, runs - 1, shift))

    low, high = 0.0, 1.0
    while power(high) < POWER:
        high *= 2
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if power(middle) < POWER else (low, middle)
    return sd * high / math.sqrt(runs)


def runs_to_detect(sd: float, difference: float, most: int = 200) -> int | None:
    """The fewest runs (at least 3) that find this difference with 80 % power; None above `most`."""
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
