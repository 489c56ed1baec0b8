"""Rows whose model is that of plain training: defenses that judge queries, predictions or models leave it as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmark.report.records import Run
from benchmark.report.tables import Group

PLAIN = ("clip", "clip+aug")
NOTE = (
    "A row with (model of ...) did not train otherwise than that defense: its ASR and accuracies are of that very model and are compared with nothing. "
    "What it says of queries, predictions or the model stands in the tables below."
)

TOLD = {"record": "rows", "count": "count"}
"""What a control is told, for people, by what its record says."""


def plain_models(runs: Sequence[Run]) -> dict[str, str]:
    """The plain defense that trained the same, by run id; of other runs nothing.

    The same is: on the same poison, with the same seed, the same loss in every epoch, to the last digit.
    """
    plain = {found: run.label("defense") for run in runs if run.label("defense") in PLAIN and (found := _training(run))}
    return {run.record["run_id"]: plain[found] for run in runs if run.label("defense") not in PLAIN and (found := _training(run)) in plain}


def model_of(group: Group, plain: Mapping[str, str]) -> str | None:
    """The plain defense whose models all runs of a group have, or None."""
    names = {plain.get(run.record["run_id"]) for run in group.runs}
    return names.pop() if len(names) == 1 else None


def remark(group: Group, plain: Mapping[str, str]) -> str:
    """What has to stand behind a defense's name: what it is told, or whose model it has."""
    told = group.runs[0].record["told"]
    if told != "nothing":
        return f" (told the {TOLD[told]})"
    name = model_of(group, plain)
    return f" (model of {name})" if name else ""


def _training(run: Run) -> tuple[Any, ...]:
    """What tells one training from another; empty where there is no curve, as with several models."""
    curve = [(point["epoch"], point["phase"], point.get("samples_seen"), point["loss_mean"]) for point in run.record["curve"]]
    if not curve or run.cost.get("n_models_trained", 1) != 1:
        return ()
    place = (run.label("scale"), run.label("dataset"), run.label("model"), run.seed, run.record["poison"].get("manifest_sha256"))
    return (*place, *curve)
