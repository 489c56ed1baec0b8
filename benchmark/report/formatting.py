"""How a number or a name looks in a table for people."""

from __future__ import annotations

import math
from collections.abc import Sequence

from benchmark.evaluate.statistics import Interval


def rate(value: float | None) -> str:
    """A fraction in percent with one decimal, without the sign; empty for a missing one."""
    return "" if value is None or math.isnan(value) else f"{100 * value:.1f}"


def percent(value: float | None) -> str:
    """A fraction as percent with one decimal; empty for a missing one."""
    return f"{shown} %" if (shown := rate(value)) else ""


def count(value: float | None) -> str:
    """A count, or a mean of counts, with four digits below a hundred; empty for a missing one."""
    return "" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.4g}"


def escape(text: str) -> str:
    """Text that Markdown shows as it is."""
    clean = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
    for mark in ("\\", "|", "`", "<", "[", "]", "*", "_"):
        clean = clean.replace(mark, "\\" + mark)
    return clean


def line(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def bracket(interval: Interval) -> str:
    """An interval in percent behind its value; empty where there is none."""
    return f" [{100 * interval.low:.1f}, {100 * interval.high:.1f}]" if interval.low is not None and interval.high is not None else ""
