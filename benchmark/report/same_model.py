"""Rows whose model is that of plain training: defenses that judge queries, predictions or models leave it as it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmark.report.records import Run
from benchmark.report.tables import Group

PLAIN = ("clip", "clip+aug")
NOTE = (
    "A row with (model of ...) did not train otherwise than that defense: its ASR and accuracies are of such a model and are compared with nothing. "
    "What it says of queries, predictions or the model stands in the tables below."
)

JUDGMENTS = ("query_", "certified_", "joint_certified_", "audit_")
"""How the metrics begin that a defense has for judging."""

TOLD = {"record": "rows", "count": "count"}
"""What a control is told, for people, by what its record says."""


def plain_models(runs: Sequence[Run]) -> dict[str, str]:
    """The plain defense that trained the same, by run id; empty where plain runs stand beside and none did; of other runs nothing.

    The same is: on the same poison, with the same seed, the same loss in every epoch, to the last digit. Between processors digits
    differ, so a run that judges queries, predictions or its model is also taken for the same if it spent the same in every epoch
    and its first epoch ended with the same loss to a thousandth.
    """
    plain = [(_training(run), run) for run in runs if run.label("defense") in PLAIN]
    exact = {found: run.label("defense") for found, run in plain if found}
    places = {_place(run) for found, run in plain if found}
    spent: dict[tuple[Any, ...], list[Run]] = {}
    for found, run in plain:
        if found:
            spent.setdefault(_spent(run), []).append(run)
    models = {}
    for run in runs:
        found = _training(run)
        if run.label("defense") in PLAIN or not found or _place(run) not in places:
            continue
        alike = spent.get(_spent(run), []) if _judges(run) else []
        near = [one.label("defense") for one in alike if math.isclose(_first_loss(one), _first_loss(run), rel_tol=1e-3)]
        models[run.record["run_id"]] = exact.get(found) or (near[0] if near else "")
    return models


def model_of(group: Group, plain: Mapping[str, str]) -> str | None:
    """The plain defense whose models the runs of a group have, as far as plain runs stand beside them, or None."""
    names = {plain[run.record["run_id"]] for run in group.runs if run.record["run_id"] in plain}
    return names.pop() or None if len(names) == 1 else None


def remark(group: Group, plain: Mapping[str, str]) -> str:
    """What has to stand behind a defense's name: what it is told, or whose model it has."""
    told = group.runs[0].record["told"]
    if told != "nothing":
        return f" (told the {TOLD[told]})"
    name = model_of(group, plain)
    return f" (model of {name})" if name else ""


def _judges(run: Run) -> bool:
    return any(metric["name"].startswith(JUDGMENTS) for metric in run.record["metrics"])


def _first_loss(run: Run) -> float:
    return float(run.record["curve"][0]["loss_mean"])


def _spent(run: Run) -> tuple[Any, ...]:
    """What tells trainings apart that cost different things."""
    return (*_place(run), *((point["epoch"], point["phase"], point.get("samples_seen"), point.get("lr_last")) for point in run.record["curve"]))


def _training(run: Run) -> tuple[Any, ...]:
    """What tells one training from another; empty where there is no curve, as with several models."""
    curve = [(point["epoch"], point["phase"], point.get("samples_seen"), point["loss_mean"]) for point in run.record["curve"]]
    if not curve or run.cost.get("n_models_trained", 1) != 1:
        return ()
    return (*_place(run), *curve)


def _place(run: Run) -> tuple[Any, ...]:
    augmented = run.label("defense").endswith("+aug")
    return (run.label("scale"), run.label("dataset"), run.label("model"), run.seed, run.record["poison"].get("manifest_sha256"), augmented)
