"""The wide table: a row for all seeds of a cell, with its controls and what its defense said of the rows where there is any."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from benchmark.report.controls import controls
from benchmark.report.records import Run
from benchmark.report.same_model import model_of, plain_models
from benchmark.report.tables import KEY, Group, groups, interval_of, mean_of, per_run, place_of

WIDE = (
    *KEY,
    "seeds",
    "n_pairs",
    "n_poison",
    "poison_rate",
    "asr",
    "asr_low",
    "asr_high",
    "asr_n",
    "asr_floor",
    "triggered_acc1",
    "zero_shot_acc1",
    "linear_probe_acc1",
    "train_seconds",
    "beside_seconds",
    "pairs_per_second",
    "pairs_trained",
    "n_models_trained",
)
CLEAN = "clean_pairs_used"
_OF_SCORE = ("auroc", "average_precision", "base_rate", "fpr_at_tpr_0.95", "precision_at_tpr_0.95", "f1_own", "precision_own")
_OF_FILTER = ("n_dropped", "recall_dropped", "n_poison_kept", "clean_lost")
JUDGED = ("model_of", "asr_after_rejection")
DETECTION = ("score", *_OF_SCORE, *_OF_FILTER)


def wide_table(runs: Sequence[Run]) -> pd.DataFrame:
    """One row per (attack, defense, scale, dataset, model): means over seeds, fractions, the columns of WIDE.

    Those of CONTROLS follow if a run is one, CLEAN if a run used clean pairs, those of JUDGED (the plain defense whose models these
    are; share of attacked queries that reach the goal and are not rejected) and of DETECTION if a run has them.
    """
    found, _ = groups(runs)
    found = sorted(found, key=lambda group: place_of(group.key))
    detects = any(detected(group) for group in found)
    controlled = controls(found)
    plain = plain_models(runs)
    judged = {id(group): {"model_of": model_of(group, plain), "asr_after_rejection": mean_of([per_run(run, "asr_after_rejection") for run in group.runs])} for group in found}
    shown = [name for name in JUDGED if any(one[name] is not None for one in judged.values())]
    rows = [wide_row(group) | controlled.values[id(group)] | {CLEAN: clean_pairs(group)} | judged[id(group)] | (detection_row(group) if detects else {}) for group in found]
    return pd.DataFrame(rows, columns=[*WIDE, *controlled.shown, *([CLEAN] if uses_clean_pairs(found) else ()), *shown, *(DETECTION if detects else ())])


def uses_clean_pairs(found: Sequence[Group]) -> bool:
    """Whether a run of these groups used clean pairs."""
    return any(run.record.get(CLEAN) for group in found for run in group.runs)


def clean_pairs(group: Group) -> float | None:
    """Clean pairs that a defense used, mean over runs; None if a record does not tell."""
    return mean_of([run.record.get(CLEAN) for run in group.runs])


def wide_row(group: Group) -> dict[str, Any]:
    """A group's row of the wide table, by column."""
    runs = group.runs
    first = runs[0].record
    interval = interval_of(group, "asr")
    asr_entries = runs[0].values("asr")
    seconds = [run.cost.get("train_seconds") for run in runs]
    rates = [run.cost["pairs_trained"] / run.cost["train_seconds"] for run in runs if run.cost.get("train_seconds") and run.cost.get("pairs_trained")]
    return {
        **dict(zip(KEY, group.key, strict=True)),
        "seeds": len(runs),
        "n_pairs": first["data"]["n_pairs"],
        "n_poison": mean_of([run.record["poison"]["n_poison"] for run in runs]),
        "poison_rate": mean_of([run.record["poison"]["poison_rate"] for run in runs]),
        "asr": mean_of([per_run(run, "asr") for run in runs]),
        "asr_low": interval.low,
        "asr_high": interval.high,
        "asr_n": sum(entry["n"] for entry in asr_entries) if asr_entries else None,
        "asr_floor": mean_of([per_run(run, "asr_floor") for run in runs]),
        "triggered_acc1": mean_of([per_run(run, "triggered_acc1") for run in runs]),
        "zero_shot_acc1": mean_of([per_run(run, "zero_shot_acc1") for run in runs]),
        "linear_probe_acc1": mean_of([per_run(run, "linear_probe_acc1") for run in runs]),
        "train_seconds": mean_of(seconds),
        "beside_seconds": mean_of([run.cost.get("beside_seconds") for run in runs]),
        "pairs_per_second": mean_of(rates) if rates else None,
        "pairs_trained": mean_of([run.cost.get("pairs_trained") for run in runs]),
        "n_models_trained": mean_of([run.cost.get("n_models_trained") for run in runs]),
    }


def detected(group: Group) -> bool:
    """Whether a group's runs scored rows or dropped some, and say how well."""
    return any(entry["name"] in ("recall_at_0.1", "recall_dropped") for run in group.runs for entry in run.record["metrics"])


def detection_row(group: Group) -> dict[str, Any]:
    """The columns of DETECTION: of the first score that the defense handed in, and of the rows that it dropped."""
    scored = group.runs[0].values("auroc")
    score = str(scored[0]["of"]) if scored else None
    dropped = {name: mean_of([_value(run, name, "filter") for run in group.runs]) for name in _OF_FILTER}
    of_score = {name: mean_of([_value(run, name, score) for run in group.runs]) for name in _OF_SCORE}
    return {"score": score, **of_score, **dropped}


def _value(run: Run, metric: str, of: str | None) -> float | None:
    return next((entry["value"] for entry in run.values(metric) if entry["of"] == of), None)
