"""One defense against another on the same poison: paired differences, their intervals, tests and Holm's correction."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from benchmark.errors import BenchError
from benchmark.evaluate.paired_tests import Verdict, holm, mcnemar, over_pairs
from benchmark.evaluate.statistics import paired_difference
from benchmark.report.controls import without_controls
from benchmark.report.records import Run
from benchmark.report.same_model import model_of, plain_models
from benchmark.report.tables import groups, per_run
from benchmark.report.targets import hits

METRICS = ("asr", "hit_at_1", "zero_shot_acc1", "linear_probe_acc1")
COLUMNS = ("attack", "defense", "reference", "scale", "dataset", "model", "metric", "difference", "low", "high", "n_runs", "test", "p", "p_holm")


@dataclass(frozen=True)
class Comparison:
    """Mean of defense - reference over shared seeds, with its t interval from three on.

    Attributes:
        verdict: the test and its p; the exact test where there are enough runs for one.
        p_holm: p corrected for all comparisons with the reference in one metric; None without p.
    """

    attack: str
    defense: str
    reference: str
    scale: str
    dataset: str
    model: str
    metric: str
    difference: float
    low: float | None
    high: float | None
    n_runs: int
    verdict: Verdict
    p_holm: float | None = None


def compare(runs: Sequence[Run], reference: str, defenses: Sequence[str] | None = None) -> tuple[list[Comparison], list[str]]:
    """Every defense (or the named ones) against the reference, for each attack, scale and data set that has both.

    Runs are paired by seed. Controls (sham poison, clean models) are neither compared nor counted by Holm. A pair that was not trained on the same poison, or whose numbers do not refer to the same cards,
    is not compared, nor is a row whose runs differ in definition, nor one whose models are those of `clip` or `clip+aug`.

    Returns:
        The comparisons, corrected within each metric, and a line for each pair left out.
    """
    placed: dict[tuple[str, ...], dict[str, dict[int, Run]]] = defaultdict(dict)
    rows, _ = groups(without_controls(runs))
    split = {key for key, count in Counter(row.key for row in rows).items() if count > 1}
    plain, copies = plain_models(runs), dict[str, list[str]]()
    for row in rows:
        attack, defense, *place = row.key
        if name := model_of(row, plain):
            copies.setdefault(name, []).append(defense)
        elif row.key not in split:
            placed[(attack, *place)][defense] = {run.seed: run for run in row.runs}
    found: list[Comparison] = []
    notes = [f"{key[0]} / {key[1]} was not compared: its runs differ in definition" for key in sorted(split)]
    notes += [f"not compared, because their models are those of {name}: {', '.join(dict.fromkeys(members))}" for name, members in sorted(copies.items())]
    for (attack, *place), by_defense in placed.items():
        if reference not in by_defense:
            continue
        for defense, by_seed in by_defense.items():
            if defense == reference or (defenses is not None and defense not in defenses):
                continue
            pairs = [(by_seed[seed], by_defense[reference][seed]) for seed in sorted(by_seed.keys() & by_defense[reference].keys())]
            for metric in METRICS:
                comparable = []
                for left, right in pairs:
                    reason = refused(left, right, metric)
                    if reason is None:
                        comparable.append((left, right))
                    elif reason:
                        notes.append(f"{attack}, seed {left.seed}: {defense} and {reference} were not compared in {metric}, they differ in {reason}")
                if comparable:
                    found.append(_compared(comparable, (attack, defense, reference, *place), metric))
    return _corrected(found), notes


def against(runs: Sequence[Run], reference: str) -> tuple[pd.DataFrame, list[str]]:
    """The comparisons with a reference as a table, the columns of COLUMNS.

    Raises:
        BenchError: nothing can be compared with it.
    """
    found, notes = compare(runs, reference)
    if not found:
        known = ", ".join(sorted({run.label("defense") for run in runs}))
        raise BenchError(f"no attack and seed on which {reference!r} can be compared with another defense; known defenses here: {known}" + (f". {notes[0]}" if notes else ""))
    rows = [{**{name: getattr(one, name) for name in COLUMNS if name not in ("test", "p")}, "test": one.verdict.kind, "p": one.verdict.p} for one in found]
    return pd.DataFrame(rows, columns=list(COLUMNS)), notes


def differences(runs: Sequence[Run], defense: str, reference: str) -> pd.DataFrame:
    """Paired differences of two defenses; p is corrected for these comparisons alone."""
    found, _ = compare(runs, reference, [defense])
    rows = [{**{name: getattr(one, name) for name in COLUMNS if name not in ("test", "p")}, "test": one.verdict.kind, "p": one.verdict.p} for one in found]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _compared(pairs: Sequence[tuple[Run, Run]], names: tuple[str, ...], metric: str) -> Comparison:
    values = [(per_run(left, metric), per_run(right, metric)) for left, right in pairs]
    left, right = [a for a, _ in values if a is not None], [b for _, b in values if b is not None]
    mean, low, high = paired_difference(left, right)
    verdict = over_pairs(left, right)
    if len(pairs) == 1:
        verdict = _over_targets(*pairs[0], metric) or verdict
    attack, defense, reference, scale, dataset, model = names
    return Comparison(attack, defense, reference, scale, dataset, model, metric, mean, low, high, len(pairs), verdict)


def refused(left: Run, right: Run, metric: str) -> str | None:
    """Why two runs cannot be paired in this metric: what differs; empty if one of them has no value."""
    if per_run(left, metric) is None or per_run(right, metric) is None:
        return ""
    poison = [run.record["poison"].get("manifest_sha256") for run in (left, right)]
    if poison[0] != poison[1]:
        return f"the poison (manifests {str(poison[0])[:12]} and {str(poison[1])[:12]})"
    cards = [{entry["of"]: entry["card"] for entry in run.values(metric)} for run in (left, right)]
    if cards[0] != cards[1]:
        changed = sorted(name for name in cards[0].keys() | cards[1].keys() if cards[0].get(name) != cards[1].get(name))
        return "; ".join(_card_difference(left, right, name, cards[0].get(name), cards[1].get(name)) for name in changed)
    return None


def _card_difference(left: Run, right: Run, name: str, first: str | None, second: str | None) -> str:
    """What differs in the definitions of two values, field by field."""
    one, two = left.record.get("cards", {}).get(first, {}), right.record.get("cards", {}).get(second, {})
    fields = [f"{field} ({one.get(field)} and {two.get(field)})" for field in sorted(one.keys() | two.keys()) if one.get(field) != two.get(field)]
    return f"{name}: {', '.join(fields) or f'their cards ({first} and {second})'}"


def _over_targets(left: Run, right: Run, metric: str) -> Verdict | None:
    """McNemar's test over the targets of one run of each, where the saved predictions have them."""
    if metric != "asr" or any(entry["units"] != "targets" for entry in left.values(metric)):
        return None
    first, second = ({f"{probe}/{query}": hit for probe, found in hits(run).items() for query, hit in found.items()} for run in (left, right))
    shared = sorted(first.keys() & second.keys())
    if not shared:
        return None
    only_left = sum(first[name] and not second[name] for name in shared)
    only_right = sum(second[name] and not first[name] for name in shared)
    return Verdict(mcnemar(only_left, only_right), f"McNemar over {len(shared)} targets of one run, {only_left} and {only_right} discordant")


def _corrected(found: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons with Holm's correction; a family is all comparisons with one reference in one metric."""
    adjusted: dict[int, float | None] = {}
    families: dict[Any, list[int]] = defaultdict(list)
    for index, one in enumerate(found):
        families[(one.reference, one.metric)].append(index)
    for members in families.values():
        adjusted |= dict(zip(members, holm([found[index].verdict.p for index in members]), strict=True))
    return [replace(one, p_holm=adjusted[index]) for index, one in enumerate(found)]
