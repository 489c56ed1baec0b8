"""Checks recorded runs against their own saved predictions, and the tables beside them against the runs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmark.errors import BenchError
from benchmark.evaluate.predictions import ROWS, SLIM, read_predictions
from benchmark.evaluate.recompute import recomputed
from benchmark.evaluate.recompute_rows import of_rows
from benchmark.evaluate.statistics import TARGET_IMAGES, wilson
from benchmark.report.brief import to_brief
from benchmark.report.comparisons import against
from benchmark.report.dose import fitted
from benchmark.report.markdown import to_markdown
from benchmark.report.records import Run, load, superseded
from benchmark.report.tables import kind_of_interval, to_csv
from benchmark.report.wide import wide_table
from benchmark.settings import digest
from benchmark.stages import damage

_SHOWN = 5
# Metrics of training pairs whose n is the number of poisoned rows, or of all rows; and what both the curve and the metrics hold.
_OVER_POISON = ("precision_at_n", "recall_at_", "tpr_at_fpr_", "tpr_own", "n_poison_kept", "recall_dropped")
_OVER_PAIRS = ("auroc", "average_precision", "base_rate", "precision_at_tpr_0.95", "f1_own", "flagged_share", "n_kept", "n_dropped")
_IN_BOTH = ("zero_shot_acc1/", "asr/", "asr_floor/", "triggered_acc1/")
_RATES = ("asr", "triggered_acc1", "zero_shot_acc1", "zero_shot_acc5", "linear_probe_acc1", "linear_probe_asr")


@dataclass(frozen=True)
class Verified:
    """What a check found.

    Attributes:
        problems: one line for each thing that is not as recorded; none if all is well.
        n_values: recorded values.
        n_recomputed: those that saved predictions gave again.
        without: how many values of each metric no saved prediction tells.
        tables: table files that were made again and compared.
    """

    problems: list[str]
    n_runs: int
    n_values: int
    n_recomputed: int
    without: Counter[str]
    tables: list[str]

    def lines(self) -> list[str]:
        """For people: the problems, then what was checked and what could not be."""
        tables = f"; {', '.join(self.tables)} made again" if self.tables else ""
        rest = ", ".join(f"{name} {n}" for name, n in sorted(self.without.items()))
        return [
            *self.problems,
            f"{self.n_runs} runs: {self.n_recomputed} of {self.n_values} recorded values recomputed from saved predictions{tables}; {len(self.problems)} {'difference' if len(self.problems) == 1 else 'differences'}",
            *([f"without saved predictions: {rest}"] if rest else []),
        ]


def verify(results: Path) -> Verified:
    """Checks every run under `results`: files against their marker, id against settings, cards against their hashes, values
    against predictions, intervals against values, the curve's last point against the values; then the tables in the folder
    against the runs. Points of the curve before the last cannot be checked: their predictions are not kept.

    Raises:
        BenchError: no runs there.
    """
    runs = load(results)
    if not runs:
        raise BenchError(f"no recorded run in {results}")
    problems: list[str] = []
    values = done = 0
    without: Counter[str] = Counter()
    for run in runs:
        found, n_done, missing = verify_run(run)
        problems += [f"{run.folder.name}: {line}" for line in found]
        values += len(run.record["metrics"])
        done += n_done
        without.update(missing)
    kept, _ = superseded(runs)
    tables = []
    for path, text in _tables(results, kept):
        tables.append(path.name)
        problems += _difference(path, text)
    return Verified(problems, len(runs), values, done, without, tables)


def verify_run(run: Run) -> tuple[list[str], int, list[str]]:
    """What is wrong with one run, how many values were recomputed, and the metrics of which none could be."""
    record = run.record
    problems = []
    broken = damage(run.folder, thorough=True)
    if broken:
        problems.append(broken)
    if digest(record["resolved"])[:12] != record["run_id"] or run.folder.name != record["run_id"]:
        problems.append(f"the run id {record['run_id']} is not that of the folder and of the settings ({digest(record['resolved'])[:12]})")
    problems += _label_problems(record)
    problems += [f"card {name} has other content than its hash says" for name, card in record["cards"].items() if digest(card)[:16] != name]
    try:
        tables = read_predictions(run.folder)
    except (BenchError, OSError, ValueError) as error:
        return [*problems, str(error)], 0, [entry["name"] for entry in record["metrics"]]
    known = recomputed(tables, record["cards"], record["metrics"], rounded=(run.folder / SLIM).is_file())
    if ROWS in tables:
        known |= of_rows(tables[ROWS], record["metrics"])
    n_done, missing = 0, []
    for entry in record["metrics"]:
        name = f"{entry['name']}/{entry['of']}"
        if entry["card"] and entry["card"] not in record["cards"]:
            problems.append(f"{name} refers to a card that the record does not have")
        problems += _interval_problem(name, entry)
        again = known.get((entry["name"], entry["of"]))
        if again is None:
            missing.append(entry["name"])
            continue
        n_done += 1
        if entry["value"] is None:
            problems.append(f"{name} has no value in the record and {again.value:.6g} by the saved predictions")
        elif not abs(again.value - entry["value"]) <= again.tolerance:  # NaN too
            problems.append(f"{name} is {entry['value']:.6g} in the record and {again.value:.6g} by the saved predictions")
        if again.n is not None and (again.n, again.units) != (entry["n"], entry["units"]):
            problems.append(f"{name} is over {entry['n']} {entry['units']} in the record and over {again.n} {again.units} by the saved predictions")
    recorded = {(entry["name"], entry["of"]) for entry in record["metrics"]}
    problems += [f"{name}/{of} is missing in the record and {again.value:.6g} by the saved predictions" for (name, of), again in known.items() if (name, of) not in recorded]
    return problems + _curve_problems(record) + _poison_problems(record), n_done, missing


def _label_problems(record: dict[str, Any]) -> list[str]:
    """Where the labels that a table shows are not those of the settings."""
    label, resolved = record["label"], record["resolved"]
    controls = ("+sham" if resolved.get("sham") else "") + ("+clean" if resolved.get("clean_model") else "")
    wanted = {"attack": _named(label["attack"], resolved["attack"], ""), "dataset": resolved["dataset"], "model": resolved["model"]["name"]}
    if record.get("checkpoint") is None:
        wanted["defense"] = _named(label["defense"], resolved["defense"], "+aug" if resolved["augmented"] else "")
    found = {name: re.sub(r"@[0-9a-f]{6}", "", label[name], count=1) for name in wanted}
    wanted["scale"] = resolved["scale"] + controls
    found["scale"] = re.sub(r"\[.*\]", "", label["scale"], flags=re.DOTALL)
    return [f"the label says {name} {found[name]}, and the settings {value}" for name, value in wanted.items() if found[name] != value]


def _named(label: str, plugin: dict[str, Any], suffix: str) -> str:
    """A plugin's label with these settings that names the same options as the given one."""
    options = re.findall(r"(?:^|,)(\w+)=", label.partition("[")[2])
    inside = ",".join(f"{name}={plugin['options'].get(name)}" for name in options)
    return f"{plugin['name']}{suffix}{f'[{inside}]' if inside else ''}"


def _poison_problems(record: dict[str, Any]) -> list[str]:
    """Where the number of poisoned rows is another than the poison rate and the metrics of scores and filters say."""
    n_poison, n_pairs = record["poison"]["n_poison"], record["data"].get("n_pairs")
    problems = []
    rate = record["poison"].get("poison_rate")
    if rate is not None and n_pairs and record["poison"].get("edit_mode") in ("append", "replace") and round(rate * n_pairs) != n_poison:
        problems.append(f"poison.n_poison is {n_poison} of {n_pairs} pairs, and poison.poison_rate {rate:.6g} makes it {rate * n_pairs:.6g}")
    for entry in record["metrics"]:
        expected = n_poison if entry["name"].startswith(_OVER_POISON) else n_pairs if entry["name"] in _OVER_PAIRS else None
        if entry["units"] == "pairs" and expected is not None and entry["n"] != expected:
            problems.append(f"{entry['name']}/{entry['of']} is over {entry['n']} pairs, and poison and data of the record make it {expected}")
        if entry["name"] == "base_rate" and entry["value"] is not None and round(entry["value"] * entry["n"]) != n_poison:
            problems.append(f"base_rate/{entry['of']} is {entry['value']:.6g} of {entry['n']} pairs, and poison.n_poison is {n_poison}")
    return problems


def _curve_problems(record: dict[str, Any]) -> list[str]:
    """Where the last point of the curve, which is the model that was measured, says something else than the metrics."""
    if not record["curve"] or record["curve"][-1]["epoch"] != max(point["epoch"] for point in record["curve"]):
        return []
    last = record["curve"][-1].get("metrics", {})
    if not last:
        return []
    pairs = [(f"{entry['name']}/{entry['of']}", entry["value"]) for entry in record["metrics"]]
    names = {name for name, _ in pairs}
    lost = [f"{name} is {value} at the last epoch of the curve and not among the metrics" for name, value in last.items() if name.startswith(_IN_BOTH) and name not in names]
    lost += [f"{name} is {value} among the metrics and not at the last epoch of the curve" for name, value in pairs if name.startswith(_IN_BOTH) and name not in last]
    return lost + [
        f"{name} is {last[name]} at the last epoch of the curve and {value} among the metrics"
        for name, value in pairs
        if name in last and ((last[name] is None) != (value is None) or (value is not None and not abs(last[name] - value) <= 1e-6))
    ]


def _interval_problem(name: str, entry: dict[str, Any]) -> list[str]:
    if entry["value"] is None:
        return []
    if (entry["low"] is None) != (entry["high"] is None):
        return [f"{name} has one end of an interval alone"]
    if entry["low"] is None and entry["units"] != TARGET_IMAGES and (entry["name"] in _RATES or entry["name"].startswith("asr_top")):
        return [f"{name} has no interval, and is a rate over {entry['n']} {entry['units']}"]
    if not kind_of_interval(entry).startswith("Wilson"):
        # A bootstrap cannot be made again without the scores of all rows, which are not kept; but it contains its value.
        outside = entry["low"] is not None and not -1e-9 <= entry["low"] <= entry["value"] + 1e-9 <= entry["high"] + 2e-9 <= 1 + 4e-9
        return [f"{name} is {entry['value']:.6g} and has the interval [{entry['low']:.4g}, {entry['high']:.4g}], which does not contain it"] if outside else []
    low, high = wilson(entry["value"] * entry["n"], entry["n"])
    if abs(low - entry["low"]) <= 1e-9 and abs(high - entry["high"]) <= 1e-9:
        return []
    return [f"{name} has the interval [{entry['low']:.4g}, {entry['high']:.4g}], Wilson's over {entry['n']} {entry['units']} is [{low:.4g}, {high:.4g}]"]


def _tables(results: Path, runs: Sequence[Run]) -> list[tuple[Path, str]]:
    """The table files in a folder of results, each with the text it should have."""
    made = (("table.md", to_markdown(runs)), ("brief.md", to_brief(runs)), ("table.csv", to_csv(wide_table(runs))))
    found = [(results / name, text) for name, text in made if (results / name).is_file()]
    for path in sorted(results.glob("against-*.csv")):
        found.append((path, to_csv(against(runs, path.stem.removeprefix("against-"))[0])))
    if (results / "fit.md").is_file():
        found.append((results / "fit.md", fitted(runs, "dose", "md")))
    return found


def _difference(path: Path, text: str) -> list[str]:
    old, new = path.read_text(encoding="utf-8").splitlines(), text.splitlines()
    if old == new:
        return []
    lines = [index for index in range(max(len(old), len(new))) if old[index : index + 1] != new[index : index + 1]]
    shown = ", ".join(str(index + 1) for index in lines[:_SHOWN]) + (" and more" if len(lines) > _SHOWN else "")
    return [f"{path.name} is not what the runs give: line {shown} of {max(len(old), len(new))} differ"]
