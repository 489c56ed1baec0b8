"""Dose-response: attack success against the number of poisoned rows, and the count at which it reaches a half."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from benchmark.seeding import generator

MIN_DOSES = 5
MIN_RUNS = 3
RESAMPLES = 500
_LOGIT_LIMIT = 50.0


@dataclass(frozen=True)
class DoseFit:
    """A logistic curve in log dose between a floor and a top, fitted to one value a run.

    Attributes:
        middle: the dose half-way between floor and top.
        slope: per unit of the natural logarithm of the dose, at the middle, in logits.
        n50: the dose at which the curve is at 0.5; None if it is not within the doses.
        low, high: 95 % percentile interval of `n50`, over runs resampled within each dose; where no dose lies on the slope,
            at least from the dose below it to the dose above. None where it reaches beyond the smallest or the largest dose.
        note: what `n50` and its interval cannot say.
    """

    floor: float
    top: float
    middle: float
    slope: float
    n50: float | None
    low: float | None
    high: float | None
    note: str

    def __call__(self, doses: NDArray[np.float64]) -> NDArray[np.float64]:
        """The curve at these doses (n,)."""
        return _curve(np.array([self.floor, self.top, np.log(self.middle), self.slope]), np.log(doses))


def enough(values: dict[int, list[float]]) -> str | None:
    """Why a curve cannot be fitted to these values by dose, or None. A dose of 0 has no place on a log axis and does not count."""
    values = {dose: runs for dose, runs in values.items() if dose > 0}
    if len(values) < MIN_DOSES:
        return f"{len(values)} {'dose' if len(values) == 1 else 'doses'}, a fit wants {MIN_DOSES}"
    thin = [dose for dose, runs in sorted(values.items()) if len(runs) < MIN_RUNS]
    if thin:
        return f"fewer than {MIN_RUNS} runs at {', '.join(map(str, thin))} rows"
    return None


def fit_dose(values: dict[int, list[float]], resamples: int = RESAMPLES) -> DoseFit:
    """Least squares over all runs, floor and top free within [0, 1], rising; the interval is not extrapolated.

    A resample whose curve does not cross 0.5 within the doses counts as beyond the end on that side. Three runs a dose give
    few distinct resamples, so the interval is on the narrow side.

    Args:
        values: success rates of the runs by dose; see `enough`. Dose 0 is left out.

    Raises:
        ValueError: too few of them.

    Source: the four-parameter logistic of dose-response studies (Finney, Probit Analysis, 1971); Efron's percentile interval.
    """
    problem = enough(values)
    if problem:
        raise ValueError(problem)
    doses = np.array(sorted(dose for dose in values if dose > 0), dtype=np.float64)
    runs = [np.array(values[int(dose)]) for dose in doses]
    log_doses = np.log(doses)
    best = _fit(log_doses, runs)
    crossing = _crossing(best, log_doses)
    rng = generator("dose bootstrap", [sorted(map(float, run)) for run in runs])
    found = np.sort([_crossing(_fit(log_doses, [rng.choice(run, len(run)) for run in runs], best), log_doses) for _ in range(resamples)])
    low, high = found[int(0.025 * (resamples - 1))], found[int(np.ceil(0.975 * (resamples - 1)))]
    gap = _gap(best, runs, crossing)
    if gap is not None:
        low, high = min(low, log_doses[gap]), max(high, log_doses[gap + 1])
    ends = f"{doses[0]:g}", f"{doses[-1]:g}"
    floor, top, middle, slope = map(float, best)
    return DoseFit(
        floor,
        top,
        float(np.exp(middle)),
        slope,
        float(np.exp(crossing)) if np.isfinite(crossing) else None,
        float(np.exp(low)) if np.isfinite(low) else None,
        float(np.exp(high)) if np.isfinite(high) else None,
        _note(crossing, low, high, ends, top) or ("" if gap is None else f"no dose lies on the slope, between {doses[gap]:g} and {doses[gap + 1]:g} rows"),
    )


def _gap(best: NDArray[np.float64], runs: Sequence[NDArray[np.float64]], crossing: float) -> int | None:
    """The dose after which success jumps from the floor to the top, if none lies in between: any steep curve fits then."""
    floor, top = best[:2]
    means = np.array([run.mean() for run in runs])
    margin = 0.1 * (top - floor)
    if not np.isfinite(crossing) or bool(((means > floor + margin) & (means < top - margin)).any()):
        return None
    below = np.flatnonzero(means <= floor + margin)
    return int(below[-1]) if len(below) and below[-1] + 1 < len(means) else None


def _note(crossing: float, low: float, high: float, ends: tuple[str, str], top: float) -> str:
    if crossing == -np.inf:
        return f"above 50 % from the smallest dose on ({ends[0]} rows)"
    if crossing == np.inf:
        return f"below 50 % up to the largest dose ({ends[1]} rows)" + (f"; the curve levels off at {100 * top:.0f} %" if top < 0.5 else "")
    parts = ([f"interval open below {ends[0]} rows"] if not np.isfinite(low) else []) + ([f"interval open above {ends[1]} rows"] if not np.isfinite(high) else [])
    return "; ".join(parts)


def _curve(parameters: NDArray[np.float64], log_doses: NDArray[np.float64]) -> NDArray[np.float64]:
    floor, top, middle, slope = parameters
    return np.asarray(floor + (top - floor) / (1 + np.exp(-np.clip(slope * (log_doses - middle), -_LOGIT_LIMIT, _LOGIT_LIMIT))))


def _fit(log_doses: NDArray[np.float64], runs: Sequence[NDArray[np.float64]], start: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
    """Floor, top, middle (log) and slope (4,)."""
    # Squares over the runs of a dose and over their mean, weighted by their number, have one minimum.
    y, weights = np.array([run.mean() for run in runs]), np.sqrt([len(run) for run in runs])
    span = log_doses[-1] - log_doses[0]
    step = float(np.diff(log_doses).min())

    def unpacked(free: NDArray[np.float64]) -> NDArray[np.float64]:
        floor, share, middle, slope = free
        return np.array([floor, floor + (1 - floor) * share, middle, slope])

    # The middle stays within one step of the doses and no slope is steeper than a step: beyond that the data say nothing.
    low = np.array([0.0, 0.0, log_doses[0] - step, 0.5 / span])
    high = np.array([1.0, 1.0, log_doses[-1] + step, 10.0 / step])
    floor, top = float(np.clip(y.min(), 0.001, 0.98)), float(np.clip(y.max(), 0.02, 0.999))
    share = (max(top - floor, 0.01)) / (1 - floor)
    if start is None:
        starts = [np.array([floor, share, middle, slope]) for middle in log_doses for slope in (2 / step, 4 / span)]
    else:
        starts = [np.array([start[0], (start[1] - start[0]) / max(1 - start[0], 1e-9), start[2], start[3]])]

    def off(free: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(weights * (_curve(unpacked(free), log_doses) - y))

    fits = [least_squares(off, np.clip(one, low + 1e-6, high - 1e-6), bounds=(low, high), ftol=1e-7, xtol=1e-7) for one in starts]
    return unpacked(min(fits, key=lambda fit: float(fit.cost)).x)


def _crossing(parameters: NDArray[np.float64], log_doses: NDArray[np.float64]) -> float:
    """Log dose at which the curve is at 0.5; minus or plus infinity where it is above or below it at all doses."""
    floor, top, middle, slope = parameters
    first, last = _curve(parameters, log_doses[[0, -1]])
    if first >= 0.5:
        return -np.inf
    if last < 0.5:
        return np.inf
    share = (0.5 - floor) / (top - floor)
    return float(middle + np.log(share / (1 - share)) / slope) if share < 1 else np.inf
