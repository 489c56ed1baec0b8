"""How often each interval contains the rate it is for: exact where the outcomes can be listed, by drawing otherwise.

`python -m benchmark.evaluate.coverage results/coverage.csv` makes the committed table.

A run's own rate is drawn from a beta distribution with mean p and standard deviation `spread * sqrt(p * (1 - p))`; its successes
are binomial over n units. Spread 0: all runs have the rate p.
"""

from __future__ import annotations

import csv
import io
import itertools
import sys
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from benchmark.evaluate.bootstrap import MIN_RUNS, nested_means
from benchmark.evaluate.statistics import Interval, over_runs
from benchmark.seeding import generator

RATES = (0.03, 0.125, 0.5, 0.9)
UNITS = (16, 32, 64)
RUNS = (1, 3, 5, 10)
SPREADS = (0.0, 0.3)
_DRAWS = 10_000
_BOOTSTRAP_DRAWS = 1000
_BOOTSTRAP_RESAMPLES = 1000


@dataclass(frozen=True)
class Row:
    """Coverage of a 95 % interval in one setting, and its mean width."""

    interval: str
    rate: float
    n: int
    runs: int
    spread: float
    coverage: float
    width: float
    how: str

    def text(self) -> list[str]:
        """The cells of its line in the table."""
        return [f"{value:.4f}" if name in ("coverage", "width") else str(value) for name, value in zip(COLUMNS, astuple(self), strict=True)]


COLUMNS = tuple(field.name for field in fields(Row))


def settings() -> Iterator[tuple[str, float, int, int, float]]:
    """What the table has a row for: kind of interval, rate, units, runs, spread."""
    for rate, n, runs, spread in itertools.product(RATES, UNITS, RUNS, SPREADS):
        yield ("wilson" if runs == 1 else "t", rate, n, runs, spread)
        if runs >= MIN_RUNS:
            yield "bootstrap", rate, n, runs, spread


def row(interval: str, rate: float, n: int, runs: int, spread: float) -> Row:
    """One row of the table. The rate has to lie in the interval that `over_runs`, or the nested bootstrap, gives."""
    if interval == "bootstrap":
        return Row(interval, rate, n, runs, spread, *_bootstrap(rate, n, runs, spread), f"{_BOOTSTRAP_DRAWS} draws")
    if runs <= 3:
        counts = np.array(list(itertools.combinations_with_replacement(range(n + 1), runs)))
        chance = _chances(rate, n, spread)
        arrangements = np.array([special.factorial(runs) / np.prod(special.factorial(np.unique(one, return_counts=True)[1])) for one in counts])
        return Row(interval, rate, n, runs, spread, *_covered(counts, arrangements * chance[counts].prod(axis=1), rate, n), "exact")
    counts, repeats = np.unique(np.sort(_draw(rate, n, runs, spread, _DRAWS), axis=1), axis=0, return_counts=True)
    return Row(interval, rate, n, runs, spread, *_covered(counts, repeats / _DRAWS, rate, n), f"{_DRAWS} draws")


def table() -> str:
    """The whole table as CSV."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for setting in settings():
        writer.writerow(row(*setting).text())
    return out.getvalue()


def summary(path: Path) -> str:
    """The committed table by interval and runs, as Markdown: coverage as a range over the numbers of units, in percent."""
    rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    kinds = {"wilson": "Wilson", "t": "t over runs", "bootstrap": "two-way bootstrap"}
    heads = [f"p = {rate:g}{', runs spread' if spread else ''}" for spread in SPREADS for rate in RATES]
    lines = ["| interval | runs | " + " | ".join(heads) + " |", "|" + "---|" * (len(heads) + 2)]
    for (kind, name), runs in itertools.product(kinds.items(), RUNS):
        found = [one for one in rows if one["interval"] == kind and one["runs"] == str(runs)]
        if not found:
            continue
        cells = []
        for spread, rate in itertools.product(SPREADS, RATES):
            covered = sorted(round(100 * float(one["coverage"])) for one in found if (one["spread"], one["rate"]) == (str(spread), str(rate)))
            cells.append(f"{covered[0]} to {covered[-1]}" if covered[0] != covered[-1] else str(covered[0]))
        lines.append(f"| {name} | {runs} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _chances(rate: float, n: int, spread: float) -> NDArray[np.float64]:
    """Probability (n + 1,) of each number of successes of one run."""
    if spread == 0:
        return np.asarray(stats.binom.pmf(np.arange(n + 1), n, rate))
    total = 1 / spread**2 - 1  # of a beta whose variance is spread ** 2 * rate * (1 - rate)
    return np.asarray(stats.betabinom.pmf(np.arange(n + 1), n, rate * total, (1 - rate) * total))


def _draw(rate: float, n: int, runs: int, spread: float, draws: int) -> NDArray[np.int64]:
    """Successes (draws, runs)."""
    rng = generator("coverage", rate, n, runs, spread)
    total = 1 / spread**2 - 1 if spread else 0.0
    own = rng.beta(rate * total, (1 - rate) * total, (draws, runs)) if spread else np.full((draws, runs), rate)
    return rng.binomial(n, own)


def _covered(counts: NDArray[np.int64], weights: NDArray[np.float64], rate: float, n: int) -> tuple[float, float]:
    found = [over_runs((one / n).tolist(), n, "targets") for one in counts]
    return _share(found, weights, rate)


def _bootstrap(rate: float, n: int, runs: int, spread: float) -> tuple[float, float]:
    rng = generator("coverage of the bootstrap", rate, n, runs, spread)
    found = []
    for successes in _draw(rate, n, runs, spread, _BOOTSTRAP_DRAWS):
        low, high = np.quantile(nested_means(rng, successes, np.full(runs, n), _BOOTSTRAP_RESAMPLES), [0.025, 0.975])
        found.append(Interval(float(low), float(high), "bootstrap"))
    return _share(found, np.full(len(found), 1 / len(found)), rate)


def _share(found: list[Interval], weights: NDArray[np.float64], rate: float) -> tuple[float, float]:
    low, high = (np.array([getattr(one, end) for one in found], dtype=np.float64) for end in ("low", "high"))
    inside = (low <= rate + 1e-12) & (rate - 1e-12 <= high)
    return float(weights[inside].sum()), float((weights * (high - low)).sum())


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(table(), encoding="utf-8")
