"""Measures a checkpoint of any origin as a run of ours is measured, and records it beside the runs."""

from __future__ import annotations

import json
import re
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from benchmark.cell import Cell, about_poison, finished, plugin_code, poison_key, publish
from benchmark.contract import Attack, Images, Probe
from benchmark.data.eval_names import known_name
from benchmark.data.eval_sets import Suite, open_suite
from benchmark.data.pack import pack
from benchmark.data.poison import SealedRecord, open_record, poison
from benchmark.data.reading import Reading, check_reading
from benchmark.data.source import WORLD
from benchmark.errors import BenchError
from benchmark.evaluate.measure import Evaluator, read
from benchmark.matrix import SECTIONS, Request, label_of, open_cell, parse_set, plan, plugin_settings, scale_label, scale_of
from benchmark.progress import Progress
from benchmark.registry import Plugin, configure, find
from benchmark.settings import SCALES, SCHEMA, DataSettings, ModelSettings, PluginSettings, Scale, digest
from benchmark.stages import Stages, file_sha256
from benchmark.train.checkpoints import Ask, Loaded, Writer, export_checkpoint, load_checkpoint, load_pretrained
from benchmark.train.model import Colour, tokenizer

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Evaluation:
    """What the user asks for.

    Attributes:
        checkpoint: a file or folder of weights; `pretrained` names cached ones of open_clip instead.
        model: an architecture's name or a configuration file; not needed for what this program wrote.
        attack: whose poison and trigger to measure with; None for no attack.
        record: the sealed record of a poison made before, in place of making it.
        sets: options of `attack.`, `data.`, `evaluation.`, and `model.context_length`, `train.threads`.
        export: a new folder that the checkpoint is written to in this program's own form.
    """

    checkpoint: Path | None = None
    pretrained: str | None = None
    model: str | None = None
    attack: str | None = None
    record: Path | None = None
    seed: int | None = None
    scale: str = "small"
    sets: tuple[str, ...] = ()
    data: Path | None = None
    eval: tuple[str, ...] = ()
    eval_root: Path | None = None
    templates: str = "set"
    image_root: Path | None = None
    reading: Reading = field(default_factory=Reading)
    precision: str | None = None
    mean: Colour | None = None
    std: Colour | None = None
    writer: Writer = "auto"
    exponential: bool = False
    sham: bool = False
    export: Path | None = None
    results: Path = Path("results")
    cache: Path | None = None
    device: str | None = None

    def request(self, sets: Sequence[str] | None = None) -> Request:
        """The part that a run asks for in the same words; the defense is a stand-in that nothing trains."""
        return Request(
            attacks=(self.attack or "none",),
            defenses=("clip",),
            seeds=(self.seed or 0,),
            scale=self.scale,
            sets=self.sets if sets is None else tuple(sets),
            data=self.data,
            eval=self.eval,
            eval_root=self.eval_root,
            templates=self.templates,
            image_root=self.image_root,
            reading=self.reading,
            results=self.results,
            cache=self.cache,
            baseline=False,
            sham=self.sham,
            device=self.device,
        )


@dataclass(frozen=True)
class Evaluated:
    """A finished evaluation: its run record."""

    record: dict[str, Any]


@dataclass(frozen=True)
class _World:
    """What the checkpoint is measured on: an attack's probes, if there is an attack, and evaluation sets.

    Attributes:
        poison: what the record says of it.
        trained_here: whether the checkpoint was trained on this very poison; None where nobody can tell.
    """

    suite: Suite
    probes: Sequence[Probe]
    attack: PluginSettings
    attack_label: str
    seed: int
    sham: bool
    scale_label: str
    dataset: str
    content: str
    data: DataSettings
    n_pairs: int
    counts: dict[str, int]
    poison: dict[str, Any]
    poison_key: str
    warnings: tuple[str, ...]
    trained_here: bool | None = None


def evaluate_checkpoint(asked: Evaluation, progress: Progress) -> Evaluated:
    """The run record of a checkpoint, read if it is there, made otherwise.

    Raises:
        BenchError: a request that cannot be met, a checkpoint that does not load.
        PluginError: an exception in the attack's own code.
    """
    began = time.perf_counter()
    scale = _checked(asked)
    device = torch.device(asked.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.set_num_threads(scale.train.threads)
    made = None if asked.record is None else _made(asked.record, asked)
    loaded = _load(asked, scale, made.data.side if made is not None and made.data is not None else scale.data.side, device)
    progress.say(loaded.summary())
    for note in loaded.notes:
        progress.say(f"note: {note}")
    world = _world(asked, loaded, progress) if made is None else _recorded(made, asked, loaded, progress)
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


def _checked(asked: Evaluation) -> Scale:
    """The scale with the request's changes.

    Raises:
        BenchError: options that do not go together.
    """
    if (asked.checkpoint is None) == (asked.pretrained is None):
        raise BenchError("give one of --checkpoint FILE and --pretrained TAG")
    if asked.export is not None and asked.export.exists():
        raise BenchError(f"{asked.export} exists; name another folder for the checkpoint")
    attack = () if asked.attack is None else ("attack", Path(asked.attack).stem)
    for section, option, _ in map(parse_set, asked.sets):
        if (section, option) == ("model", "name"):
            raise BenchError("--set model.name: use --model here")
        if section not in ("data", "evaluation", *attack) and (section, option) not in (("model", "context_length"), ("train", "threads")):
            why = "there is no --attack" if section == "attack" else "a checkpoint is trained already" if section in ("defense", *SECTIONS) else "there is no such section"
            raise BenchError(f"--set {section}.{option}: {why}; --set takes attack, data, evaluation, model.context_length and train.threads here")
    if asked.record is not None:
        for option, given in (("--data", asked.data is not None), ("--sham", asked.sham), ("--seed", asked.seed is not None)):
            if given:
                raise BenchError(f"{option} and --record do not go together: the record says what was poisoned, and how")
    check_reading(asked.reading, asked.data is not None)
    for one in asked.eval:
        known_name(one)
    return scale_of(asked.request())


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


def _world(asked: Evaluation, loaded: Loaded, progress: Progress) -> _World:
    """The world at the model's image side."""
    side = loaded.preprocessing.side
    sets = asked.sets if scale_of(asked.request()).data.side == side else (*asked.sets, f"data.side={side}")
    if asked.eval and asked.data is None:
        if asked.attack not in (None, "none"):
            raise BenchError(f"--attack {asked.attack} with --eval needs --data, the pairs that it poisons, or --record, a poison made before")
        return _without_pairs(asked, sets, progress)
    cell: Cell = open_cell(plan(asked.request(sets))[0], progress)
    settings = cell.settings
    poisoned = plugin_code("attack", cell.attack_plugin, lambda: poison(cell.attack_plugin, cell.attack, settings.seed, cell.source, cell.suite, asked.sham, cell.stages))
    record = open_record(poisoned.record)
    if loaded.training is None:
        trained_here = _same_manifest(loaded, record)
    else:
        packed = pack(poisoned, cell.source, tokenizer(ModelSettings(**loaded.training["model"])), loaded.training["train"]["eot"], cell.stages, progress)
        trained_here = str(loaded.training["rows"]).partition(":")[0] == packed.content
    return _World(
        suite=cell.suite,
        probes=plugin_code("attack", cell.attack_plugin, lambda: cell.attack.probes(cell.suite, record.kept)),
        attack=settings.attack,
        attack_label=cell.label["attack"],
        seed=settings.seed,
        sham=asked.sham,
        scale_label=_scale_label(asked, sets),
        dataset=cell.source.name,
        content=cell.source.content,
        data=settings.data,
        n_pairs=record.header["n_rows"],
        counts=cell.source.counts,
        poison=about_poison(record),
        poison_key=poison_key(poisoned, asked.sham),
        warnings=(*cell.source.warnings, *cell.suite.warnings, *record.header["warnings"]),
        trained_here=trained_here,
    )


def _without_pairs(asked: Evaluation, sets: Sequence[str], progress: Progress) -> _World:
    """Evaluation sets alone: no attack, and no pairs."""
    settings = scale_of(asked.request(sets)).data
    suite = _suite(asked, settings, progress)
    plugin = find("attack", "none")
    return _World(
        suite=suite,
        probes=(),
        attack=plugin_settings(plugin, configure(plugin, {}, {})),
        attack_label=plugin.name,
        seed=asked.seed or 0,
        sham=False,
        scale_label=_scale_label(asked, sets),
        dataset="none",
        content="none",
        data=settings,
        n_pairs=0,
        counts={},
        poison={"n_requested": 0, "n_poison": 0, "poison_rate": 0.0, "edit_mode": "none", "manifest_sha256": None, "triggers": {}, "targets": []},
        poison_key="none",
        warnings=suite.warnings,
    )


@dataclass(frozen=True)
class _Made:
    """A poison made before: its sealed record, and what is written beside it of the data.

    Attributes:
        data: settings of the data; None where nothing beside the record says them.
        asked: the request, with the evaluation sets that the poison was made with unless the user names others.
    """

    folder: Path
    record: SealedRecord
    scale: str
    sets: tuple[str, ...]
    data: DataSettings | None
    dataset: str
    asked: Evaluation


def _made(given: Path, asked: Evaluation) -> _Made:
    """The poison whose sealed record lies in this folder, or in its `poisoned.record`."""
    folder = given if (given / "record.json").is_file() else given / "poisoned.record"
    if not (folder / "record.json").is_file():
        raise BenchError(f"no poison record at {given}; expected a folder poisoned.record with record.json")
    try:
        record = open_record(folder)
        header = record.header
        about_poison(record), header["attack"], dict(header["options"]), int(header["attack_seed"]), header["source"], header["sham"], header["warnings"], int(header["n_rows"])
        schema = int(header["schema"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BenchError(f"{folder} is no poison record: {type(error).__name__}: {error}") from None
    if schema > SCHEMA:
        raise BenchError(f"{folder} has schema {schema}, this version reads up to {SCHEMA}; install a newer one")
    beside = folder / "request.json"
    if not beside.is_file():
        return _Made(folder, record, asked.scale, _measuring(asked.sets), None, "recorded" if asked.eval else WORLD, asked)
    try:
        request = json.loads(beside.read_text())
        data = DataSettings(**request["data_settings"])
        scale, sets, dataset = str(request["scale"]), [str(one) for one in request["sets"] if parse_set(one)[0] == "data"], str(request["source"]["name"])
        if scale not in SCALES:
            raise ValueError(f"scale {scale!r}")
        if not asked.eval and request["eval"]:
            root = asked.eval_root or (Path(request["eval_root"]) if request.get("eval_root") else None)
            templates = str(request["templates"]) if asked.templates == "set" else asked.templates
            asked = replace(asked, eval=tuple(map(str, request["eval"])), eval_root=root, templates=templates)
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        raise BenchError(f"{beside} cannot be read: {type(error).__name__}: {error}") from None
    chosen = [one for one in asked.sets if parse_set(one)[0] == "evaluation"]
    return _Made(folder, record, scale, (*sets, *chosen), data, dataset, asked)


def _recorded(made: _Made, asked: Evaluation, loaded: Loaded, progress: Progress) -> _World:
    """The world of a poison made before: nothing but its sealed record is read."""
    folder, record, header = made.folder, made.record, made.record.header
    plugin, attack = _attack_of(asked, str(header["attack"]), header["options"])
    data = made.data or scale_of(asked.request()).data.model_copy(update={"side": loaded.preprocessing.side})
    _same_side(folder, data.side, loaded)
    suite = _suite(made.asked, data, progress)
    for target in record.kept.get("targets", []):
        if suite.get(target["eval_set"]).index(target["class"]) != target["index"]:
            raise BenchError(f"{folder}: class {target['class']!r} has another number in evaluation set {target['eval_set']!r} than when the poison was made; give the same --eval")
    probes = plugin_code("attack", plugin, lambda: attack.probes(suite, record.kept))
    for probe in probes:
        if isinstance(probe.queries, Images):
            _same_side(folder, probe.queries.images.shape[1], loaded)
    return _World(
        suite=suite,
        probes=probes,
        attack=plugin_settings(plugin, attack),
        attack_label=label_of(plugin, attack, SCALES[made.scale], ""),
        seed=int(header["attack_seed"]),
        sham=bool(header["sham"]),
        scale_label=scale_label(Request(scale=made.scale, sets=made.sets, sham=bool(header["sham"]))),
        dataset=made.dataset,
        content=str(header["source"]),
        data=data,
        n_pairs=int(header["n_rows"]),
        counts={},
        poison=about_poison(record),
        poison_key=digest({"record": {path.name: file_sha256(path) for path in sorted([folder / "record.json", *folder.glob("*.npy")])}}),
        warnings=(*suite.warnings, *header["warnings"]),
        trained_here=_same_manifest(loaded, record),
    )


def _same_manifest(loaded: Loaded, record: SealedRecord) -> bool | None:
    """Whether a checkpoint says that it was trained on the manifest of this record; None if it does not say."""
    said = loaded.about.get("manifest_sha256")
    return None if said is None else bool(said == record.header["poisoned_manifest_sha256"])


def _same_side(folder: Path, side: int, loaded: Loaded) -> None:
    wanted = loaded.preprocessing.side
    if side != wanted:
        raise BenchError(f"the poison in {folder} was made for images of {side} px, and the model takes {wanted} px; make it again with --set data.side={wanted}")


def _scale_label(asked: Evaluation, sets: Sequence[str]) -> str:
    """The scale of the data and of the measuring; a checkpoint's own budget is not part of it."""
    return scale_label(Request(scale=asked.scale, sets=_measuring(sets), sham=asked.sham))


def _measuring(sets: Sequence[str]) -> tuple[str, ...]:
    return tuple(one for one in sets if parse_set(one)[0] in ("data", "evaluation"))


def _attack_of(asked: Evaluation, name: str, options: Mapping[str, Any]) -> tuple[Plugin, Attack]:
    """The attack that a record names, with the options it was made with."""
    sections = ("attack", name, *([Path(asked.attack).stem] if asked.attack else []))
    if any(parse_set(one)[0] in sections for one in asked.sets):
        raise BenchError("--set attack.* and --record do not go together: the record holds the attack's options")
    if asked.attack is None and (name.endswith(".py") or "/" in name):
        raise BenchError(f"the record names an attack by its file, {name!r}; a file is run only if you give it with --attack")
    try:
        plugin = find("attack", asked.attack or name)
    except BenchError as error:
        raise BenchError(f"{error} The record was made with attack {name!r}; if that is a file of yours, give it with --attack") from None
    if plugin.name != name:
        raise BenchError(f"the record was made with attack {name!r}, and --attack says {plugin.name!r}; leave --attack out")
    attack: Attack = configure(plugin, {}, dict(options))
    return plugin, attack


def _suite(asked: Evaluation, settings: DataSettings, progress: Progress) -> Suite:
    return open_suite(settings, asked.eval, Stages(asked.request().cache_folder, progress.say), progress, asked.eval_root, asked.templates)


def _resolved(asked: Evaluation, scale: Scale, loaded: Loaded, world: _World, device: torch.device) -> dict[str, Any]:
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


def _record(scale: Scale, loaded: Loaded, world: _World, resolved: dict[str, Any], evaluator: Evaluator, evaluation: Path) -> dict[str, Any]:
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


def _provenance(loaded: Loaded, world: _World) -> list[str]:
    """What a reader must know of the training, in one line."""
    if world.trained_here:
        return []
    if world.trained_here is None:
        poison = "; the columns on poison are of the attack it is measured with" if world.poison["n_poison"] else ""
        return [f"trained elsewhere; its pairs and its budget are not known{poison}"]
    return ["trained on other pairs than the attack it is measured with makes"]


def _role(loaded: Loaded, world: _World) -> str:
    if loaded.training is None or not world.trained_here:
        return loaded.role
    if not world.poison["n_poison"]:
        return "clean"
    plain = loaded.training["defense"] == "Clip" and not loaded.training["augmented"]
    return "poisoned" if plain else "defended"


def _about(loaded: Loaded, world: _World) -> dict[str, Any]:
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
