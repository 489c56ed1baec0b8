"""Measures a checkpoint of any origin as a run of ours is measured, and records it beside the runs."""

from __future__ import annotations

import re
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmark.evaluate.measure import Evaluator, read
from benchmark.external.request import Evaluation, checked
from benchmark.external.world import World, made_before, of_record, of_request
from benchmark.progress import Progress
from benchmark.record import finished, publish
from benchmark.request import parse_set
from benchmark.settings import SCHEMA, Scale, digest
from benchmark.stages import Stages
from benchmark.train.checkpoint_card import export_checkpoint
from benchmark.train.checkpoints import Ask, Loaded, load_checkpoint, load_pretrained
from benchmark.train.model import Colour

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Evaluated:
    """A finished evaluation: its run record."""

    record: dict[str, Any]


def evaluate_checkpoint(asked: Evaluation, progress: Progress) -> Evaluated:
    """The run record of a checkpoint, read if it is there, made otherwise.

    Raises:
        BenchError: a request that cannot be met, a checkpoint that does not load.
        PluginError: an exception in the attack's own code.
    """
    began = time.perf_counter()
    scale = checked(asked)
    device = torch.device(asked.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.set_num_threads(scale.train.threads)
    made = None if asked.record is None else made_before(asked.record, asked)
    loaded = _load(asked, scale, made.data.side if made is not None and made.data is not None else scale.data.side, device)
    progress.say(loaded.summary())
    for note in loaded.notes:
        progress.say(f"note: {note}")
    world = of_request(asked, loaded, progress) if made is None else of_record(made, asked, loaded, progress)
    stages = Stages(asked.request().cache_folder, progress.say)
    resolved = _resolved(asked, scale, loaded, world, device)
    run_id = digest(resolved)[:12]
    folder = asked.results / "runs" / run_id
    with stages.lock(folder):
        record = finished(folder)
        if record is None:
            evaluator = Evaluator(world.suite, world.probes, world.poison_key, stages)
            probe = None if scale.evaluation.linear_probe == "none" else scale.evaluation.linear_probe
            evaluation = evaluator.measure(lambda: [loaded.model], [loaded.model.identity()], loaded.model.precision, probe)
            record = _record(scale, loaded, world, resolved, evaluator, evaluation)
            publish(folder, record, evaluation, _cost(scale, device, time.perf_counter() - began))
    if asked.export is not None:
        export_checkpoint(loaded.model, asked.export, _about(loaded, world))
        progress.say(f"wrote {asked.export}")
    return Evaluated(record)


def _load(asked: Evaluation, scale: Scale, usual_side: int, device: torch.device) -> Loaded:
    given = [value for section, option, value in map(parse_set, asked.sets) if (section, option) == ("data", "side")]
    ask = Ask(
        model=asked.model,
        side=int(given[-1]) if given else None,
        usual_side=usual_side,
        context_length=scale.model.context_length,
        precision=asked.precision,
        mean=asked.mean,
        std=asked.std,
        writer=asked.writer,
        exponential=asked.exponential,
    )
    if asked.checkpoint is not None:
        return load_checkpoint(asked.checkpoint, device, ask)
    return load_pretrained(str(asked.pretrained), device, ask)


def _resolved(asked: Evaluation, scale: Scale, loaded: Loaded, world: World, device: torch.device) -> dict[str, Any]:
    """All that the result depends on, in the shape of a run's settings. What nobody knows of the training says so."""
    model = loaded.model
    options = {
        "weights": model.weights_sha256(),
        "dialect": loaded.dialect,
        "role": _role(loaded, world),
        "epoch": loaded.epoch,
        "precision": model.precision,
        "preprocessing": loaded.preprocessing.as_json(),
        "measured_with": world.poison["manifest_sha256"],
    }
    return {
        "schema": SCHEMA,
        "attack": world.attack.model_dump(mode="json"),
        "defense": {"name": _label(loaded), "options": options, "source": "", "file": False},
        "augmented": UNKNOWN,
        "scale": asked.scale,
        "seed": world.seed,
        "dataset": world.dataset,
        "data_hash": world.content,
        "suite_hash": world.suite.content,
        "data": world.data.model_dump(mode="json"),
        "train": UNKNOWN,
        "augment": UNKNOWN,
        "model": {"name": model.name, "context_length": model.tokenizer.context_length, "config": digest(model.config)[:16]},
        "evaluation": scale.evaluation.model_dump(mode="json"),
        "device": device.type,
        "sham": world.sham,
    }


def _record(scale: Scale, loaded: Loaded, world: World, resolved: dict[str, Any], evaluator: Evaluator, evaluation: Path) -> dict[str, Any]:
    metrics, collapsed = read(evaluation)
    warnings = [*world.warnings, *(f"{_label(loaded)}: {line}" for line in (*loaded.notes, *_provenance(loaded, world)))]
    if collapsed:
        warnings.append("the model has collapsed: all images look the same to it")
    not_run = {"asr_clean_model": "not part of a single run", "asr_sham": "a checkpoint is trained already"} if evaluator.probes and not world.sham else {}
    if scale.evaluation.linear_probe != "none":
        not_run |= evaluator.not_run()
    return {
        "schema": SCHEMA,
        "run_id": digest(resolved)[:12],
        "status": "done",
        "label": {
            "attack": world.attack_label,
            "defense": _label(loaded),
            "scale": world.scale_label,
            "dataset": world.dataset,
            "model": loaded.model.name,
        },
        "resolved": resolved,
        "told": "nothing",
        "clean_pairs_used": None,
        "data": {"name": world.dataset, "content": world.content, "suite": world.suite.content, "n_pairs": world.n_pairs, "counts": world.counts},
        "poison": world.poison,
        "checkpoint": {"name": loaded.name, "trained_on_this_poison": world.trained_here, "said": loaded.about},
        "cards": evaluator.cards(),
        "metrics": [metric.as_json() for metric in metrics],
        "collapsed": collapsed,
        "curve": [],
        "warnings": list(dict.fromkeys(warnings)),
        "not_run": not_run,
    }


def _provenance(loaded: Loaded, world: World) -> list[str]:
    """What a reader must know of the training, in one line."""
    if world.trained_here:
        return []
    if world.trained_here is None:
        poison = "; the columns on poison are of the attack it is measured with" if world.poison["n_poison"] else ""
        return [f"trained elsewhere; its pairs and its budget are not known{poison}"]
    return ["trained on other pairs than the attack it is measured with makes"]


def _role(loaded: Loaded, world: World) -> str:
    if loaded.training is None or not world.trained_here:
        return loaded.role
    if not world.poison["n_poison"]:
        return "clean"
    plain = loaded.training["defense"] == "Clip" and not loaded.training["augmented"]
    return "poisoned" if plain else "defended"


def _about(loaded: Loaded, world: World) -> dict[str, Any]:
    """What an exported checkpoint says of itself."""
    known = dict(loaded.about)
    manifest = world.poison["manifest_sha256"] if world.trained_here else known.pop("manifest_sha256", None)
    training = {} if loaded.training is None else {name: loaded.training[name] for name in ("defense", "options", "augmented", "train", "augment", "seed")}
    attack = {"attack": world.attack.model_dump(mode="json"), "attack_seed": world.seed} if world.trained_here else {}
    return {**known, **training, **attack, "role": _role(loaded, world), "manifest_sha256": manifest, "epoch": loaded.epoch, "dialect": loaded.dialect, "from": loaded.name}


def _label(loaded: Loaded) -> str:
    """What stands in the column of the defense."""
    name = re.sub(r"[^\w.-]", "_", loaded.name, flags=re.ASCII)[:60]
    prepared, model = loaded.preprocessing, loaded.model
    changed = [f"mean={_plain(prepared.mean)}", f"std={_plain(prepared.std)}"] if prepared.source == "given" else []
    changed += [f"precision={model.precision}"] if model.precision != "fp32" else []
    return f"checkpoint:{name}@{model.weights_sha256()[:8]}{'[' + ','.join(changed) + ']' if changed else ''}"


def _plain(colour: Colour) -> str:
    return " ".join(f"{part:g}" for part in colour)


def _cost(scale: Scale, device: torch.device, seconds: float) -> dict[str, Any]:
    return {
        "train_seconds": None,
        "pairs_trained": None,
        "n_models_trained": 0,
        "threads": scale.train.threads,
        "device": device.type,
        "wall_seconds_now": seconds,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
