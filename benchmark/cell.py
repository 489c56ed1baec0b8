"""One run, from pairs to a record: poison, pack, defend, evaluate, write down.

pairs -> attack.poison -> poisoned manifest + sealed record -> pack -> defense.defend(lab) -> evaluate -> record
"""

from __future__ import annotations

import contextlib
import errno
import json
import resource
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from benchmark.contract import Attack, Defense
from benchmark.curve import Pairs, SnapshotsGone, curve_of, forget_training, no_curve
from benchmark.data.eval_sets import Suite
from benchmark.data.pack import Pack, pack
from benchmark.data.pairs import Pairs as DataPairs
from benchmark.data.pairs import Source
from benchmark.data.poison import Poisoned, SealedRecord, attack_seconds, open_record, poison
from benchmark.data.tokens import Tokenizer
from benchmark.errors import BenchError, PluginError
from benchmark.evaluate import trained_pairs
from benchmark.evaluate.detection import detection, dropped_by_class, filtering, poison_among_neighbours, poisoned_rows
from benchmark.evaluate.hooks import Said, ask_hooks, check_hooks
from benchmark.evaluate.measure import Evaluator, check_probe, read
from benchmark.evaluate.metric import Metric
from benchmark.evaluate.pictures import keep_pictures
from benchmark.evaluate.visibility import visibility
from benchmark.guard import sealed
from benchmark.progress import Progress
from benchmark.record import about_poison, finished, poison_key, publish
from benchmark.registry import Plugin, configure, find
from benchmark.seeding import generator
from benchmark.settings import SCHEMA, RunSettings
from benchmark.stages import Stages, damage
from benchmark.surrogate import Surrogates
from benchmark.train import distributed
from benchmark.train.allocator import keep_freed_memory
from benchmark.train.lab import Granted, Lab, PairsView, Task, ToldLab
from benchmark.train.model import Model, tokenizer
from benchmark.train.synonyms import resolve


@dataclass
class Cell:
    """Everything one run needs, resolved: settings, plugins and opened data."""

    settings: RunSettings
    attack_plugin: Plugin
    attack: Attack
    defense_plugin: Plugin
    defense: Defense
    source: Source
    suite: Suite
    results: Path
    stages: Stages
    progress: Progress
    label: dict[str, str] = field(default_factory=dict)
    keep_snapshots: bool = False

    @property
    def folder(self) -> Path:
        """Where the run's record lies."""
        return self.results / "runs" / self.settings.run_id


def run_cell(cell: Cell) -> dict[str, Any]:
    """The record of the run, read if it is there, made otherwise.

    Raises:
        PluginError: an exception in the attack's or the defense's own code.
        BenchError: a request that cannot be met.
    """
    stages = replace(cell.stages, root=cell.results)
    record = distributed.from_first(lambda: _found(cell))
    if record is not None:
        return record
    with stages.lock(cell.folder) if distributed.leads() else contextlib.nullcontext():
        record = distributed.from_first(lambda: finished(cell.folder))
        return record if record is not None else _make(cell)


def _found(cell: Cell) -> dict[str, Any] | None:
    """The record if it is there and whole; a damaged one is named."""
    problem = damage(cell.folder) if cell.folder.is_dir() else None
    if problem is not None:
        cell.progress.say(f"record {cell.folder.name} is damaged ({problem}); making it again")
    return finished(cell.folder)


def _make(cell: Cell) -> dict[str, Any]:
    began = time.perf_counter()
    settings = cell.settings
    device = torch.device(settings.device)
    torch.set_num_threads(settings.train.threads)
    keep_freed_memory()
    check_hooks(cell.defense, cell.defense_plugin.name, cell.suite.main)
    attacked = poison_of(cell)
    poisoned = _unpoisoned(cell) if settings.clean_model else attacked
    evaluator = _evaluator(cell, attacked)
    tokens = tokenizer(settings.model)
    packed = pack(poisoned, cell.source, tokens, settings.train.eot, cell.stages, cell.progress)
    lab = _lab(cell, poisoned, packed, device)
    with lab.beside(), sealed(attacked.record, poisoned.record, cell.suite.folder):
        defended = plugin_code("defense", cell.defense_plugin, lambda: cell.defense.defend(lab))
    models = list(defended) if isinstance(defended, list) else [defended]
    if not models or not all(isinstance(model, Model) for model in models):
        raise PluginError(f"{cell.defense_plugin.name}.defend must return a model or a list of models, got {type(defended).__name__}")
    result = distributed.from_first(lambda: _measured(cell, attacked, poisoned, packed, lab, models, evaluator, began))
    return result if result is not None else _make(cell)


def _measured(cell: Cell, attacked: Poisoned, poisoned: Poisoned, packed: Pack, lab: Lab, models: list[Model], evaluator: Evaluator, began: float) -> dict[str, Any] | None:
    """The record of the run, written down; None if its training must be made again.

    Args:
        attacked: what the attack made, and asks for.
        poisoned: what was trained on: the same, or for a clean model the pairs before the attack.
    """
    settings = cell.settings
    record, kept = open_record(poisoned.record), open_record(attacked.record).kept
    probe = None if settings.evaluation.linear_probe == "none" else settings.evaluation.linear_probe
    weights = [model.identity() for model in models]
    evaluation = evaluator.measure(lambda: models, weights, settings.train.precision, probe)
    metrics, collapsed = read(evaluation)
    name, run = cell.defense_plugin.name, settings.run_id
    said = plugin_code(
        "defense", cell.defense_plugin, lambda: ask_hooks(cell.defense, name, models, evaluator, evaluation, lambda n: np.array(lab.clean_pairs(n).pairs.images), run)
    )
    try:
        curve = curve_of(cell, lab, evaluator, Pairs(cell, record, poisoned, packed)) if len(models) == 1 else no_curve(cell, lab)
    except SnapshotsGone as gone:
        # Another evaluation took them away and this one needs them: train again, from the same seed to the same weights.
        cell.progress.say("the snapshots of this training were removed after another evaluation; training it again")
        forget_training(cell, gone.folder)
        return None
    found, warned, rows = _row_metrics(cell, lab, record, poisoned, n_models=len(models))
    metrics += found
    lab.warnings += warned
    metrics += said.metrics
    if settings.augmented:
        metrics += visibility(kept, evaluator.probes, settings.data.side, settings.augment)
    about = about_poison(record) | {"targets": kept.get("targets", [])}
    result = _record(cell, record, about, packed, lab, metrics, curve, evaluator, collapsed, said)
    keep_pictures(cell.results, result, cell.source, cell.suite, poisoned, record, evaluator.probes, evaluator.asked)
    publish(cell.folder, result, evaluation, _cost(cell, lab, said, time.perf_counter() - began) | _attack_cost(cell, record, poisoned), said.predictions, rows)
    return result


def _evaluator(cell: Cell, attacked: Poisoned) -> Evaluator:
    """The evaluator with what the attack asks for, looked at before anything is trained.

    Raises:
        BenchError: a question that cannot be asked of these evaluation sets.
    """
    kept = open_record(attacked.record).kept
    probes = plugin_code("attack", cell.attack_plugin, lambda: cell.attack.probes(cell.suite, kept))
    for probe in probes:
        check_probe(probe, cell.suite)
    return Evaluator(cell.suite, probes, poison_key(attacked, cell.settings.sham), cell.stages)


def poison_of(cell: Cell) -> Poisoned:
    """The cell's poison, from the cache or made now.

    Raises:
        PluginError: an exception in the attack's own code.
        BenchError: an attack that cannot be carried out on these data.
    """
    settings = cell.settings
    surrogates = Surrogates(settings, cell.source, cell.suite, cell.stages, cell.progress)
    return plugin_code(  # type: ignore[no-any-return]
        "attack", cell.attack_plugin, lambda: poison(cell.attack_plugin, cell.attack, settings.seed, cell.source, cell.suite, settings.sham, cell.stages, surrogates)
    )


def _unpoisoned(cell: Cell) -> Poisoned:
    """The pairs as they were before the attack: those of attack `none`."""
    plugin = find("attack", "none")
    return poison(plugin, configure(plugin, {}, {}), cell.settings.seed, cell.source, cell.suite, False, cell.stages)


def _lab(cell: Cell, poisoned: Poisoned, packed: Pack, device: torch.device) -> Lab:
    settings, suite = cell.settings, cell.suite
    synonyms = resolve(settings.augment.synonyms, suite.synonyms) if settings.augmented and settings.augment.text == "eda" else ("none", None)
    task = Task(suite.main.classnames, suite.main.templates)
    clean = cell.source.clean
    tags = _class_tags(cell, clean)
    labels = None if tags is None else np.array([suite.main.classnames.index(tag) for tag in tags], dtype=np.int64)
    grant = partial(_grant, clean, labels, cell.source.name, cell.source.content, settings.seed)
    given = (packed, settings, tokenizer(settings.model), task, synonyms, grant, cell.stages, cell.progress, device)
    if cell.defense.told == "nothing":
        return Lab(*given)
    record = open_record(poisoned.record)
    rows = _poisoned_rows(record, poisoned)
    return ToldLab(*given, n_poison=record.n_poison, poisoned_rows=np.flatnonzero(rows).tolist() if cell.defense.told == "record" else None)


def _grant(clean: DataPairs, labels: NDArray[np.int64] | None, dataset: str, content: str, seed: int, n: int) -> Granted:
    """Clean pairs, with nothing at hand that leads to the attack or to what is measured: the lab holds this function."""
    if not len(clean):
        raise BenchError(f"the defense asks for {n} clean pairs and none are set apart in {dataset}; a defense that needs them cannot run on these data")
    if n > len(clean):
        raise BenchError(f"the defense asks for {n} clean pairs and {len(clean)} are set apart; lower what it asks for")
    rows = np.sort(generator("grant", seed).permutation(len(clean))[:n])
    view = PairsView(clean.images[rows], tuple(clean.captions[row] for row in rows))
    return Granted(view, f"{content}:{seed}:{n}", None if labels is None else labels[rows])


def _poisoned_rows(record: SealedRecord, poisoned: Poisoned) -> NDArray[np.bool_]:
    touched = set(record.rows["id"])
    return np.array([row_id in touched for row_id in poisoned.rows()[0]])


def _poisoned_images(record: SealedRecord, poisoned: Poisoned) -> NDArray[np.int64]:
    """Which image each poisoned row shows, as a number from 0; -1 for clean rows."""
    shown = dict(zip(record.rows["id"], record.rows["pixels_sha256_after"], strict=True))
    number = {pixels: index for index, pixels in enumerate(dict.fromkeys(shown.values()))}
    return np.array([number[shown[row_id]] if row_id in shown else -1 for row_id in poisoned.rows()[0]], dtype=np.int64)


def _row_metrics(cell: Cell, lab: Lab, record: SealedRecord, poisoned: Poisoned, n_models: int) -> tuple[list[Metric], list[str], pd.DataFrame | None]:
    """Detection of what the defense scored, and what it kept; models that vote have no one set of kept rows. Warnings, and where the poison stood."""
    rows, images = _poisoned_rows(record, poisoned), _poisoned_images(record, poisoned)
    metrics: list[Metric] = []
    warnings: list[str] = []
    for scores in lab.handed_in:
        metrics += detection(scores.name, scores.values, scores.flagged, rows, images)
        if scores.neighbourhood is not None:
            found, lines = poison_among_neighbours(scores.name, scores.neighbourhood.k, scores.neighbourhood.groups, rows)
            metrics, warnings = metrics + found, warnings + lines
    kept = lab.kept_rows if n_models == 1 else None
    if kept is not None:
        metrics += filtering(kept, rows) + dropped_by_class(kept, rows, _shown_classes(cell, poisoned))
    return metrics, warnings, poisoned_rows(lab.handed_in, kept, rows, images) if rows.any() and (lab.handed_in or kept is not None) else None


def _shown_classes(cell: Cell, poisoned: Poisoned) -> list[str | None] | None:
    """The main set's class that each row shows, None for rows of which that is not known; None for data without such tags."""
    tags = _class_tags(cell, cell.source.train)
    if tags is None:
        return None
    by_id = dict(zip(cell.source.train.ids, tags, strict=True))
    return [by_id.get(row_id) for row_id in poisoned.rows()[0]]


def _class_tags(cell: Cell, pairs: DataPairs) -> list[str] | None:
    """The main set's class that each of these pairs shows; None for data without such tags."""
    classes = set(cell.suite.main.classnames)
    return next((values for values in pairs.tags.values() if set(values) <= classes), None)


def _cut_triggers(record: SealedRecord, tokens: Tokenizer) -> list[str]:
    """A line for each text trigger that the context cuts off some of its captions."""
    lines = []
    for name, spec in record.header["triggers"].items():
        kind = str(spec.get("kind", ""))
        words = spec["text"]["words"] if kind == "both" else spec["words"] if kind.startswith("text:") else ""
        if not words or record.header["sham"]:
            continue
        texts = record.rows.loc[record.rows["trigger"] == name, "caption_after"].tolist()
        lost = sum(not tokens.keeps(text, words) for text in texts)
        if lost:
            lines.append(f"{lost} of {len(texts)} captions with the text trigger {words!r} lose it behind token {tokens.context_length}; their words are longer than the context")
    return lines


def _record(
    cell: Cell,
    record: SealedRecord,
    about: dict[str, Any],
    packed: Pack,
    lab: Lab,
    metrics: list[Metric],
    curve: list[dict[str, Any]],
    evaluator: Evaluator,
    collapsed: bool,
    said: Said,
) -> dict[str, Any]:
    warnings = [*cell.source.warnings, *cell.suite.warnings, *record.header["warnings"], *lab.warnings, *lab.logged, *said.warnings]
    warnings += _cut_triggers(record, tokenizer(cell.settings.model))
    if packed.n_long:
        warnings.append(f"{packed.n_long} captions are longer than the context and were cut")
    if collapsed:
        warnings.append("the model has collapsed: all images look the same to it")
    not_run = (
        {"asr_clean_model": "not part of a single run", "asr_sham": "run again with --sham"} if evaluator.probes and not (cell.settings.sham or cell.settings.clean_model) else {}
    )
    if cell.settings.evaluation.linear_probe != "none":
        not_run |= evaluator.not_run()
    not_run |= trained_pairs.not_run([point.get("metrics", {}) for point in curve])
    return {
        "schema": SCHEMA,
        "run_id": cell.settings.run_id,
        "status": "done",
        "label": cell.label,
        "resolved": cell.settings.as_json(),
        "told": cell.defense.told,
        "clean_pairs_used": lab.clean_pairs_used,
        "data": {"name": cell.source.name, "content": cell.source.content, "suite": cell.suite.content, "n_pairs": len(packed), "counts": cell.source.counts},
        "poison": about,
        "cards": evaluator.cards() | said.cards,
        "metrics": [metric.as_json() for metric in metrics],
        "collapsed": collapsed,
        "curve": curve,
        "warnings": list(dict.fromkeys(warnings)),
        "not_run": not_run,
    }


def _cost(cell: Cell, lab: Lab, said: Said, seconds: float) -> dict[str, Any]:
    """What the defender spent. Passes through a tower are those of trainings, beside them, and of the hooks; None if a training did not count."""
    costs = lab.costs
    counted = [one.get("passes") for one in costs]
    passes: Counter[str] | None = None if None in counted else sum(map(Counter, [*counted, lab.passes_beside, said.cost.get("passes", {})]), Counter())
    return {
        "train_seconds": sum(one["seconds"] for one in costs),
        "beside_seconds": None if lab.seconds_beside is None else lab.seconds_beside + said.cost.get("seconds", 0.0),
        "passes": passes,
        "pairs_trained": sum(one["pairs_trained"] for one in costs),
        "n_models_trained": len(costs),
        "threads": cell.settings.train.threads,
        "processes": cell.settings.processes,
        "device": cell.settings.device,
        "wall_seconds_now": seconds,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _attack_cost(cell: Cell, record: SealedRecord, poisoned: Poisoned) -> dict[str, Any]:
    """What the attacker spent: on making the poison, and on training a model of its own for that. None: not known any more."""
    cost: dict[str, Any] = {"attack_seconds": attack_seconds(poisoned)}
    surrogate = record.header.get("surrogate")
    if surrogate is not None:
        file = cell.stages.root / "train" / str(surrogate.get("training")) / "cost.json"
        seconds = json.loads(file.read_text())["seconds"] if file.is_file() else None
        cost |= {"surrogate_seconds": seconds if surrogate["pairs_trained"] else 0.0, "surrogate_pairs_trained": surrogate["pairs_trained"]}
    return cost


def plugin_code(kind: str, plugin: Plugin, call: Any) -> Any:
    """Runs a plugin's code; its own exceptions come back as one PluginError with the traceback from its first frame."""
    try:
        return call()
    except (BenchError, PluginError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise  # of the disk, and no fault of the plugin
        frames = traceback.extract_tb(sys.exc_info()[2])
        first = next((index for index, frame in enumerate(frames) if frame.filename == str(plugin.file)), 0)
        lines = "".join(traceback.format_list(frames[first:])) + f"{type(error).__name__}: {error}"
        raise PluginError(f"{kind} {plugin.name} failed:\n{lines}") from error
