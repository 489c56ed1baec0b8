"""What a plan can show, before its compute is spent: interval widths, and the smallest difference that it finds."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmark.errors import BenchError
from benchmark.evaluate import planning
from benchmark.evaluate.paired_tests import EXACT_RUNS
from benchmark.report.controls import without_controls
from benchmark.report.records import Run, load
from benchmark.report.same_model import model_of, plain_models
from benchmark.report.tables import groups, per_run


@dataclass(frozen=True)
class Spread:
    """Standard deviations of the ASR from run to run, pooled over cells of at least three runs, and where they come from."""

    of_runs: float
    of_differences: float
    source: str


def planned(grid: Path | None, targets: int | None, seeds: int | None, rates: tuple[float, float] | None, sd: float | None, results: Path) -> list[str]:
    """Lines for people.

    Args:
        rates: two rates to tell apart.
        sd: between runs; None takes it from the runs in `results`.

    Raises:
        BenchError: nothing asked, values outside their range, or a grid that cannot be read.
    """
    if grid is None and targets is None and seeds is None and rates is None:
        raise BenchError("nothing to plan: give a grid, --targets, --seeds or --rates; for instance bench plan --targets 16 --seeds 3 --rates 0.5,0.125")
    if rates is not None and not all(0 <= rate <= 1 for rate in rates):
        raise BenchError(f"expected --rates in [0, 1], got {rates[0]:g},{rates[1]:g}. A rate is a fraction: 12.5 % is 0.125")
    lines: list[str] = []
    if grid is not None:
        found = _of_grid(grid)
        lines.append(
            f"{grid}: {found.cells} cells, {found.most} runs of most, {found.fewest} of some"
            if found.fewest != found.most
            else f"{grid}: {found.cells} cells, {found.most} runs of each"
        )
        seeds, targets = seeds or found.fewest, targets or found.targets
    if targets:
        lines += _of_units(targets)
    spread = _spread(sd, results)
    if seeds:
        lines += _of_runs(seeds, spread)
    if rates is not None and rates[0] != rates[1]:
        lines += _of_rates(rates, spread)
    return lines


def _of_units(n: int) -> list[str]:
    lines = [
        f"one run, {n} units: intervals of at most +-{_points(planning.half_width(n))} points (Wilson). None of {n} bounds the rate below {_points(planning.bound_of_zero(n))} %. They speak about that one model."
    ]
    near = planning.detectable_rate(0.5, n)
    lines.append(
        f"two runs compared over {n} units each: 50 % is told from {_points(near)} % or less in 4 of 5 cases"
        if near is not None
        else f"two runs compared over {n} units each: not even 50 % is told from 0"
    )
    return lines


def _of_runs(runs: int, spread: Spread | None) -> list[str]:
    lines = (
        []
        if runs >= EXACT_RUNS
        else [f"{runs} {'run' if runs == 1 else 'runs'}: no exact paired test reaches p < .05 with fewer than {EXACT_RUNS}; the paired t test takes normal differences for granted"]
    )
    if runs < 3:
        return [*lines, f"{runs} {'run has' if runs == 1 else 'runs have'} no interval over runs; take 3 or more"]
    if spread is None:
        return [*lines, f"{runs} runs: the interval is +-{planning.factor_of_runs(runs):.2f} standard deviations between runs; give --sd, or --results with cells of three runs"]
    return [
        *lines,
        f"{runs} runs, spread {_points(spread.of_runs)} points ({spread.source}): the interval is +-{_points(spread.of_runs * planning.factor_of_runs(runs))} points",
        f"a difference between two defenses on the same poison is found in 4 of 5 cases from {_points(planning.detectable(spread.of_differences, runs))} points on ({_test(runs)}, spread of differences {_points(spread.of_differences)} points; Holm's correction for several comparisons asks for more)",
    ]


def _test(runs: int) -> str:
    """The test that the report would use."""
    return "exact sign flips" if runs >= EXACT_RUNS else "paired t"


def _of_rates(rates: tuple[float, float], spread: Spread | None) -> list[str]:
    gap = abs(rates[0] - rates[1])
    lines = [f"{100 * rates[0]:g} % and {100 * rates[1]:g} %: {planning.units_for_rates(*rates)} unpaired units in each arm (80 % power, two-sided .05)"]
    more, fewer = max(rates), min(rates)
    nested, independent = planning.units_for_discordance(more - fewer, 0), planning.units_for_discordance(more * (1 - fewer), fewer * (1 - more))
    lines.append(
        f"the same targets under both defenses (McNemar): {nested} if every target that falls under the better one falls under the other too, {independent} if who falls is independent"
    )
    if spread is not None:
        runs = planning.runs_to_detect(spread.of_differences, gap)
        lines.append(f"the same over runs: {runs} runs ({_test(runs)})" if runs else "the same over runs: more than 200 runs")
    return lines


@dataclass(frozen=True)
class _Grid:
    cells: int
    fewest: int
    most: int
    targets: int | None


def _of_grid(path: Path) -> _Grid:
    from benchmark.grid import read_grid
    from benchmark.registry import configure, find
    from benchmark.request import Asked, Request, scale_of

    cells = read_grid(path, Request()).cells
    runs: dict[str, set[int]] = defaultdict(set)
    targets: set[int] = set()

    def n_targets(cell: Asked) -> int | None:
        plugin = find("attack", cell.attack)
        attack = configure(plugin, scale_of(cell.request).options.get(plugin.name, {}), cell.attack_options)
        return getattr(attack, "n_targets", None)

    for cell in cells:
        runs[repr((cell.attack, cell.attack_options, cell.defense, cell.defense_options, cell.request.scale, cell.request.sets, cell.request.sham, cell.request.clean_model))].add(
            cell.seed
        )
        found = n_targets(cell)
        if found:
            targets.add(found)
    counts = sorted(len(seeds) for seeds in runs.values())
    return _Grid(len(cells), counts[0], counts[len(counts) // 2], min(targets) if targets else None)


def _spread(sd: float | None, results: Path) -> Spread | None:
    if sd is not None:
        return Spread(sd, sd * math.sqrt(2), "as given; differences as if unpaired")
    if not (results / "runs").is_dir():
        return None
    runs = without_controls(load(results))
    plain = plain_models(runs)
    # The model of `clip` under a judge's name is no run more, and its difference to `clip` no difference.
    cells = [cell for cell in groups(runs)[0] if model_of(cell, plain) is None]
    variances = [float(np.var(values, ddof=1)) for cell in cells if len(values := _values(cell.runs)) >= 3]
    if not variances:
        return None
    of_differences = []
    for left, right in itertools.combinations(cells, 2):
        if (left.key[0], *left.key[2:]) == (right.key[0], *right.key[2:]):
            shared = sorted({run.seed for run in left.runs} & {run.seed for run in right.runs})
            one, two = (_values([run for run in cell.runs if run.seed in shared]) for cell in (left, right))
            if len(shared) >= 3 and len(one) == len(two) == len(shared):
                of_differences.append(float(np.var(np.subtract(one, two), ddof=1)))
    spread = math.sqrt(float(np.mean(variances)))
    return Spread(
        spread,
        math.sqrt(float(np.mean(of_differences))) if of_differences else spread * math.sqrt(2),
        f"of {len(variances)} cells in {results}, whose own go from {_points(math.sqrt(min(variances)))} to {_points(math.sqrt(max(variances)))}",
    )


def _values(runs: Sequence[Run]) -> list[float]:
    return [value for run in sorted(runs, key=lambda run: run.seed) if (value := per_run(run, "asr")) is not None]


def _points(value: float) -> str:
    return f"{100 * value:.1f}" if value < 0.1 else f"{100 * value:.0f}"
