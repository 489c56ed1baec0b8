"""The numbers of a record, out of its saved predictions alone: an implementation of its own, for checking the first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from benchmark.evaluate.predictions import PRECISION

_FLOAT = 1e-6  # means that were taken in float32


@dataclass(frozen=True)
class Recomputed:
    """A value, and how far the recorded one may lie from it."""

    value: float
    tolerance: float = 1e-9


def recomputed(tables: Mapping[str, pd.DataFrame], cards: Mapping[str, Any], metrics: list[dict[str, Any]]) -> dict[tuple[str, str], Recomputed]:
    """Values by metric and evaluation set or probe; those that no saved prediction tells are not among them.

    Args:
        tables: as `read_predictions` gives them.
        cards: of the record, by hash; a probe's card names its evaluation set and whether it counts targets.
        metrics: of the record, for the cards they refer to.
    """
    found: dict[tuple[str, str], Recomputed] = {}
    for name, table in tables.items():
        kind, _, of = name.partition("-")
        if kind == "zero_shot":
            values = _zero_shot(table)
        elif kind == "linear_probe":
            values = _linear_probe(table)
        elif kind == "attack" and "rank_goal" in table:
            of_probe = [one for one in metrics if one["of"] == of]
            card: Mapping[str, Any] = next((cards[one["card"]] for one in of_probe if one["card"] in cards), {})
            if card.get("control"):
                values = {card["control"]: _share(table[table["counted"]]["rank_goal"], 1)}
            elif "floor" in table:
                values = _retrieval(table, card)
            else:
                values = _attack(table, tables.get(f"zero_shot-{card.get('eval_set')}"), card)
        else:
            continue
        found |= {(metric, of): value for metric, value in values.items()}
    return found


def _zero_shot(table: pd.DataFrame) -> dict[str, Recomputed]:
    first = table["rank_true"] <= 1
    return {
        "zero_shot_acc1": Recomputed(float(first.mean())),
        "zero_shot_acc5": Recomputed(float((table["rank_true"] <= 5).mean())),
        "zero_shot_mean_per_class_recall": Recomputed(float(first.groupby(table["true"]).mean().mean()), _FLOAT),
    }


def _linear_probe(table: pd.DataFrame) -> dict[str, Recomputed]:
    correct = table["pred"] == table["true"]
    return {
        "linear_probe_acc1": Recomputed(float(correct.mean())),
        "linear_probe_mean_per_class_recall": Recomputed(float(correct.groupby(table["true"]).mean().mean()), _FLOAT),
    }


def _attack(table: pd.DataFrame, plain: pd.DataFrame | None, card: Mapping[str, Any]) -> dict[str, Recomputed]:
    counted = table[table["counted"]]
    known = counted[counted["true"] >= 0]
    values = {"asr": _share(counted["rank_goal"], 1)}
    values |= {f"asr_top{k}": _share(counted["rank_goal"], k) for k in card.get("ks", ()) if k > 1}
    if len(known):
        values["triggered_acc1"] = _share(known["rank_true"], 1)
    if len(counted):
        values["goal_rank_median"] = Recomputed(float(np.quantile(counted["rank_goal"], 0.5)), _FLOAT)
        values["goal_rank_mean"] = Recomputed(float(counted["rank_goal"].mean()), 1e-5 * max(1.0, float(counted["rank_goal"].mean())))
        margins = counted["margin"].to_numpy(np.float64)
        values["goal_margin_mean"] = Recomputed(float(margins.mean()), PRECISION * float(np.abs(margins).mean()) + _FLOAT)
    if card.get("queries") == "targets":
        if plain is not None:
            values["asr_floor"] = Recomputed(_taken_for(plain, table["goal"]), _FLOAT)
        return values
    values["asr_floor"] = _share(counted["rank_goal_untriggered"], 1)
    values["asr_all"] = _share(table["rank_goal"], 1)
    if plain is not None and list(plain["query_id"]) == list(table["query_id"]):
        values["untriggered_acc1"] = Recomputed(float((plain["rank_true"][known.index] <= 1).mean()))
    if "pred_linear_probe" in table:
        values["linear_probe_asr"] = Recomputed(float((counted["pred_linear_probe"] == counted["goal"]).mean()))
    return values


def _retrieval(table: pd.DataFrame, card: Mapping[str, Any]) -> dict[str, Recomputed]:
    asked, other = (table[table["counted"] & (table["floor"] == floor)]["rank_goal"] for floor in (False, True))
    values = {"goal_rank_median": Recomputed(float(np.quantile(asked, 0.5)), _FLOAT), "goal_rank_mean": Recomputed(float(asked.mean()), 1e-5 * float(asked.mean()))}
    for k in card.get("ks", (1,)):
        suffix = f"_top{k}" if k > 1 else ""
        values |= {f"asr{suffix}": _share(asked, k), f"asr_floor{suffix}": _share(other, k)}
    return values


def _share(ranks: pd.Series, k: int) -> Recomputed:
    """The share of ranks that are at most k."""
    return Recomputed(float((ranks <= k).mean()))


def _taken_for(plain: pd.DataFrame, goals: pd.Series) -> float:
    """Mean over targets of the share of test images of other classes that are read as the target's class."""
    return float(np.mean([(plain["pred"][plain["true"] != goal] == goal).mean() for goal in goals]))
