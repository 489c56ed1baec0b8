"""What `bench run` shows when it is done: one row a cell, the floor beside every ASR."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmark.evaluate.statistics import over_runs
from benchmark.report.markdown import percent
from benchmark.report.records import Run
from benchmark.report.tables import groups, per_run


def print_outcomes(outcomes: Sequence[Any], console: Console | None = None) -> None:
    """Prints the table of the records among these outcomes to stdout."""
    console = console or Console(highlight=False)
    runs = [Run(outcome.record, {}, Path()) for outcome in outcomes if outcome.record is not None]
    if not runs:
        return
    table = Table(caption="floor: the same queries without the trigger. Intervals: 95 %, over queries or targets for one seed, over runs from three on.", caption_style="dim")
    for name in ("attack", "defense"):
        table.add_column(name, overflow="fold", min_width=10)
    for name in ("seeds", "poison", "ASR [95 %]", "n", "floor", "zero-shot", "probe"):
        table.add_column(name, justify="right")
    for group in groups(runs)[0]:
        table.add_row(*(Text(cell) for cell in _row(group)))
    console.print(table)
    for warning in dict.fromkeys(line for run in runs for line in run.record["warnings"]):
        console.print(Text(f"note: {warning}"))


def _row(group: Any) -> list[str]:
    runs = group.runs
    values = {name: [per_run(run, name) for run in runs] for name in ("asr", "asr_floor", "zero_shot_acc1", "linear_probe_acc1")}
    means = {name: sum(v for v in found if v is not None) / len(found) if all(v is not None for v in found) else None for name, found in values.items()}
    interval, n = "", ""
    if means["asr"] is not None:
        entry = runs[0].values("asr")[0]
        found = over_runs([value for value in values["asr"] if value is not None], entry["n"], entry["units"])
        interval = f" [{100 * found.low:.0f}, {100 * found.high:.0f}]" if found.low is not None and found.high is not None else ""
        n = str(entry["n"])
    poison = runs[0].record["poison"]
    share = f"{100 * poison['poison_rate']:.2f} %" if poison["n_poison"] else "0"
    return [
        group.key[0],
        group.key[1],
        str(len(runs)),
        share,
        percent(means["asr"]) + interval,
        n,
        percent(means["asr_floor"]),
        percent(means["zero_shot_acc1"]),
        percent(means["linear_probe_acc1"]),
    ]
