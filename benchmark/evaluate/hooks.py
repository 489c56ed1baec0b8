"""Calls what a defense overrides beside training, and measures what it says: suspicion of queries, certificates, an audit of the model."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from benchmark.contract import Audit, Defense, Images, Probe, View
from benchmark.data.eval_sets import EvalSet
from benchmark.errors import BenchError
from benchmark.evaluate.attack_success import Queries, units_of
from benchmark.evaluate.certification import TRUST, certificate_card, certificate_table, certified_curve
from benchmark.evaluate.features import Encoder, on_prompts
from benchmark.evaluate.measure import Evaluator
from benchmark.evaluate.metric import Metric, rate
from benchmark.evaluate.query_detection import Judged, judged, query_detection, query_table
from benchmark.evaluate.zero_shot import test_name
from benchmark.guard import sealed
from benchmark.settings import canonical, digest
from benchmark.stages import cost_file, write_atomically
from benchmark.train.lab import Task
from benchmark.train.model import Model, passes

VERSION = 4


@dataclass
class Said:
    """What the hooks' metrics are, what they refer to, what a reader should know of them, and what they took: `seconds`, `passes`."""

    metrics: list[Metric] = field(default_factory=list)
    cards: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    predictions: Path | None = None
    cost: dict[str, Any] = field(default_factory=dict)


def check_hooks(defense: Defense, name: str, main: EvalSet) -> None:
    """Says before anything is trained if the defense cannot be measured on this evaluation set.

    Raises:
        BenchError: certificates without labelled images.
    """
    if defense.overrides("certify") and defense.needs_support and not len(main.train.labels):
        raise BenchError(f"defense {name!r} certifies with labelled images, and evaluation set {main.name!r} has no train split; give --eval a set that has one first")


def ask_hooks(defense: Defense, name: str, models: Sequence[Model], evaluator: Evaluator, evaluation: Path, clean: Callable[[int], NDArray[np.uint8]], run: str) -> Said:
    """The finished answers of the hooks; nothing at all for a defense that overrides none.

    Args:
        defense: the instance on which `defend` ran.
        evaluation: the finished evaluation of the same models, for what each attacked query is read as.
        clean: clean images (n, S, S, 3) for an audit, granted and counted.
        run: the run's id, which stands for all that the instance depends on.
    """
    if not any(defense.overrides(hook) for hook in ("suspicion", "certify", "audit")):
        return Said()
    granted = clean(defense.clean_wanted()) if defense.overrides("audit") else None
    facts = {"stage": "hooks", "version": VERSION, "run": run, "weights": [model.identity() for model in models], "evaluation": evaluation.name}
    folder = evaluator.stages.make("hooks", facts, partial(_build, defense, name, list(models), evaluator, evaluation, granted))
    found = json.loads((folder / "metrics.json").read_text())
    return Said(
        [Metric(**metric) for metric in found["metrics"]],
        found["cards"],
        found["warnings"],
        folder / "predictions",
        json.loads(took.read_text()) if (took := cost_file(folder)).is_file() else {},
    )


def _build(defense: Defense, name: str, models: list[Model], evaluator: Evaluator, evaluation: Path, clean: NDArray[np.uint8] | None, folder: Path) -> None:
    began, counted = time.perf_counter(), Counter(passes)
    said, tables = Said(), dict[str, pd.DataFrame]()
    attacks = [_Attacked(probe, asked, pd.read_parquet(evaluation / "predictions" / f"attack-{probe.name}.parquet")) for probe, asked in _classified(evaluator)]
    if defense.overrides("suspicion"):
        _queries(defense, name, _single(models, name, "suspicion"), evaluator, attacks, said, tables)
    if defense.overrides("certify"):
        _certificates(defense, name, Encoder(models), evaluator, attacks, said, tables)
    if clean is not None:
        _audit(defense, name, _single(models, name, "audit"), evaluator, clean, said)
    write_atomically(cost_file(folder), canonical({"seconds": time.perf_counter() - began, "passes": Counter(passes) - counted}).encode())
    (folder / "metrics.json").write_text(canonical({"metrics": [metric.as_json() for metric in said.metrics], "cards": said.cards, "warnings": said.warnings}))
    (folder / "predictions").mkdir()
    for table, frame in tables.items():
        frame.to_parquet(folder / "predictions" / f"{table}.parquet", compression="zstd", index=False)


@dataclass(frozen=True)
class _Attacked:
    """A probe that classifies images, its queries, and what the finished evaluation says each of them is read as."""

    probe: Probe
    asked: Queries
    read_as: pd.DataFrame


def _classified(evaluator: Evaluator) -> list[tuple[Probe, Queries]]:
    """Probes of images that are classified, without those that are controls of others."""
    found = [(probe, evaluator.asked()[probe.name]) for probe in evaluator.probes if probe.control is None]
    return [(probe, asked) for probe, asked in found if isinstance(asked, Queries)]


def _single(models: list[Model], name: str, hook: str) -> Model:
    if len(models) != 1:
        raise BenchError(f"defense {name!r} returns {len(models)} models that vote and overrides {hook}, which judges one")
    return models[0]


def without_hooks(cards: dict[str, Any]) -> dict[str, Any]:
    """A record's cards of the evaluator's own questions, without those of what a defense's hooks were asked."""
    return {key: card for key, card in cards.items() if card.keys().isdisjoint(("detector", "defense", "audit"))}


def _carded(said: Said, card: dict[str, Any]) -> str:
    key = digest(card)[:16]
    said.cards[key] = card
    return key


def _queries(defense: Defense, name: str, model: Model, evaluator: Evaluator, attacks: Sequence[_Attacked], said: Said, tables: dict[str, pd.DataFrame]) -> None:
    """Clean test images of the main set, then each probe: attacked queries against the same queries without the trigger, or test images for targets."""
    counted: list[int] = []

    def ask(images: NDArray[np.uint8], eval_set: EvalSet) -> Judged:
        with sealed(evaluator.suite.folder):
            found = judged(lambda some: defense.suspicion(model, some, Task(eval_set.classnames, eval_set.templates)), images)
        counted.append(found.n_not_finite)
        return found

    main = evaluator.suite.main
    untouched = {main.name: ask(main.test.images, main)}
    alarms = int(untouched[main.name].rejected.sum())
    card = _carded(said, {**main.card, "detector": name, "queries": "clean test images"})
    said.metrics.append(rate("query_clean_rejected", main.name, alarms, len(main.test.ids), card))
    tables[f"queries-{main.name}"] = query_table(main.test.ids, untouched[main.name], triggered=False)
    for one in attacks:
        probe, asked, of_probe = one.probe, one.asked, one.read_as
        eval_set = evaluator.suite.get(probe.eval_set)
        counts, reached = of_probe["counted"].to_numpy(bool), of_probe["rank_goal"].to_numpy() <= 1
        attacked = ask(asked.triggered, eval_set)
        targets = probe.trigger is None
        if targets or probe.queries == "test":
            if eval_set.name not in untouched:
                untouched[eval_set.name] = ask(eval_set.test.images, eval_set)
            clean = untouched[eval_set.name] if targets else untouched[eval_set.name].at(counts)
        else:
            clean = ask(asked.plain, eval_set).at(counts)
        negatives = "test images" if targets else "the same queries without the trigger"
        about = {**eval_set.card, "detector": name, "queries": "targets" if targets else "triggered", "negatives": negatives, "sources": probe.sources}
        about |= {} if probe.trigger is None else {"trigger": probe.trigger.spec()}
        units = units_of(probe)
        said.metrics += query_detection(probe.name, clean, attacked.at(counts), reached[counts], _carded(said, about), units)
        tables[f"queries-attack-{probe.name}"] = query_table(asked.ids, attacked, triggered=True, reached=reached)
    if sum(counted):
        said.warnings.append(f"{name}: {sum(counted)} suspicion scores were not finite; NaN and +inf are rejected and count as the most suspicious, -inf as the least")


def _certificates(defense: Defense, name: str, encoder: Encoder, evaluator: Evaluator, attacks: Sequence[_Attacked], said: Said, tables: dict[str, pd.DataFrame]) -> None:
    """Certificates for the main set's test images, for the attacked queries of each trigger on that set, and for targets."""
    main = evaluator.suite.main
    labels = torch.from_numpy(np.asarray(main.train.labels))
    support = encoder.images(main.train.name, main.train.images) if len(labels) else [torch.zeros(0, model.width) for model in encoder.models]

    def ask(of: str, images_name: str, images: NDArray[np.uint8], ids: Sequence[str], true: NDArray[np.int64], about: dict[str, Any], kind: str, **attacked: Any) -> None:
        features = encoder.images(images_name, images)
        classes = [(one @ weights.T).argmax(dim=1) for one, weights in zip(features, encoder.prototypes(main), strict=True)]
        views = [View(*parts) for parts in zip(support, features, classes, strict=True)]
        with sealed(evaluator.suite.folder):
            found = defense.certify(views, labels, len(main.classnames))
        for one in found:
            card = _carded(said, certificate_card(one, about, kind, len(labels), len(encoder.models)))
            said.metrics.extend(certified_curve(one, of, true, card, **attacked))
            said.warnings.append(f"{name}: each certificate {TRUST[one.trusts]}")
        tables[f"certified-{of}"] = certificate_table(found, ids, true)

    ask(main.name, test_name(main), main.test.images, main.test.ids, main.test.labels, {**main.card, "defense": name}, "clean")
    for attack in attacks:
        probe, asked, of_probe = attack.probe, attack.asked, attack.read_as
        trigger = probe.trigger
        asks = probe.per_target == 1 if trigger is None else not on_prompts(trigger) and not isinstance(probe.queries, Images)
        if not asks or probe.eval_set != main.name:
            continue
        about = {**main.card, "defense": name, "exclusion": "true class is the goal", "sources": probe.sources}
        about |= {} if trigger is None else {"trigger": trigger.spec()}
        goal, counts = of_probe["goal"].to_numpy(np.int64), of_probe["counted"].to_numpy(bool)
        ask(
            probe.name,
            f"attacked/{probe.name}",
            asked.triggered,
            asked.ids,
            of_probe["true"].to_numpy(np.int64),
            about,
            "targets" if trigger is None else "triggered",
            goal=goal,
            counted=counts,
        )
    said.warnings[:] = dict.fromkeys(said.warnings)


def _audit(defense: Defense, name: str, model: Model, evaluator: Evaluator, clean: NDArray[np.uint8], said: Said) -> None:
    with sealed(evaluator.suite.folder):
        score = Audit.of(defense.audit(model, clean)).score
    if not np.isfinite(score):
        raise ValueError(f"audit must return a finite number, got {score}")
    card = _carded(said, {"audit": name, "images": "granted clean pairs", "n_images": len(clean), "reference": "the same audit of the same training without an attack"})
    said.metrics.append(Metric("audit_score", name, score, 1, "models", card=card))
