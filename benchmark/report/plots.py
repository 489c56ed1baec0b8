"""Small charts as inline SVG: no library, colours from the page's style sheet, so that they follow its light and dark theme."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from benchmark.report.dose import DoseCurve
from benchmark.report.series import Chart, Trade

_WIDTH, _HEIGHT = 360, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 8, 8, 34


@dataclass(frozen=True)
class _Frame:
    """Where values fall on the drawing."""

    x_low: float
    x_high: float
    y_low: float = 0.0
    y_high: float = 1.0
    log: bool = False
    right: int = _RIGHT

    def x(self, value: float) -> float:
        low, high, at = (math.log(v) if self.log else v for v in (self.x_low, self.x_high, value))
        return round(_LEFT + (at - low) / ((high - low) or 1) * (_WIDTH - _LEFT - self.right), 1)

    def y(self, value: float) -> float:
        return round(_TOP + (self.y_high - value) / ((self.y_high - self.y_low) or 1) * (_HEIGHT - _TOP - _BOTTOM), 1)

    def axes(self, x_ticks: Sequence[float], x_label: str, percent: bool = True) -> str:
        """Grid, tick labels and the name of the x axis."""
        parts = []
        for value in _ticks(self.y_low, self.y_high):
            at = self.y(value)
            label = f"{100 * value:.0f} %" if percent else f"{value:.2g}"
            parts.append(f'<path class="grid" d="M{_LEFT} {at}H{_WIDTH - self.right}"/><text class="tick" x="{_LEFT - 5}" y="{at + 3.5}" text-anchor="end">{label}</text>')
        for value in x_ticks:
            parts.append(f'<text class="tick" x="{self.x(value)}" y="{_HEIGHT - _BOTTOM + 14}" text-anchor="middle">{value:g}</text>')
        parts.append(f'<path class="axis" d="M{_LEFT} {_HEIGHT - _BOTTOM}H{_WIDTH - self.right}"/>')
        parts.append(f'<text class="tick" x="{(_LEFT + _WIDTH - self.right) / 2:g}" y="{_HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>')
        return "".join(parts)


def curves(chart: Chart) -> Markup:
    """A chart over epochs: a faint line for each run, a strong one for their mean, other phases than `clip` shaded."""
    points = [point for curve in chart.curves for run in curve.runs for point in run]
    first, last = min(epoch for epoch, _ in points), max(epoch for epoch, _ in points)
    low = min(0.0, *(value for _, value in points))
    frame = _Frame(first - 0.5, last + 0.5, math.floor(low * 5) / 5, 1.0)
    shade = "".join(
        f'<rect class="shade" x="{frame.x(begin - 0.5)}" y="{_TOP}" width="{round(frame.x(end + 0.5) - frame.x(begin - 0.5), 1)}" height="{_HEIGHT - _TOP - _BOTTOM}"/>'
        for begin, end in chart.shaded
    )
    lines = []
    for index, curve in enumerate(chart.curves):
        if len(curve.runs) > 1:
            lines += [f'<path class="line s{index} faint" d="{_path(frame, run)}"/>' for run in curve.runs if run]
        if curve.mean:
            lines.append(f'<path class="line s{index}" d="{_path(frame, curve.mean)}"/>')
            if len(curve.mean) == 1:
                lines.append(_dot(frame.x(curve.mean[0][0]), frame.y(curve.mean[0][1]), index))
    return _svg(shade + frame.axes(_whole(first, last), "epoch", chart.name != "similarity") + "".join(lines), f"{chart.title} over epochs")


def dose(lines: Sequence[DoseCurve]) -> Markup:
    """Success against the number of poisoned rows on a log axis, with intervals, and the fitted curve where there is one."""
    counts = sorted({point.n_poison for line in lines for point in line.points if point.n_poison > 0})
    frame = _Frame(counts[0], counts[-1], log=True, right=18)
    parts = [frame.axes(_spaced(counts, frame), "poisoned rows")]
    for index, line in enumerate(lines):
        points = [point for point in line.points if point.n_poison > 0]
        for point in points:
            if point.interval.low is not None and point.interval.high is not None:
                parts.append(f'<path class="bar s{index % 6}" d="M{frame.x(point.n_poison)} {frame.y(point.interval.low)}V{frame.y(point.interval.high)}"/>')
            parts.append(_dot(frame.x(point.n_poison), frame.y(point.mean), index % 6))
        if line.fit is None:
            parts.append(f'<path class="line s{index % 6} faint" d="{_path(frame, [(point.n_poison, point.mean) for point in points])}"/>')
        else:
            import numpy as np

            at = np.geomspace(points[0].n_poison, points[-1].n_poison, 40)
            parts.append(f'<path class="line s{index % 6}" d="{_path(frame, list(zip(at.tolist(), line.fit(at).tolist(), strict=True)))}"/>')
    return _svg("".join(parts), f"Attack success against poisoned rows: {lines[0].attack}")


def pareto(attack: str, found: Sequence[Trade]) -> Markup:
    """Cost of a defense against what the attack still reaches; names stand to the right, the best trades are joined."""
    low, high = min(1.0, *(trade.cost for trade in found)), max(1.0, *(trade.cost for trade in found))
    margin = max(0.05, 0.08 * (high - low))
    frame = _Frame(low - margin, high + margin, right=130)
    parts = [frame.axes(_ticks(low, high, 3), "pairs trained, multiple of clip's")]
    front = sorted((trade.cost, trade.asr) for trade in found if trade.best)
    if len(front) > 1:
        parts.append(f'<path class="front" d="{_path(frame, front)}"/>')
    labels = _apart([frame.y(trade.asr) + 3.5 for trade in found])
    for index in sorted(range(len(found)), key=lambda one: labels[one]):
        trade, at = found[index], labels[index]
        x, y = frame.x(trade.cost), frame.y(trade.asr)
        if trade.interval.low is not None and trade.interval.high is not None:
            parts.append(f'<path class="bar{" told" if trade.told else ""}" d="M{x} {frame.y(trade.interval.low)}V{frame.y(trade.interval.high)}"/>')
        parts.append(f'<path class="leader" d="M{x + 4} {y}L{_WIDTH - 124} {at - 3.5}"/>')
        parts.append(f'<circle class="mark{" told" if trade.told else " best" if trade.best else ""}" cx="{x}" cy="{y}" r="4"/>')
        parts.append(f'<text class="name" x="{_WIDTH - 121}" y="{at}">{escape(_short(trade.defense, 18 if trade.beside else 20))}{" *" if trade.beside else ""}</text>')
    return _svg("".join(parts), f"Pairs trained against ASR: {attack}")


def mark(x: float, y: float, index: int) -> Markup:
    """The mark of a line, for a legend."""
    return Markup(_dot(x, y, index))


def _svg(inside: str, title: str) -> Markup:
    return Markup(f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}"><title>{escape(title)}</title>{inside}</svg>')


def _path(frame: _Frame, points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{frame.x(x):g} {frame.y(y):g}" for x, y in points)


def _dot(x: float, y: float, index: int) -> str:
    """A mark whose shape tells lines apart as well as its colour does."""
    r = 3.5
    shapes = (
        f"M{x - r} {y}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0",
        f"M{x - r} {y - r}h{2 * r}v{2 * r}h{-2 * r}z",
        f"M{x} {y - r - 1}l{r + 1} {2 * r + 1}h{-2 * r - 2}z",
        f"M{x} {y - r - 1}l{r + 1} {r + 1}l{-r - 1} {r + 1}l{-r - 1} {-r - 1}z",
        f"M{x} {y + r + 1}l{r + 1} {-2 * r - 1}h{-2 * r - 2}z",
        f"M{x - r} {y - r}l{2 * r} {2 * r}m0 {-2 * r}l{-2 * r} {2 * r}",
    )
    return f'<path class="dot s{index}" d="{shapes[index % 6]}"/>'


def _ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round values from low to high, at most one more than `most`."""
    step = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.5, 1, 2, 5, 10, 20, 50, 100, 1000, 10000) if (high - low) / step <= most)
    return [round(step * index, 4) for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _whole(first: int, last: int) -> list[float]:
    step = next((step for step in (1, 2, 4, 5, 10, 20, 50, 100) if (last - first) / step <= 8), 1000)
    return [float(epoch) for epoch in range(first, last + 1) if epoch % step == 0 or first == last] or [float(last)]


def _spaced(values: Sequence[int], frame: _Frame) -> list[float]:
    """Values whose labels do not touch."""
    kept: list[float] = []
    for value in values:
        if not kept or frame.x(value) - frame.x(kept[-1]) >= 26:
            kept.append(float(value))
    return kept


def _apart(places: Sequence[float], gap: float = 12.5) -> list[float]:
    """The places, moved so that none is nearer than `gap` to another and all stay on the drawing."""
    order = sorted(range(len(places)), key=lambda index: places[index])
    moved = list(places)
    for before, after in itertools.pairwise(order):
        moved[after] = max(moved[after], moved[before] + gap)
    low = _HEIGHT - _BOTTOM + 4.0
    for index in reversed(order):
        moved[index] = min(moved[index], low)
        low = moved[index] - gap
    return [round(place, 1) for place in moved]


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
