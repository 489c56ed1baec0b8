"""Figures for papers: the page's plots as PDF, SVG or PNG, in the sizes and fonts of a two-column article. Equal bytes for equal records."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from benchmark.errors import BenchError, unknown
from benchmark.report.controls import without_controls
from benchmark.report.dose import DoseCurve, dose_curves
from benchmark.report.records import Run
from benchmark.report.series import BESIDE_NOTE, COLUMNS, METRICS, Panel, charts, panels, trades
from benchmark.report.tables import Group, groups, interval_of, place_of

FULL_WIDTH, COLUMN_WIDTH = 6.75, 3.25
FORMATS = ("pdf", "svg", "png")
MOST_CELLS = 24
# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9", "#000000", "#e69f00")
MARKS = ("o", "s", "^", "D", "v", "x", "P", "*")
DASHES = ("-", "--", ":", "-.")
_RAMPS = {"asr": ("#fff6ee", "#a63603"), "zero_shot": ("#f1f6fb", "#08519c")}
_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 7,
    "axes.titlesize": 7.5,
    "axes.labelsize": 7,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.fontsize": 6.5,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "clip-poison-bench",
    "savefig.dpi": 300,
}
_UNDATED: dict[str, dict[str, Any]] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {"Software": None}}


def draw(kind: str, runs: Sequence[Run], out: Path) -> Path:
    """Writes one figure of these runs, controls left out; its format is the file's ending.

    Raises:
        BenchError: an unknown figure or format, too much for one figure, or nothing to draw.
    """
    if kind not in FIGURES:
        raise unknown("figure", kind, FIGURES)
    ending = out.suffix.removeprefix(".").lower()
    if ending not in FORMATS:
        raise BenchError(f"expected --out with an ending of {', '.join(FORMATS)}, got {str(out)!r}")
    runs = without_controls(runs)
    if not runs:
        raise BenchError("all of these runs are controls (sham poison, clean models), which no figure shows; choose others with --scale")
    found, _ = groups(runs)
    shown = panels(sorted(found, key=lambda group: place_of(group.key)))
    with matplotlib.rc_context(_STYLE):
        figure = FIGURES[kind](shown, runs)
        try:
            figure.savefig(out, format=ending, metadata=_UNDATED[ending], bbox_inches="tight", pad_inches=0.03)
        except OSError as error:
            raise BenchError(f"cannot write {out}: {error.strerror}") from None
    return out


def heatmap(shown: Sequence[Panel], runs: Sequence[Run]) -> Figure:
    """ASR and zero-shot accuracy, attack x defense, side by side; a row of plots for each scale and data set.

    Raises:
        BenchError: a cell whose runs differ in definition: one number for it would be one of theirs.
    """
    split = groups(runs)[1]
    if split:
        raise BenchError(f"{split[0]}. A heat map has one number a cell; choose runs with --where, as --where train.epochs=12")
    height = sum(0.55 + 0.3 * len(panel.attacks) for panel in shown)
    figure = Figure(figsize=(FULL_WIDTH, height), layout="constrained")
    axes = figure.subplots(len(shown), 2, squeeze=False, height_ratios=[1 + len(panel.attacks) for panel in shown])
    for row, panel in zip(axes, shown, strict=True):
        for place, (axis, name) in enumerate(zip(row, ("asr", "zero_shot"), strict=True)):
            _heat(axis, panel, name, _title(panel, METRICS[name][0], len(shown) > 1))
            if place:
                axis.set_yticklabels([])
    return figure


def curves(shown: Sequence[Panel], runs: Sequence[Run]) -> Figure:
    """Attack success, zero-shot accuracy and, where measured, similarity of poisoned pairs over epochs; other phases than `clip` shaded."""
    drawn = [(panel, attack, defense, group) for panel in shown for attack in panel.attacks for defense in panel.defenses for group in panel.cells.get((attack, defense), [])]
    _not_too_many(len(drawn), "curves")
    columns = min(4, len(drawn))
    rows = -(-len(drawn) // columns)
    figure = Figure(figsize=(FULL_WIDTH if columns > 1 else COLUMN_WIDTH, 1.35 * rows + 0.35), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel().tolist()
    handles: dict[str, Any] = {}
    for axis, (_, attack, defense, group) in zip(axes, drawn, strict=False):
        handles |= _over_epochs(axis, group)
        axis.set_title(f"{attack} × {defense}")
    for axis in axes[len(drawn) :]:
        axis.set_visible(False)
    for index, axis in enumerate(axes[: len(drawn)]):
        axis.set_ylim(-0.02, 1.02)
        if index % columns == 0:
            axis.set_yticks([0, 0.5, 1], ["0", "50 %", "100 %"])
        if index + columns >= len(drawn):
            axis.set_xlabel("epoch")
            axis.tick_params(labelbottom=True)
    if not handles:
        raise BenchError("no snapshot of these runs was evaluated, so there are no curves to draw")
    names = sorted(handles, key=lambda name: (name.startswith("phase"), name != "ASR"))
    figure.legend([handles[name] for name in names], names, loc="outside lower center", ncols=len(names))
    return figure


def dose(shown: Sequence[Panel], runs: Sequence[Run]) -> Figure:
    """Success against poisoned rows on a log axis, a plot for each attack, a line for each defense, with the fit where there is one."""
    by_attack: dict[str, list[DoseCurve]] = {}
    for curve in dose_curves(runs):
        by_attack.setdefault(curve.attack if len(shown) == 1 else f"{curve.attack} ({curve.scale}, {curve.dataset}, {curve.model})", []).append(curve)
    figure, axes = _row(len(by_attack), 2.0)
    for axis, (attack, lines) in zip(axes, by_attack.items(), strict=True):
        for index, line in enumerate(lines):
            _dose_line(axis, line, index)
        axis.set_xscale("log")
        axis.set_title(attack)
        axis.set_xlabel("poisoned rows")
        _percent(axis)
        axis.legend()
    return figure


def pareto(shown: Sequence[Panel], runs: Sequence[Run]) -> Figure:
    """Pairs that each defense trained, as a multiple of clip's, against what the attack still reaches; a plot for each attack."""
    found = [(panel, attack, values) for panel in shown for attack in panel.attacks if len(values := trades(panel, attack)) > 1]
    if not found:
        raise BenchError("cost against success wants an attack with clip and another defense with their costs")
    figure, axes = _row(len(found), 2.1)
    defenses = list(dict.fromkeys(trade.defense for _, _, values in found for trade in values))
    handles: dict[str, Any] = {}
    for axis, (panel, attack, values) in zip(axes, found, strict=True):
        front = sorted((trade.cost, trade.asr) for trade in values if trade.best)
        axis.plot([cost for cost, _ in front], [asr for _, asr in front], color="#888888", linestyle="--", linewidth=0.8)
        for trade in values:
            index = defenses.index(trade.defense)
            low, high = trade.interval.low, trade.interval.high
            bars = [[max(0.0, trade.asr - low)], [max(0.0, high - trade.asr)]] if low is not None and high is not None else None
            colour = COLOURS[index % len(COLOURS)]
            fill = colour if trade.best else "none"
            drawn = axis.errorbar(
                [trade.cost],
                [trade.asr],
                yerr=bars,
                color=colour,
                marker=MARKS[index % len(MARKS)],
                markerfacecolor=fill,
                linestyle="none",
                elinewidth=0.8,
                alpha=0.6 if trade.told else 1,
            )
            handles.setdefault(trade.defense + (" (told)" if trade.told else "") + (" *" if trade.beside else ""), drawn)
        axis.set_title(_title(panel, attack, len(shown) > 1))
        axis.set_xlabel("pairs trained, multiple of clip's")
        _percent(axis)
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=min(6, len(handles)),
        title=BESIDE_NOTE if any(name.endswith(" *") for name in handles) else None,
        title_fontsize=6.5,
    )
    return figure


FIGURES: dict[str, Callable[[Sequence[Panel], Sequence[Run]], Figure]] = {"heatmap": heatmap, "curves": curves, "dose": dose, "pareto": pareto}


def _row(n: int, height: float) -> tuple[Figure, list[Axes]]:
    """Up to three plots in a row."""
    _not_too_many(n, "plots")
    columns = min(3, n)
    rows = -(-n // columns)
    figure = Figure(figsize=(COLUMN_WIDTH if n == 1 else FULL_WIDTH, height * rows + 0.3), layout="constrained")
    axes: list[Axes] = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel().tolist()
    for axis in axes[n:]:
        axis.set_visible(False)
    return figure, axes[:n]


def _heat(axis: Axes, panel: Panel, name: str, title: str) -> None:
    value_of = METRICS[name][1]
    cells = [[panel.cells.get((attack, defense), []) for defense in panel.defenses] for attack in panel.attacks]
    values = [[next((value for group in members if (value := value_of(group)) is not None), math.nan) for members in row] for row in cells]
    axis.imshow(values, cmap=LinearSegmentedColormap.from_list(name, _RAMPS[name]), vmin=0, vmax=1, aspect="auto")
    for y, row in enumerate(cells):
        for x, members in enumerate(row):
            axis.text(x, y, _heat_text(members, values[y][x], name), ha="center", va="center", fontsize=5.5, color="white" if values[y][x] > 0.75 else "black", linespacing=1.1)
    axis.set_xticks(range(len(panel.defenses)), panel.defenses, rotation=30, ha="right")
    axis.set_yticks(range(len(panel.attacks)), panel.attacks)
    axis.set_title(title)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


def _heat_text(members: Sequence[Group], value: float, name: str) -> str:
    if math.isnan(value):
        return "–"
    found = interval_of(members[0], COLUMNS[name])
    return f"{100 * value:.0f}" + (f"\n[{100 * found.low:.0f}, {100 * found.high:.0f}]" if found.low is not None and found.high is not None else "")


def _over_epochs(axis: Axes, group: Group) -> dict[str, Any]:
    wanted = {"ASR": ("attack", 0), "mean over the sets": ("zero_shot", 1), "poisoned pairs": ("similarity", 2), "clean pairs": ("similarity", 3)}
    names = {"mean over the sets": "zero-shot", "poisoned pairs": "similarity, poisoned", "clean pairs": "similarity, clean"}
    handles: dict[str, Any] = {}
    for chart in charts(group):
        for begin, end in chart.shaded if chart.name == "zero_shot" else []:
            handles["phase " + chart.phases] = axis.axvspan(begin - 0.5, end + 0.5, color="#000000", alpha=0.1, linewidth=0)
        for curve in chart.curves:
            if wanted.get(curve.name, ("", 0))[0] != chart.name:
                continue
            index = wanted[curve.name][1]
            for points in curve.runs if len(curve.runs) > 1 else []:
                axis.plot([x for x, _ in points], [y for _, y in points], color=COLOURS[index], linewidth=0.4, alpha=0.5)
            (handles[names.get(curve.name, curve.name)],) = axis.plot([x for x, _ in curve.mean], [y for _, y in curve.mean], DASHES[index], color=COLOURS[index])
    return handles


def _dose_line(axis: Axes, line: DoseCurve, index: int) -> None:
    points = [point for point in line.points if point.n_poison > 0]
    doses, means = [point.n_poison for point in points], [point.mean for point in points]
    known = [(point.interval.low, point.interval.high) for point in points]
    bars = [
        [max(0.0, mean - low) if low is not None else 0.0 for mean, (low, _) in zip(means, known, strict=True)],
        [max(0.0, high - mean) if high is not None else 0.0 for mean, (_, high) in zip(means, known, strict=True)],
    ]
    colour, marker = COLOURS[index % len(COLOURS)], MARKS[index % len(MARKS)]
    axis.errorbar(doses, means, yerr=bars, color=colour, marker=marker, linestyle="none" if line.fit else "-", linewidth=0.6, elinewidth=0.8, label=line.defense)
    if line.fit:
        import numpy as np

        at = np.geomspace(doses[0], doses[-1], 100)
        axis.plot(at, line.fit(at), color=colour)


def _percent(axis: Axes) -> None:
    axis.set_ylim(-0.03, 1.03)
    axis.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    axis.set_ylabel("attack success")
    axis.label_outer()


def _not_too_many(n: int, what: str) -> None:
    if n == 0:
        raise BenchError(f"there are no {what} to draw in these runs")
    if n > MOST_CELLS:
        raise BenchError(f"{n} {what} are too many for one figure (at most {MOST_CELLS}); choose some with --attack, --defense or --scale")


def _title(panel: Panel, text: str, several: bool) -> str:
    return f"{text} ({panel.scale}, {panel.dataset}, {panel.model})" if several else text
