"""A mixture of two normal distributions on a line, fitted by expectation-maximisation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_FLOOR = 1e-6
_TOLERANCE = 1e-3
_ITERATIONS = 100


@dataclass(frozen=True)
class Mixture:
    """Two components, the one with the smaller mean first.

    Attributes:
        iterations: rounds until the mean log-likelihood moved by less than 1e-3, at most 100.
    """

    means: tuple[float, float]
    variances: tuple[float, float]
    weights: tuple[float, float]
    iterations: int

    @property
    def separates(self) -> bool:
        """Whether the means lie further apart than the sum of the standard deviations."""
        return self.means[1] - self.means[0] > float(np.sqrt(self.variances[0]) + np.sqrt(self.variances[1]))

    def posterior(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Probability (n,) that a value comes from the component with the larger mean."""
        logs = _log_joint(np.asarray(values, dtype=np.float64), np.array(self.means), np.array(self.variances), np.array(self.weights))
        return np.asarray(np.exp(logs[:, 1] - np.logaddexp(logs[:, 0], logs[:, 1])), dtype=np.float64)


def fit(values: NDArray[np.float64]) -> Mixture:
    """The mixture of values (n,), started from the best cut into two groups; the same values give the same mixture.

    Variances have 1e-6 added, as scikit-learn's `GaussianMixture` does. On components that overlap, the loose tolerance makes
    the result depend on the start.
    """
    x = np.asarray(values, dtype=np.float64)
    high = x > _cut(x)
    shares = np.stack([~high, high], axis=1).astype(np.float64)
    before, iterations = -np.inf, 0
    while iterations < _ITERATIONS:
        iterations += 1
        counts = shares.sum(axis=0) + 10 * np.finfo(np.float64).eps
        means = shares.T @ x / counts
        variances = (shares * (x[:, None] - means) ** 2).sum(axis=0) / counts + _FLOOR
        weights = counts / counts.sum()
        logs = _log_joint(x, means, variances, weights)
        totals = np.logaddexp(logs[:, 0], logs[:, 1])
        shares = np.exp(logs - totals[:, None])
        likelihood = float(totals.mean())
        if abs(likelihood - before) < _TOLERANCE:
            break
        before = likelihood
    low, top = np.argsort(means, kind="stable")
    pick = [(float(array[low]), float(array[top])) for array in (means, variances, weights)]
    return Mixture(pick[0], pick[1], pick[2], iterations)


def _cut(x: NDArray[np.float64]) -> float:
    """The largest value of the lower group in the two-means split with the least squared distance."""
    ordered = np.sort(x)
    n = len(ordered)
    if n < 2:
        return float(ordered[0]) if n else 0.0
    sizes = np.arange(1, n)
    sums = np.cumsum(ordered)[:-1]
    between = sums**2 / sizes + (ordered.sum() - sums) ** 2 / (n - sizes)  # the least within is the most between
    return float(ordered[int(np.argmax(between))])


def _log_joint(x: NDArray[np.float64], means: NDArray[np.float64], variances: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.log(weights) - 0.5 * (np.log(2 * np.pi * variances) + (x[:, None] - means) ** 2 / variances))
