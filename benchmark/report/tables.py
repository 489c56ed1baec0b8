"""Records to tables: one long, one wide; as data frames and as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from benchmark.evaluate.statistics import TARGET_IMAGES, Interval, over_runs
from benchmark.report.records import Run
from benchmark.report.targets import over_runs_and_targets
from benchmark.settings import canonical

KEY = ("attack", "defense", "scale", "dataset", "model")
LONG = (*KEY, "run_id", "seed", "of", "metric", "value", "n", "units", "low", "high", "interval", "epoch", "phase", "card_hash", "status", "reason")


@dataclass(frozen=True)
class Group:
    """Runs of one row of the wide table: same labels, other seeds."""

    key: tuple[str, ...]
    runs: list[Run]


def long_table(runs: Sequence[Run]) -> pd.DataFrame:
    """One row per run and metric: the last epoch's metrics, then what the other epochs say.

    Then, for each row of the wide table with enough runs and targets, `asr_two_way`: the mean over runs and its interval over runs
    and targets, without a run id and a seed.
    """
    rows: list[dict[str, Any]] = []
    for run in runs:
        record = run.record
        base = {name: run.label(name) for name in KEY} | {"run_id": record["run_id"], "seed": run.seed, "status": record["status"], "reason": ""}
        curve = record["curve"]
        last = curve[-1] if curve else {"epoch": None, "phase": ""}
        not_run = dict(record.get("not_run", {}))
        for entry in record["metrics"]:
            rows.append(
                base
                | {
                    "of": entry["of"],
                    "metric": entry["name"],
                    "value": entry["value"],
                    "n": entry["n"],
                    "units": entry["units"],
                    "low": entry["low"],
                    "high": entry["high"],
                    "interval": kind_of_interval(entry),
                    "epoch": last["epoch"],
                    "phase": last["phase"],
                    "card_hash": entry["card"],
                }
                | _without_value(not_run.pop(f"{entry['name']}/{entry['of']}", None))
            )
        for point in curve:
            for name, value in point.get("metrics", {}).items():
                metric, _, of = name.partition("/")
                rows.append(
                    base
                    | {
                        "of": of,
                        "metric": f"curve_{metric}",
                        "value": value,
                        "n": None,
                        "units": "",
                        "low": None,
                        "high": None,
                        "interval": "none: one snapshot of a curve",
                        "epoch": point["epoch"],
                        "phase": point["phase"],
                        "card_hash": "",
                    }
                )
        for name, value in summaries(run).items():
            rows.append(
                base
                | {
                    "of": "curve",
                    "metric": name,
                    "value": value,
                    "n": None,
                    "units": "",
                    "low": None,
                    "high": None,
                    "interval": "none: from a curve",
                    "epoch": None,
                    "phase": "",
                    "card_hash": "",
                }
            )
        for name, reason in not_run.items():
            rows.append(
                base
                | {
                    "of": "",
                    "metric": name,
                    "value": None,
                    "n": 0,
                    "units": "",
                    "low": None,
                    "high": None,
                    "interval": "",
                    "epoch": None,
                    "phase": "",
                    "card_hash": "",
                }
                | _without_value(reason)
            )
    both = [row for group in groups(runs)[0] for row in _over_both(group)]
    table = pd.DataFrame([*rows, *both], columns=list(LONG))
    return table.astype({"seed": "Int64"}) if both else table


def _over_both(group: Group) -> list[dict[str, Any]]:
    """Rows of the long table of a group's two-way bootstrap."""
    rows = []
    for probe, interval in over_runs_and_targets(group.runs).items():
        entries = [next(entry for entry in run.values("asr") if entry["of"] == probe) for run in group.runs]
        curve = group.runs[0].record["curve"]
        rows.append(
            dict(zip(KEY, group.key, strict=True))
            | {
                "run_id": "",
                "seed": None,
                "of": probe,
                "metric": "asr_two_way",
                "value": mean_of([entry["value"] for entry in entries]),
                "n": entries[0]["n"],
                "units": entries[0]["units"],
                "low": interval.low,
                "high": interval.high,
                "interval": interval.kind,
                "epoch": curve[-1]["epoch"] if curve else None,
                "phase": curve[-1]["phase"] if curve else "",
                "card_hash": entries[0]["card"],
                "status": "done",
                "reason": "",
            }
        )
    return rows


def summaries(run: Run) -> dict[str, float]:
    """ASR at the last CLIP epoch, at the last matched one, its mean over the last 2K epochs (without K over the last quarter), and its maximum."""
    points = [(point["epoch"], point["phase"], _attack_value(point, "asr"), _zero_shot_value(point)) for point in run.record["curve"] if point.get("metrics")]
    if not points:
        return {}
    every, last = run.record["resolved"]["defense"]["options"].get("every"), run.record["curve"][-1]["epoch"]
    begin = last - (2 * int(every) if every else math.ceil(last / 4))
    found: dict[str, float] = {}
    by_phase = {"clip": "last_clip", "match": "last_match"}
    for _, phase, asr, zero_shot in points:
        if phase in by_phase:
            found[f"zero_shot_acc1_{by_phase[phase]}"] = zero_shot
            if asr is not None:
                found[f"asr_{by_phase[phase]}"] = asr
    tail = [zero_shot for epoch, _, _, zero_shot in points if epoch > begin]
    if tail:
        found["zero_shot_acc1_mean_last"] = sum(tail) / len(tail)
    values = [(asr, epoch) for epoch, _, asr, _ in points if asr is not None]
    if values:
        recent = [asr for asr, epoch in values if epoch > begin]
        if recent:
            found["asr_mean_last"] = sum(recent) / len(recent)
        found["asr_max"], epoch = max(values, key=lambda pair: (pair[0], -pair[1]))
        found["asr_max_epoch"] = float(epoch)
    return found


def groups(runs: Sequence[Run]) -> tuple[list[Group], list[str]]:
    """Rows of the wide table. Runs that share a label but differ in definition are never averaged: they split the row.

    Returns:
        The groups, and a line for each label that had to be split, saying what differs.
    """
    by_label: dict[tuple[str, ...], dict[str, list[Run]]] = {}
    for run in runs:
        key = tuple(run.label(name) for name in KEY)
        by_label.setdefault(key, {}).setdefault(_definition(run), []).append(run)
    found, notes = [], []
    for key, definitions in by_label.items():
        if len(definitions) > 1:
            first, second = (members[0].record for members in list(definitions.values())[:2])
            notes.append(
                f"{key[0]} / {key[1]}: runs of one label were not averaged, they differ in {', '.join(differences_of(first['resolved'], second['resolved'])) or 'their cards'}"
            )
        for members in definitions.values():
            distinct = {run.seed: run for run in members}
            found.append(Group(key, [distinct[seed] for seed in sorted(distinct)]))
    return found, notes


def to_csv(table: pd.DataFrame) -> str:
    """RFC 4180 with LF; empty for missing; text that a spreadsheet would run gets a leading apostrophe."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(table.columns)
    for row in table.itertuples(index=False):
        writer.writerow([_cell(value) for value in row])
    return out.getvalue()


def per_run(run: Run, metric: str) -> float | None:
    """A run's value: the mean over evaluation sets or probes; None if any of them is missing."""
    values = [entry["value"] for entry in run.values(metric)]
    if not values or any(value is None for value in values):
        return None
    return float(sum(values) / len(values))


def kind_of_interval(entry: dict[str, Any]) -> str:
    """How a metric's interval was made."""
    if entry["low"] is None and entry["units"] == TARGET_IMAGES:
        return "none: images of one target are not independent"
    if entry["low"] is None:
        return "none: not a rate over units"
    return "bootstrap over poisoned images, one training run" if entry["name"] == "auroc" else f"Wilson over {entry['n']} {entry['units']}, one training run"


def interval_of(group: Group, metric: str) -> Interval:
    """The 95 % interval of a group's mean: over queries for one run with one entry, over runs otherwise."""
    values = [per_run(run, metric) for run in group.runs]
    entries = group.runs[0].values(metric)
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return Interval(None, None, "missing")
    return interval_of_entry(entries[0], known) if len(entries) == 1 else over_runs(known)


def interval_of_entry(entry: dict[str, Any], values: Sequence[float]) -> Interval:
    """The 95 % interval of the mean of one metric of one set, probe or score: as recorded for one run, over runs otherwise.

    Args:
        entry: that of the first run.
        values: of all runs.
    """
    if len(values) == 1:
        return Interval(entry["low"], entry["high"], kind_of_interval(entry))
    # What is no rate over units, such as an AUROC, gets no Wilson interval where all runs agree.
    return over_runs(values, entry["n"], entry["units"]) if kind_of_interval(entry).startswith("Wilson") else over_runs(values)


def shown_count(value: float) -> str:
    """A count, or a mean of counts to a hundredth, without separators and exponents."""
    return f"{round(value, 2):.12g}"


def mean_of(values: Sequence[float | None]) -> float | None:
    """The mean, or None if a value is missing: an average over an incomplete set is refused."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def differences_of(left: Any, right: Any, ignored: Sequence[str] = ("seed",)) -> list[str]:
    """What differs between two resolved settings, a line each with both values; `ignored` are names of top-level settings."""
    found = []

    def walk(one: Any, other: Any, path: str) -> None:
        if isinstance(one, dict) and isinstance(other, dict):
            for name in sorted(set(one) | set(other)):
                walk(one.get(name), other.get(name), f"{path}.{name}" if path else name)
        elif one != other and path not in ignored:
            found.append(f"{path} ({one} and {other})")

    walk(left, right, "")
    return found


def _without_value(reason: str | None) -> dict[str, str]:
    return {} if reason is None else {"status": "not run", "reason": reason, "interval": ""}


def _definition(run: Run) -> str:
    """What has to agree for runs to be averaged, whatever the order of keys: definitions of the numbers and settings, all but the seed."""
    record = run.record
    resolved = {name: value for name, value in record["resolved"].items() if name != "seed"}
    cards = sorted({f"{entry['name']}/{entry['of']}/{entry['card']}" for entry in record["metrics"] if entry["card"]})
    return canonical([resolved, cards])


def _attack_value(point: dict[str, Any], metric: str) -> float | None:
    """Mean over probes of a curve point's value; None without a probe."""
    values = [value for name, value in point["metrics"].items() if name.partition("/")[0] == metric]
    return sum(values) / len(values) if values and None not in values else None


def _zero_shot_value(point: dict[str, Any]) -> float:
    """Mean over the evaluation sets of a curve point's zero-shot accuracy."""
    values = [value for name, value in point["metrics"].items() if name.partition("/")[0] == "zero_shot_acc1"]
    return float(sum(values) / len(values))


def place_of(key: tuple[str, ...]) -> tuple[Any, ...]:
    """Where a row stands in a table: by scale and data, then attacks and defenses from the plain to the elaborate."""
    attacks, defenses = ("none", "targeted", "backdoor"), ("clip", "clip+aug", "roclip", "roclip+aug")

    def place(name: str, known: tuple[str, ...]) -> tuple[int, str]:
        bare = name.partition("[")[0]
        return (known.index(bare) if bare in known else len(known), name)

    return (key[2], key[3], key[4], place(key[0], attacks), place(key[1], defenses))


def _cell(value: Any) -> Any:
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return "'" + value
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.6g}"
    return value
