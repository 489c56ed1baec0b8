"""The numbers of a record, out of its saved predictions alone: an implementation of its own, for checking the first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from benchmark.evaluate.predictions import PRECISION
from benchmark.evaluate.statistics import TARGET_IMAGES

_FLOAT = 1e-6  # means that were taken in float32
_UNTOLD = 0.05  # a value that rounding can move by more is not told by the predictions


@dataclass(frozen=True)
class Recomputed:
    """A value, how far the recorded one may lie from it, and over how many of what it is; n is None where the tables do not tell."""

    value: float
    tolerance: float = 1e-9
    n: int | None = None
    units: str = "queries"


def recomputed(tables: Mapping[str, pd.DataFrame], cards: Mapping[str, Any], metrics: list[dict[str, Any]], rounded: bool = True) -> dict[tuple[str, str], Recomputed]:
    """Values by metric and evaluation set or probe; those that no saved prediction tells are not among them.

    A whole record has all of them.

    Args:
        tables: as `read_predictions` gives them.
        cards: of the record, by hash; a probe's card names its evaluation set and whether it counts targets.
        metrics: of the record, for the cards they refer to.
        rounded: whether floats of the tables are those of the slim form.
    """
    found: dict[tuple[str, str], Recomputed] = {}
    for name, table in tables.items():
        kind, _, of = name.partition("-")
        if kind == "zero_shot":
            values = _zero_shot(table, _n_classes(of, cards))
        elif kind == "linear_probe":
            values = _linear_probe(table)
        elif kind == "attack" and "rank_goal" in table:
            of_probe = [one for one in metrics if one["of"] == of]
            card: Mapping[str, Any] = next((cards[one["card"]] for one in of_probe if one["card"] in cards), {})
            if card.get("control"):
                values = {card["control"]: _share(table[table["counted"]]["rank_goal"], 1, _units(card))}
            elif "floor" in table:
                values = _retrieval(table, card)
            else:
                values = _attack(table, tables.get(f"zero_shot-{card.get('eval_set')}"), card, rounded)
        elif kind == "queries":
            probe = of.removeprefix("attack-")
            values = _clean_queries(table) if probe == of else _attacked_queries(table, tables, _card_of("query_auroc", probe, metrics, cards), tables.get(of), rounded)
            of = probe
        elif kind == "certified":
            found |= _certified(of, table, tables.get(f"attack-{of}"), metrics)
            continue
        else:
            continue
        found |= {(metric, of): value for metric, value in values.items()}
    return found


def _units(card: Mapping[str, Any]) -> str:
    if card.get("queries") != "targets":
        return "queries"
    return TARGET_IMAGES if card.get("images_per_target", 1) > 1 else "targets"


def _n_classes(of: str, cards: Mapping[str, Any]) -> int:
    """How many classes an evaluation set has; 0 if no card tells."""
    return next((int(card["n_classes"]) for card in cards.values() if card.get("eval_set") == of and "n_classes" in card), 0)


def _zero_shot(table: pd.DataFrame, n_classes: int) -> dict[str, Recomputed]:
    first, n = table["rank_true"] <= 1, len(table)
    fifth = {"zero_shot_acc5": Recomputed(float((table["rank_true"] <= 5).mean()), n=n)} if n_classes > 5 else {}
    return {
        "zero_shot_acc1": Recomputed(float(first.mean()), n=n),
        **fifth,
        "zero_shot_mean_per_class_recall": Recomputed(float(first.groupby(table["true"]).mean().mean()), _FLOAT, n),
    }


def _linear_probe(table: pd.DataFrame) -> dict[str, Recomputed]:
    correct, n = table["pred"] == table["true"], len(table)
    return {
        "linear_probe_acc1": Recomputed(float(correct.mean()), n=n),
        "linear_probe_mean_per_class_recall": Recomputed(float(correct.groupby(table["true"]).mean().mean()), _FLOAT, n),
    }


def _attack(table: pd.DataFrame, plain: pd.DataFrame | None, card: Mapping[str, Any], rounded: bool) -> dict[str, Recomputed]:
    targets = card.get("queries") == "targets"
    units = _units(card)
    counted = table[table["counted"]]
    known = counted[counted["true"] >= 0]
    values = {"asr": _share(counted["rank_goal"], 1, units)}
    values |= {f"asr_top{k}": _share(counted["rank_goal"], k, units) for k in card.get("ks", ()) if k > 1}
    if len(known):
        values["triggered_acc1"] = _share(known["rank_true"], 1, units)
    if len(counted):
        ranks, margins = counted["rank_goal"], counted["margin"].to_numpy(np.float64)
        off = (PRECISION if rounded else _FLOAT) * float(np.abs(margins).mean()) + _FLOAT
        means = {
            "goal_rank_median": Recomputed(float(np.quantile(ranks, 0.5)), _FLOAT),
            "goal_rank_mean": Recomputed(float(ranks.mean()), 1e-5 * max(1.0, float(ranks.mean()))),
            "goal_margin_mean": Recomputed(float(margins.mean()), off),
        }
        values |= {name: replace(one, n=len(counted), units=units) for name, one in means.items()}
    if targets:
        if plain is not None:
            values["asr_floor"] = Recomputed(_taken_for(plain, table["goal"]), _FLOAT, len(plain))
        return values
    values["asr_floor"] = _share(counted["rank_goal_untriggered"], 1)
    values["asr_all"] = _share(table["rank_goal"], 1)
    if plain is not None and list(plain["query_id"]) == list(table["query_id"]):
        values["untriggered_acc1"] = Recomputed(float((plain["rank_true"][known.index] <= 1).mean()), n=len(known))
    if "pred_linear_probe" in table:
        values["linear_probe_asr"] = Recomputed(float((counted["pred_linear_probe"] == counted["goal"]).mean()), n=len(counted))
    return values


def _retrieval(table: pd.DataFrame, card: Mapping[str, Any]) -> dict[str, Recomputed]:
    asked, other = (table[table["counted"] & (table["floor"] == floor)]["rank_goal"] for floor in (False, True))
    n = len(asked)
    values = {"goal_rank_median": Recomputed(float(np.quantile(asked, 0.5)), _FLOAT, n), "goal_rank_mean": Recomputed(float(asked.mean()), 1e-5 * float(asked.mean()), n)}
    for k in card.get("ks", (1,)):
        suffix = f"_top{k}" if k > 1 else ""
        values |= {f"asr{suffix}": _share(asked, k), f"asr_floor{suffix}": _share(other, k)}
    return values


def _card_of(metric: str, of: str, metrics: list[dict[str, Any]], cards: Mapping[str, Any]) -> Mapping[str, Any]:
    return next((cards.get(one["card"], {}) for one in metrics if (one["name"], one["of"]) == (metric, of)), {})


def _clean_queries(table: pd.DataFrame) -> dict[str, Recomputed]:
    return {"query_clean_rejected": Recomputed(float(table["rejected"].mean()), n=len(table))}


def _attacked_queries(table: pd.DataFrame, tables: Mapping[str, pd.DataFrame], card: Mapping[str, Any], attack: pd.DataFrame | None, rounded: bool) -> dict[str, Recomputed]:
    """What a query detector's saved scores and verdicts give; without those of the clean queries, only what needs none."""
    if attack is None:
        return {}
    counted = attack["counted"].to_numpy(bool)
    seen = table[counted]
    rejected = seen["rejected"].to_numpy(bool)
    passed = seen["reached_goal"].to_numpy(bool) & ~rejected
    units = _units(card)
    values = {name: Recomputed(float(hits.mean()), n=len(seen), units=units) for name, hits in (("query_tpr_own", rejected), ("asr_after_rejection", passed))}
    clean = tables.get(f"queries-{card.get('eval_set')}")
    if clean is not None and card.get("negatives") != "test images":
        clean = clean[counted] if list(clean["query_id"]) == list(table["query_id"]) else None
    if clean is None:
        return values
    alarms, n = int(clean["rejected"].sum()), len(seen) + len(clean)
    values["query_fpr_own"] = Recomputed(alarms / len(clean), n=len(clean))
    values["query_base_rate"] = Recomputed(len(seen) / n, n=n)
    values["query_f1_own"] = Recomputed(2 * int(rejected.sum()) / (len(seen) + int(rejected.sum()) + alarms), n=n)
    return values | _ranked(*_rankable(seen["score"].to_numpy(np.float64), clean["score"].to_numpy(np.float64)), rounded)


def _rankable(attacked: NDArray[np.float64], clean: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scores with NaN and +inf beyond the largest and -inf below the smallest finite one of both."""
    known = [score for score in (*attacked, *clean) if np.isfinite(score)]
    above, below = max(known, default=0.0) + 1, min(known, default=0.0) - 1
    first, second = (np.where(np.isnan(some) | (some == np.inf), above, np.where(some == -np.inf, below, some)) for some in (attacked, clean))
    return first, second


def _ranked(attacked: NDArray[np.float64], clean: NDArray[np.float64], rounded: bool) -> dict[str, Recomputed]:
    """Values of the order of scores, with what rounding of the saved scores, where they are, can do to it. What it can do too much to is left out.

    That is no more than moving all of one kind up and all of the other down; and attacked queries that rounding made equal, which
    raises the average precision, may have been apart.
    """
    positive = np.arange(len(attacked) + len(clean)) < len(attacked)
    apart = 1e-9 * np.abs(attacked).max() * np.arange(len(attacked)) / len(attacked)

    def of(shift: float, spread: NDArray[np.float64] | float = 0.0) -> NDArray[np.float64]:
        scores = np.concatenate([attacked + shift * np.abs(attacked) + spread, clean - shift * np.abs(clean)])
        rejected, caught, _ = roc_curve(positive, scores, drop_intermediate=False)
        at_95 = rejected[int(np.argmax(caught * len(attacked) >= np.ceil(0.95 * len(attacked)) - 0.5))]
        return np.array([roc_auc_score(positive, scores), average_precision_score(positive, scores), at_95])

    middle, shift = of(0), 1.01 * PRECISION
    reach = np.maximum(np.abs(of(shift) - middle), np.abs(of(-shift, apart) - middle)) if rounded else np.zeros(3)
    n = len(attacked) + len(clean), len(attacked) + len(clean), len(clean)
    names = ("query_auroc", "query_average_precision", "query_fpr_at_tpr_0.95")
    found = zip(names, middle, reach, n, strict=True)
    return {name: Recomputed(float(value), float(tolerance) + 1e-9, over) for name, value, tolerance, over in found if tolerance <= _UNTOLD}


def _certified(of: str, table: pd.DataFrame, attack: pd.DataFrame | None, metrics: list[dict[str, Any]]) -> dict[tuple[str, str], Recomputed]:
    """A certificate's curve; what one attack does to all queries at once needs the certificate itself."""
    found: dict[tuple[str, str], Recomputed] = {}
    chosen = table if attack is None else table[attack["counted"].to_numpy(bool)]
    for column in [column for column in table.columns if column.startswith("radius_")]:
        name = column.removeprefix("radius_")
        radius, predicted = chosen[column], chosen[f"pred_{name}"]
        correct = (predicted == chosen["true"]) & (radius >= 0)
        n = len(chosen)
        values = {"certified_abstained": Recomputed(float((radius < 0).mean()), n=n)}
        medians = (("certified_radius_median", radius >= 0), ("certified_radius_median_correct", correct))
        values |= {metric: Recomputed(float(radius[those].median()), n=int(those.sum())) for metric, those in medians if those.any()}
        shares = {"certified_acc_": correct}
        if attack is not None:
            goal = attack["goal"][chosen.index]
            values["certified_asr"] = Recomputed(float(((predicted == goal) & (radius >= 0)).mean()), n=n)
            shares["certified_not_goal_"] = (predicted != goal) & (radius >= 0)
        for metric in [one["name"] for one in metrics if one["of"] == f"{of}:{name}"]:
            prefix = next((prefix for prefix in shares if metric.startswith(prefix)), None)
            if prefix is not None:
                values[metric] = Recomputed(float((shares[prefix] & (radius >= int(metric.removeprefix(prefix)))).mean()), n=n)
        found |= {(metric, f"{of}:{name}"): value for metric, value in values.items()}
    return found


def _share(ranks: pd.Series, k: int, units: str = "queries") -> Recomputed:
    """The share of ranks that are at most k."""
    return Recomputed(float((ranks <= k).mean()), n=len(ranks), units=units)


def _taken_for(plain: pd.DataFrame, goals: pd.Series) -> float:
    """Mean over targets of the share of test images of other classes that are read as the target's class."""
    return float(np.mean([(plain["pred"][plain["true"] != goal] == goal).mean() for goal in goals]))
