"""Dose-response curves out of recorded runs: which option is the dose, what each curve reached, and the count for 50 %."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from benchmark.errors import BenchError
from benchmark.evaluate.dose import DoseFit, enough, fit_dose
from benchmark.evaluate.statistics import TARGET_IMAGES, Interval
from benchmark.report.controls import without_controls
from benchmark.report.formatting import bracket, escape, percent
from benchmark.report.records import Run
from benchmark.report.tables import Group, interval_of, mean_of, per_run, to_csv
from benchmark.settings import canonical

SUCCESS = ("asr", "hit_at_1")
COLUMNS = (
    "attack",
    "defense",
    "scale",
    "dataset",
    "model",
    "metric",
    "n_doses",
    "dose_low",
    "dose_high",
    "floor",
    "top",
    "middle",
    "n50",
    "n50_low",
    "n50_high",
    "per_target",
    "note",
)


@dataclass(frozen=True)
class Point:
    """One dose of a curve: rows touched, the mean over runs and its interval."""

    n_poison: int
    mean: float
    interval: Interval
    values: tuple[float, ...]


@dataclass(frozen=True)
class DoseCurve:
    """One attack with all but its dose fixed, one defense.

    Attributes:
        attack: the attack's label without the option that is the dose.
        option: that option.
        n_targets: of an attack whose success is counted over targets, as many at each dose; 0 for any other.
        fit: None where `note` says why there is none.
    """

    attack: str
    defense: str
    scale: str
    dataset: str
    model: str
    option: str
    metric: str
    points: tuple[Point, ...]
    n_targets: int
    fit: DoseFit | None
    note: str


def dose_curves(runs: Sequence[Run]) -> list[DoseCurve]:
    """The curves of all attacks that were run at several doses, in the order of the runs.

    The dose is the attack's numeric option whose change alone changes the number of poisoned rows; with several such
    options, the one with the most values, and the others split the curves. So do settings of training and defense. Controls have no
    dose of the attack and are left out.

    Raises:
        BenchError: no attack was run at more than one dose.
    """
    by_attack: dict[str, list[Run]] = defaultdict(list)
    for run in without_controls(runs):
        if _metric(run) is not None:
            by_attack[run.record["resolved"]["attack"]["name"]].append(run)
    curves = []
    for members in by_attack.values():
        option = _dose_option(members)
        if option is None:
            continue
        split: dict[tuple[str, ...], list[Run]] = defaultdict(list)
        for run in members:
            split[(_label_without(run, option), *(run.label(name) for name in ("defense", "scale", "dataset", "model")), _settings_without(run, option))].append(run)
        for key, some in split.items():
            curve = _curve(key[:5], option, some)
            if curve is not None:
                curves.append(curve)
    if not curves:
        raise BenchError('no attack was run at more than one dose; give a grid an axis such as "attack.rate" = [0.0005, 0.001, 0.002, 0.005, 0.01]')
    return curves


def dose_table(curves: Sequence[DoseCurve]) -> pd.DataFrame:
    """One row a curve, the columns of COLUMNS; `per_target` is `n50` over the targets."""
    rows = []
    for curve in curves:
        fit = curve.fit
        rows.append(
            {
                **{name: getattr(curve, name) for name in ("attack", "defense", "scale", "dataset", "model", "metric", "note")},
                "n_doses": len(curve.points),
                "dose_low": curve.points[0].n_poison,
                "dose_high": curve.points[-1].n_poison,
                **({"floor": fit.floor, "top": fit.top, "middle": fit.middle, "n50": fit.n50, "n50_low": fit.low, "n50_high": fit.high} if fit else {}),
                "per_target": fit.n50 / curve.n_targets if fit and fit.n50 and curve.n_targets else None,
            }
        )
    return pd.DataFrame(rows, columns=list(COLUMNS))


def dose_markdown(curves: Sequence[DoseCurve]) -> str:
    """A row a curve: success at each dose, and the count for 50 % with its interval."""
    several = len({(curve.scale, curve.dataset, curve.model) for curve in curves}) > 1
    lines = ["| attack | defense | poisoned rows: success | rows for 50 % | a target | |", "|---|---|---|---|---|---|"]
    for curve in curves:
        shown = ", ".join(f"{point.n_poison}: {percent(point.mean)}{bracket(point.interval)}" for point in curve.points)
        count, per_target = "", ""
        if curve.fit and curve.fit.n50 is not None:
            low, high = (f"{value:.0f}" if value is not None else "" for value in (curve.fit.low, curve.fit.high))
            count = f"{curve.fit.n50:.0f} [{low}, {high}]"
            per_target = f"{curve.fit.n50 / curve.n_targets:.1f}" if curve.n_targets else ""
        place = f" ({curve.scale}, {curve.dataset}, {curve.model})" if several else ""
        lines.append(f"| {escape(curve.attack + place)} | {escape(curve.defense)} | {shown} | {count} | {per_target} | {escape(curve.note)} |")
    lines += [
        "",
        "Success is the attack's own rate at rank 1, a mean over runs with its 95 % interval. The count for 50 % is read off a logistic curve in the logarithm of the count, floor and top free; its bracket is a 95 % bootstrap over runs within each dose, which three runs make narrow. Nothing is extrapolated beyond the doses that were run.",
    ]
    return "\n".join(lines) + "\n"


def fitted(runs: Sequence[Run], what: str, form: str) -> str:
    """What `bench report --fit` prints: Markdown for `md`, one row a curve as CSV otherwise.

    Raises:
        BenchError: a fit other than `dose`, or no doses.
    """
    if what != "dose":
        raise BenchError(f"expected --fit dose, got {what!r}")
    curves = dose_curves(runs)
    return dose_markdown(curves) if form == "md" else to_csv(dose_table(curves))


def _curve(key: tuple[str, ...], option: str, runs: Sequence[Run]) -> DoseCurve | None:
    metric = _metric(runs[0])
    assert metric is not None
    by_dose: dict[int, dict[int, Run]] = defaultdict(dict)
    twice = set()
    for run in runs:
        n_poison = int(run.record["poison"]["n_poison"])
        if by_dose[n_poison].setdefault(run.seed, run) is not run:
            twice.add(n_poison)
    points, missing = [], []
    for n_poison, by_seed in sorted(by_dose.items()):
        group = Group(key, [by_seed[seed] for seed in sorted(by_seed)])
        values = [per_run(run, metric) for run in group.runs]
        mean = mean_of(values)
        if mean is None:
            missing.append(n_poison)
        else:
            points.append(Point(n_poison, mean, interval_of(group, metric), tuple(value for value in values if value is not None)))
    if len(points) < 2:
        return None
    values_of = {point.n_poison: list(point.values) for point in points}
    problem = f"several doses come to {', '.join(map(str, sorted(twice)))} rows" if twice else enough(values_of)
    fit = None if problem else fit_dose(values_of)
    per_target = all(entry["units"] in ("targets", TARGET_IMAGES) for entry in runs[0].values(metric))
    counts = {len(run.record["poison"]["targets"]) for run in runs} if per_target else set()
    n_targets = counts.pop() if len(counts) == 1 else 0
    lost = f"no rate in every run at {', '.join(map(str, missing))} rows" if missing else ""
    note = "; ".join(part for part in (lost, problem or (fit.note if fit else "")) if part)
    attack, defense, scale, dataset, model = key
    return DoseCurve(attack, defense, scale, dataset, model, option, metric, tuple(points), n_targets, fit, note)


def _metric(run: Run) -> str | None:
    return next((name for name in SUCCESS if run.values(name)), None)


def _dose_option(runs: Sequence[Run]) -> str | None:
    """The option whose change alone changes the number of poisoned rows; of several, the one with the most values."""
    options = [run.record["resolved"]["attack"]["options"] for run in runs]
    found: dict[str, int] = {}
    for name in sorted({name for one in options for name in one}):
        given = [one.get(name) for one in options]
        values = {canonical(value) for value in given if value is not None}
        if len(values) < 2 or any(isinstance(value, bool) or not isinstance(value, int | float | None) for value in given):
            continue
        counts: dict[str, set[int]] = defaultdict(set)
        for run in runs:
            rest = canonical([_settings_without(run, name), run.label("dataset")])
            counts[rest].add(int(run.record["poison"]["n_poison"]))
        if any(len(some) > 1 for some in counts.values()):
            found[name] = len(values)
    return max(found, key=lambda name: found[name]) if found else None


def _label_without(run: Run, option: str) -> str:
    """The attack's label without the dose, and with what it leaves open: `backdoor[size=5]`."""
    label = run.label("attack")
    name, bracket, inside = label.partition("[")
    if not bracket:
        return label
    value: Any = run.record["resolved"]["attack"]["options"].get(option)
    kept = inside.removesuffix("]").replace(f"{option}={value}", "").strip(",").replace(",,", ",")
    return f"{name}[{kept}]" if kept else name


def _settings_without(run: Run, option: str) -> str:
    """All settings but the seed and the dose: runs that differ in them are no doses of one curve."""
    resolved = {name: value for name, value in run.record["resolved"].items() if name != "seed"}
    attack = resolved["attack"]
    return canonical(resolved | {"attack": attack | {"options": {name: value for name, value in attack["options"].items() if name != option}}})
