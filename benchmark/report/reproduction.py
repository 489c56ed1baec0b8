"""Generated parts of the documents: published claims beside committed rows, an ablation and what of it has run, coverage.

`python -m benchmark.report.reproduction docs/reproduction.md docs/metrics.md` fills the marked blocks of the pages.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from benchmark.errors import BenchError
from benchmark.evaluate.coverage import summary
from benchmark.evaluate.statistics import Interval, paired_difference, wilson
from benchmark.report.comparisons import compare, refused
from benchmark.report.controls import without_controls
from benchmark.report.formatting import bracket, escape, percent
from benchmark.report.records import Run, load
from benchmark.report.tables import Group, groups, interval_of, interval_of_entry, mean_of, per_run
from benchmark.stages import write_atomically

_BLOCK = re.compile(r"(<!-- (claims|ablation|coverage|sets): (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


class Claim(BaseModel):
    """What a paper says, and which row of a committed table it is set against."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    says: str
    table: str = Field(description="A folder under results/reference.")
    attack: str
    defense: str
    metric: str
    against: str | None = Field(None, description="The value is a difference to this defense, paired over seeds.")
    value: float | None = Field(None, description="None: the paper gives no number.")
    n: int | None = Field(None, description="Trials behind a published share, where known.")
    source: str
    sure: str


def filled(page: str, results: Path) -> str:
    """The page with each block `<!-- claims: FILE -->`, `<!-- ablation: TABLE -->`, `<!-- sets: TABLE -->` and `<!-- coverage: FILE -->` made
    anew.
    """
    makers = {
        "claims": lambda name: claims_table(results / name, results / "reference"),
        "ablation": lambda name: ablation_table(results / "reference" / name),
        "coverage": lambda name: summary(results / name),
        "sets": lambda name: sets_table(results / "reference" / name),
    }

    def block(match: re.Match[str]) -> str:
        return f"{match[1]}\n{makers[match[2]](match[3]).strip()}\n\n{match[4]}"

    return _BLOCK.sub(block, page)


def claims_table(path: Path, reference: Path) -> str:
    """Published and ours, each with its interval.

    Raises:
        BenchError: a file that cannot be read, or a claim set against a row that no committed table has.
    """
    try:
        claims = [Claim(**entry) for entry in tomllib.loads(path.read_text()).get("claim", [])]
    except (OSError, tomllib.TOMLDecodeError, ValidationError, TypeError) as error:
        raise BenchError(f"{path}: {error}") from None
    tables = {name: load(reference / name) for name in dict.fromkeys(claim.table for claim in claims)}
    lines = ["| claim | published | ours | runs | row of | published in, and how sure it is |", "|---|---|---|---|---|---|"]
    for claim in claims:
        ours, n = _ours(claim, tables[claim.table])
        row = f"{escape(claim.attack)}, {escape(claim.defense)}{f' against {escape(claim.against)}' if claim.against else ''} in [{claim.table}](../results/reference/{claim.table}/table.md)"
        lines.append(f"| {escape(claim.says)} | {_published(claim)} | {ours} | {n} | {row} | {escape(claim.source)}; {escape(claim.sure)} |")
    return "\n".join(lines)


def ablation_table(table: Path) -> str:
    """A line for each setting of the table's grid: what it changes, success, and the difference to the first setting of its
    defense on the same poison. Settings without a record say so. Runs of one label that differ in definition have a line each,
    without a difference to the default, and a note says what differs.
    """
    from benchmark.grid import read_grid
    from benchmark.registry import configure, find
    from benchmark.request import Asked, Request, label_of, scale_label, scale_of

    def labels(cell: Asked) -> tuple[str, str, str]:
        scale, found = scale_of(cell.request), []
        for kind, name, options in (("attack", cell.attack, cell.attack_options), ("defense", cell.defense.removesuffix("+aug"), cell.defense_options)):
            plugin = find(kind, name)  # type: ignore[arg-type]
            found.append(label_of(plugin, configure(plugin, scale.options.get(plugin.name, {}), options), scale, "+aug" if kind == "defense" and cell.augmented else ""))
        return found[0], found[1], scale_label(cell.request)

    rows, notes = groups(load(table))
    by_label: dict[tuple[str, ...], list[Group]] = {}
    for row in rows:
        by_label.setdefault(row.key[:3], []).append(row)
    asked: dict[tuple[str, str, str], tuple[Asked, set[int]]] = {}
    for cell in read_grid(table / "grid.toml", Request()).cells:
        asked.setdefault(labels(cell), (cell, set()))[1].add(cell.seed)
    lines = ["| what is changed | defense | runs | ASR | floor | zero-shot | ASR against the default, points |", "|---|---|---|---|---|---|---|"]
    n_run = n_asked = 0
    for key, (cell, seeds) in asked.items():
        n_asked += len(seeds)
        change = "; ".join(f"`{one}`" for one in cell.request.sets) or "nothing"
        parts = [some for row in by_label.get(key, []) if (some := [run for run in row.runs if run.seed in seeds])]
        n_run += len({run.seed for part in parts for run in part})
        if not parts:
            lines.append(f"| {change} | {escape(cell.defense)} | 0 of {len(seeds)} | not run | | | |")
        usual = next((by_label.get(other, []) for other, (one, _) in asked.items() if one.defense == cell.defense and not one.request.sets), [])
        for part in parts:
            values = [percent(mean_of([per_run(run, name) for run in part])) for name in ("asr", "asr_floor", "zero_shot_acc1")]
            between = bracket(interval_of(Group(key, part), "asr"))
            against = _against(part, usual[0].runs) if cell.request.sets and len(parts) == len(usual) == 1 else ""
            lines.append(f"| {change} | {escape(cell.defense)} | {len(part)} of {len(seeds)} | {values[0]}{between} | {values[1]} | {values[2]} | {against} |")
    state = "all of the grid has run" if n_run == n_asked else f"{n_run} of {n_asked} runs of the grid have been made"
    return "\n".join(
        [
            *lines,
            "",
            f"{state[0].upper()}{state[1:]}. Brackets are 95 % intervals over runs, from three on. Differences are paired over seeds, where the poison is the same.",
            *(f"- {escape(note)}" for note in notes),
        ]
    )


def sets_table(table: Path) -> str:
    """Accuracy of models that were not attacked, on each evaluation set instead of their mean; a column for each defense."""
    rows = [group for group in groups(without_controls(load(table)))[0] if group.key[0] == "none"]
    if not rows:
        raise BenchError(f"table {table.name!r} has no row of attack none, so accuracies by evaluation set cannot be shown")
    lines = ["| evaluation set | classes | test images | | " + " | ".join(escape(group.key[1]) for group in rows) + " |", "|" + "---|" * (4 + len(rows))]
    for metric, name in (("zero_shot_acc1", "zero-shot"), ("linear_probe_acc1", "linear probe")):
        for entry in rows[0].runs[0].values(metric):
            n_classes = rows[0].runs[0].record["cards"][entry["card"]]["n_classes"]
            cells = [_on_set(group, metric, entry["of"]) for group in rows]
            lines.append(f"| {escape(entry['of'])} | {n_classes} | {entry['n']:,} | {name} | " + " | ".join(cells) + " |")
    n_runs = sorted({len(group.runs) for group in rows})
    return "\n".join([*lines, "", f"No attack; means over {' or '.join(map(str, n_runs))} runs a row, with 95 % intervals over runs from three on."])


def _on_set(group: Group, metric: str, of: str) -> str:
    entries = [entry for run in group.runs for entry in run.values(metric) if entry["of"] == of]
    values = [entry["value"] for entry in entries]
    return percent(mean_of(values)) + bracket(interval_of_entry(entries[0], values)) if len(values) == len(group.runs) else ""


def _ours(claim: Claim, runs: Sequence[Run]) -> tuple[str, int]:
    if claim.against is not None:
        compared = [one for one in compare(runs, claim.against, [claim.defense])[0] if one.attack == claim.attack and one.metric == claim.metric]
        shown = [(_points(one.difference, one.low, one.high), one.n_runs) for one in compared]
    else:
        rows = [group for group in groups(without_controls(runs))[0] if group.key[:2] == (claim.attack, claim.defense)]
        shown = [(percent(mean_of([per_run(run, claim.metric) for run in row.runs])) + bracket(interval_of(row, claim.metric)), len(row.runs)) for row in rows]
    if len(shown) == 1:
        return shown[0]
    if shown:
        raise BenchError(
            f"claim {claim.says!r}: table {claim.table!r} has {len(shown)} rows {claim.attack} / {claim.defense}, which differ in scale or definition, so none is ours"
        )
    raise BenchError(f"claim {claim.says!r}: table {claim.table!r} has no row {claim.attack} / {claim.defense}{f' with {claim.against} beside it' if claim.against else ''}")


def _published(claim: Claim) -> str:
    if claim.value is None:
        return "no number"
    if claim.against is not None:
        return _points(claim.value, None, None)
    low, high = wilson(round(claim.value * claim.n), claim.n) if claim.n else (None, None)
    return f"{100 * claim.value:g} %" + bracket(Interval(low, high, ""))


def _against(runs: Sequence[Run], usual: Sequence[Run]) -> str:
    """The difference over the seeds that both have, with the same poison and the same definition of the ASR."""
    by_seed = {run.seed: run for run in usual}
    pairs = [(run, by_seed[run.seed]) for run in runs if run.seed in by_seed and refused(run, by_seed[run.seed], "asr") is None]
    values = [(per_run(left, "asr"), per_run(right, "asr")) for left, right in pairs]
    known = [(a, b) for a, b in values if a is not None and b is not None]
    return _points(*paired_difference([a for a, _ in known], [b for _, b in known])) if known else ""


def _points(difference: float, low: float | None, high: float | None) -> str:
    return f"{100 * difference:+.1f}" + (f" [{100 * low:+.1f}, {100 * high:+.1f}]" if low is not None and high is not None else "") + " points"


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        write_atomically(Path(argument), filled(Path(argument).read_text(encoding="utf-8"), Path("results")).encode())
