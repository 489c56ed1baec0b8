"""What the plots show, taken from records: curves over epochs, heat maps, cost against success. Drawn by `plots` and by `figures`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmark.evaluate.statistics import Interval
from benchmark.report.records import Run
from benchmark.report.tables import Group, interval_of, mean_of, per_run

CURVES: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    ("attack", "Attack success", (("asr", "ASR"), ("asr_floor", "floor"), ("triggered_acc1", "true class kept"))),
    ("zero_shot", "Zero-shot accuracy", (("zero_shot_acc1", "mean over the sets"),)),
    ("similarity", "Similarity of image and caption", (("poisoned_similarity", "poisoned pairs"), ("clean_similarity", "clean pairs"))),
    ("pool", "Nearest caption in a pool, for poisoned images", (("pool_true_class", "of the true class"), ("pool_goal_class", "of the target class"))),
    ("split", "The safe set", (("safe_share", "its size"), ("safe_poison_recall", "poison in it, of all"), ("split_auroc", "AUROC of dissimilarity"))),
    ("top", "Poison among the most similar pairs, of all", tuple((f"poison_in_top_{share}", f"in the first {share:.0%}") for share in (0.1, 0.15, 0.3))),
)
"""Charts of a cell: name, title, and the metrics of a curve's points with what they are called."""


@dataclass(frozen=True)
class Curve:
    """One metric over epochs: a line for each run, and their mean where all runs have a value."""

    name: str
    runs: list[list[tuple[int, float]]]

    @property
    def mean(self) -> list[tuple[int, float]]:
        """Mean over runs, at the epochs that all of them have."""
        by_epoch: dict[int, list[float]] = {}
        for points in self.runs:
            for epoch, value in points:
                by_epoch.setdefault(epoch, []).append(value)
        return [(epoch, sum(values) / len(values)) for epoch, values in sorted(by_epoch.items()) if len(values) == len(self.runs)]


@dataclass(frozen=True)
class Chart:
    """Curves that share axes, over epochs.

    Attributes:
        shaded: (first, last) epochs of each stretch whose phase is not `clip`; empty where all epochs are of one phase.
        phases: names of the shaded phases.
    """

    name: str
    title: str
    curves: list[Curve]
    shaded: list[tuple[int, int]]
    phases: str


@dataclass(frozen=True)
class Panel:
    """Rows of one scale, dataset and model, as attack x defense."""

    scale: str
    dataset: str
    model: str
    attacks: list[str]
    defenses: list[str]
    cells: dict[tuple[str, str], list[Group]]


BESIDE_NOTE = "* works beside its trainings for more than a tenth of their time, of which pairs count forward passes at most."


@dataclass(frozen=True)
class Spent:
    """Seconds that a defense took, mean over a group's runs.

    Attributes:
        whole: with what it did beside its trainings; False for trainings alone, because a run of the group does not tell the rest.
    """

    seconds: float
    whole: bool


@dataclass(frozen=True)
class Trade:
    """A defense on one attack: what it costs, and what the attack still reaches.

    Attributes:
        cost: pairs over those of `clip` on the same attack; see `Run.pairs`.
        beside: it worked beside its trainings for more than a tenth of their seconds; see BESIDE_NOTE.
        best: no other defense is at least as good in both and better in one.
    """

    defense: str
    cost: float
    asr: float
    interval: Interval
    told: bool
    best: bool
    beside: bool


def charts(group: Group) -> list[Chart]:
    """The charts of a group's curves that have at least one value."""
    shaded, phases = _shaded(group.runs[0].record["curve"])
    found = []
    for name, title, metrics in CURVES:
        curves = [Curve(label, runs) for metric, label in metrics if any(runs := [_over_epochs(run, metric) for run in group.runs])]
        if curves:
            found.append(Chart(name, title, curves, shaded, phases))
    return found


def panels(groups: Sequence[Group]) -> list[Panel]:
    """Groups, in the order given, by scale, dataset and model."""
    found: dict[tuple[str, ...], Panel] = {}
    for group in groups:
        attack, defense, scale, dataset, model = group.key
        panel = found.setdefault((scale, dataset, model), Panel(scale, dataset, model, [], [], {}))
        if attack not in panel.attacks:
            panel.attacks.append(attack)
        if defense not in panel.defenses:
            panel.defenses.append(defense)
        panel.cells.setdefault((attack, defense), []).append(group)
    return [_in_order(panel) for panel in found.values()]


def spent(group: Group) -> Spent | None:
    """Seconds of a group, of the same parts of all its runs; None if a run does not tell what its trainings took."""
    trained = mean_of([run.train_seconds for run in group.runs])
    beside = mean_of([run.beside_seconds for run in group.runs])
    return None if trained is None else Spent(trained + (beside or 0.0), beside is not None)


def seconds(group: Group) -> float | None:
    """The seconds of `spent`."""
    found = spent(group)
    return None if found is None else found.seconds


def trades(panel: Panel, attack: str) -> list[Trade]:
    """Cost against ASR of every defense on this attack that has both; cost in pairs, as a multiple of what `clip` took on it.

    Pairs need no machine: runs that were made on others, or on a busy one, compare.
    """
    reference = mean_of([run.pairs for group in panel.cells.get((attack, "clip"), []) for run in group.runs])
    rows: list[tuple[Group, float, float]] = []
    for defense in panel.defenses if reference else []:
        for group in panel.cells.get((attack, defense), []):
            pairs, asr = mean_of([run.pairs for run in group.runs]), mean_of([per_run(run, "asr") for run in group.runs])
            if pairs and asr is not None and reference:
                rows.append((group, round(pairs / reference, 6), asr))
    found = []
    for group, cost, asr in rows:
        told = group.runs[0].record["told"] != "nothing"
        beaten = any(
            other[0].runs[0].record["told"] == "nothing" and other[1] <= cost and other[2] <= asr and (other[1] < cost or other[2] < asr) for other in rows if other[0] is not group
        )
        found.append(Trade(group.key[1], cost, asr, interval_of(group, "asr"), told, not told and not beaten, _works_beside(group)))
    return found


def _works_beside(group: Group) -> bool:
    known = [(run.beside_seconds, run.train_seconds) for run in group.runs if run.beside_seconds is not None and run.train_seconds is not None]
    return sum(beside for beside, _ in known) > sum(trained for _, trained in known) / 10


def mean_over(point: dict[str, Any], metric: str) -> float | None:
    """Mean over evaluation sets or probes of a curve point's metric; None without one."""
    values = [value for name, value in point.get("metrics", {}).items() if name.partition("/")[0] == metric]
    return sum(values) / len(values) if values and None not in values else None


def _over_epochs(run: Run, metric: str) -> list[tuple[int, float]]:
    return [(point["epoch"], value) for point in run.record["curve"] if (value := mean_over(point, metric)) is not None]


def _shaded(curve: Sequence[dict[str, Any]]) -> tuple[list[tuple[int, int]], str]:
    other = [(point["epoch"], point["phase"]) for point in curve if point["phase"] != "clip"]
    if not other or len({point["phase"] for point in curve}) == 1:
        return [], ""
    stretches: list[tuple[int, int]] = []
    for epoch, _ in other:
        if stretches and stretches[-1][1] == epoch - 1:
            stretches[-1] = (stretches[-1][0], epoch)
        else:
            stretches.append((epoch, epoch))
    return stretches, ", ".join(dict.fromkeys(phase for _, phase in other))


def _in_order(panel: Panel) -> Panel:
    """Plain defenses first, each before its `+aug`; controls that are told the truth last."""

    def place(defense: str) -> tuple[Any, ...]:
        groups = [group for (_, one), members in panel.cells.items() if one == defense for group in members]
        bare = defense.partition("[")[0]
        return (groups[0].runs[0].record["told"] != "nothing", bare.removesuffix("+aug") != "clip", bare.removesuffix("+aug"), bare.endswith("+aug"), defense)

    return Panel(panel.scale, panel.dataset, panel.model, panel.attacks, sorted(panel.defenses, key=place), panel.cells)


Value = Callable[[Group], float | None]
METRICS: dict[str, tuple[str, Value]] = {
    "asr": ("ASR", lambda group: _mean(group, "asr")),
    "zero_shot": ("zero-shot accuracy", lambda group: _mean(group, "zero_shot_acc1")),
    "probe": ("linear-probe accuracy", lambda group: _mean(group, "linear_probe_acc1")),
    "cost": ("seconds", seconds),
}
"""What a heat map can show: its name, what it is called, and its value for a group."""
COLUMNS = {"asr": "asr", "zero_shot": "zero_shot_acc1", "probe": "linear_probe_acc1"}


def _mean(group: Group, metric: str) -> float | None:
    return mean_of([per_run(run, metric) for run in group.runs])
