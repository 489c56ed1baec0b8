"""Two-way bootstrap: how sure a mean over runs and targets is when both could have come out otherwise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from benchmark.evaluate.statistics import Interval
from benchmark.seeding import generator

MIN_RUNS = 5
MIN_UNITS = 8
RESAMPLES = 10_000


def two_way(hits: Sequence[NDArray[np.bool_]], crossed: bool, resamples: int = RESAMPLES) -> Interval:
    """The 95 % percentile interval of the mean success.

    Args:
        hits: success of each unit (n,) in each run; equal numbers of units if crossed.
        crossed: whether all runs have the same units (test images); they are then resampled once for all runs. Otherwise units
            (targets drawn with each seed) are resampled within each resampled run.

    Source: Efron's percentile interval; crossed factors are resampled independently (Owen, Ann. Appl. Stat. 2007).
    """
    runs, units = len(hits), min((len(one) for one in hits), default=0)
    if runs < MIN_RUNS or units < MIN_UNITS:
        return Interval(None, None, f"{runs} runs and {units} units; the bootstrap wants {MIN_RUNS} and {MIN_UNITS}")
    rng = generator("two-way bootstrap", crossed, [int(one.sum()) for one in hits])
    if crossed:
        chosen = rng.multinomial(runs, np.full(runs, 1 / runs), resamples)
        matrix = np.stack(hits).astype(np.float32)
        shares = np.concatenate([rng.multinomial(units, np.full(units, 1 / units), some).astype(np.float32) @ matrix.T for some in _chunks(resamples)]) / units
        means = (chosen * shares).sum(axis=1) / runs
    else:
        means = nested_means(rng, np.array([one.sum() for one in hits]), np.array([len(one) for one in hits]), resamples)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(low), float(high), f"two-way bootstrap, {runs} runs with {units} {'units in common' if crossed else 'units each'}")


def nested_means(rng: np.random.Generator, successes: NDArray[np.int64], units: NDArray[np.int64], resamples: int) -> NDArray[np.float64]:
    """Resampled means (resamples,): runs with replacement, then the units of each chosen run with replacement."""
    picked = rng.integers(0, len(successes), (resamples, len(successes)))
    drawn = rng.binomial(units[picked], (successes / units)[picked])
    return np.asarray((drawn / units[picked]).mean(axis=1))


def _chunks(total: int, size: int = 1000) -> list[int]:
    return [min(size, total - begin) for begin in range(0, total, size)]
