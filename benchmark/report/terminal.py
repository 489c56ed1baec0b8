"""What `bench run` shows when it is done: one row a cell, the floor beside every ASR."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmark.evaluate.statistics import Interval, wilson
from benchmark.grid import Expected
from benchmark.report.controls import attack_names, without_controls
from benchmark.report.formatting import bracket, percent
from benchmark.report.judged import sections
from benchmark.report.records import Run
from benchmark.report.tables import groups, interval_of, mean_of, per_run


def print_outcomes(outcomes: Sequence[Any], console: Console | None = None) -> None:
    """Prints the table of the records among these outcomes to stdout."""
    console = console or Console(highlight=False)
    runs = [Run(outcome.record, {}, Path()) for outcome in outcomes if outcome.record is not None]
    if not runs:
        return
    roomy = console.width >= 100  # a row of short names fits into 80 columns unbroken
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1) if roomy else 0)
    table.caption = (
        "floor: the same goal without the trigger or, where there is none, of what was no target. Intervals: 95 %, over queries or targets for one seed, over runs from three on."
    )
    table.caption_style, table.caption_justify = "dim", "left"
    for name in ("attack", "defense"):
        table.add_column(name, overflow="fold", min_width=10)
    for name in ("seeds", "poison", "ASR [95 %]", "n", "floor", "zero-shot", "probe"):
        table.add_column(name, justify="right", no_wrap=True)
    found = groups(runs)[0]
    attacks = attack_names(found)
    for group in found:
        table.add_row(*(Text(cell) for cell in _row(group, attacks[id(group)])))
    console.print(table)
    for section in sections(found):
        console.print(Text(f"\n{section.title}"))
        for row in section.rows:
            cells = [f"{name} {cell}" for name, cell in zip(section.header[2:], row[2:], strict=True) if cell and name != "seeds"]
            console.print(Text(f"{row[0]} / {row[1]}: {'; '.join(cells)}"))
    for warning in dict.fromkeys(line for run in runs for line in run.record["warnings"]):
        console.print(Text(f"note: {warning}"))


def print_expected(expected: Sequence[Expected], outcomes: Sequence[Any], console: Console | None = None) -> None:
    """Prints published numbers beside ours, with the interval of each that has one, and how sure the published one is."""
    console = console or Console(highlight=False)
    runs = [Run(outcome.record, {}, Path()) for outcome in outcomes if outcome.record is not None]
    table = Table(title="Published numbers beside ours", title_justify="left")
    for name in ("attack", "defense", "metric", "published", "ours", "source, and how sure it is"):
        table.add_column(name, overflow="fold")
    for entry in expected:
        ours = [group for group in groups(without_controls(runs))[0] if (group.key[0].partition("[")[0], group.key[1].partition("[")[0]) == (entry.attack, entry.defense)]
        cells = [_with_bracket(mean_of([per_run(run, entry.metric) for run in group.runs]), interval_of(group, entry.metric)) for group in ours]
        low, high = wilson(round(entry.value * entry.n), entry.n) if entry.n else (None, None)
        published = _with_bracket(entry.value, Interval(low, high, ""))
        table.add_row(*(Text(cell) for cell in (entry.attack, entry.defense, entry.metric, published, "; ".join(cells) or "not run", f"{entry.source}. {entry.sure}")))
    console.print(table)


def _with_bracket(value: float | None, interval: Interval) -> str:
    return percent(value) + bracket(interval)


def _row(group: Any, attack: str) -> list[str]:
    runs = group.runs
    values = {name: [per_run(run, name) for run in runs] for name in ("asr", "asr_floor", "zero_shot_acc1", "linear_probe_acc1")}
    means = {name: sum(v for v in found if v is not None) / len(found) if all(v is not None for v in found) else None for name, found in values.items()}
    interval, n = "", ""
    if means["asr"] is not None:
        found = interval_of(group, "asr")
        interval = f" [{100 * found.low:.0f}, {100 * found.high:.0f}]" if found.low is not None and found.high is not None else ""
        n = str(sum(entry["n"] for entry in runs[0].values("asr")))
    poison = runs[0].record["poison"]
    share = f"{100 * poison['poison_rate']:.2f} %" if poison["n_poison"] else "0"
    return [
        attack,
        group.key[1],
        str(len(runs)),
        share,
        percent(means["asr"]) + interval,
        n,
        percent(means["asr_floor"]),
        percent(means["zero_shot_acc1"]),
        percent(means["linear_probe_acc1"]),
    ]
