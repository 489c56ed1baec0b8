"""What a checkpoint is measured on: evaluation sets, and an attack's probes from its options or from a sealed record."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from benchmark.cell import Cell, plugin_code, poison_of
from benchmark.contract import Attack, Images, Probe
from benchmark.data.eval_sets import Suite, open_suite
from benchmark.data.pack import pack
from benchmark.data.poison import SealedRecord, open_record
from benchmark.data.source import WORLD
from benchmark.errors import BenchError
from benchmark.external.request import Evaluation
from benchmark.matrix import open_cell
from benchmark.progress import Progress
from benchmark.record import about_poison, poison_key
from benchmark.registry import Plugin, configure, find
from benchmark.request import Request, label_of, parse_set, plan, plugin_settings, scale_label, scale_of
from benchmark.settings import SCALES, SCHEMA, DataSettings, ModelSettings, PluginSettings, digest
from benchmark.stages import Stages, file_sha256
from benchmark.train.checkpoints import Loaded
from benchmark.train.model import tokenizer


@dataclass(frozen=True)
class World:
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


def of_request(asked: Evaluation, loaded: Loaded, progress: Progress) -> World:
    """The world at the model's image side."""
    side = loaded.preprocessing.side
    sets = asked.sets if scale_of(asked.request()).data.side == side else (*asked.sets, f"data.side={side}")
    if asked.eval and asked.data is None:
        if asked.attack not in (None, "none"):
            raise BenchError(f"--attack {asked.attack} with --eval needs --data, the pairs that it poisons, or --record, a poison made before")
        return _without_pairs(asked, sets, progress)
    cell: Cell = open_cell(plan(asked.request(sets))[0], progress)
    settings = cell.settings
    poisoned = poison_of(cell)
    record = open_record(poisoned.record)
    if loaded.training is None:
        trained_here = _same_manifest(loaded, record)
    else:
        packed = pack(poisoned, cell.source, tokenizer(ModelSettings(**loaded.training["model"])), loaded.training["train"]["eot"], cell.stages, progress)
        trained_here = str(loaded.training["rows"]).partition(":")[0] == packed.content
    return World(
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


def _without_pairs(asked: Evaluation, sets: Sequence[str], progress: Progress) -> World:
    """Evaluation sets alone: no attack, and no pairs."""
    settings = scale_of(asked.request(sets)).data
    suite = _suite(asked, settings, progress)
    plugin = find("attack", "none")
    return World(
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
class Made:
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


def made_before(given: Path, asked: Evaluation) -> Made:
    """The poison whose sealed record lies in this folder, or in its `poisoned.record`."""
    folder = given if (given / "record.json").is_file() else given / "poisoned.record"
    if not (folder / "record.json").is_file():
        raise BenchError(f"no poison record at {given}; expected a folder poisoned.record with record.json")
    try:
        record = open_record(folder)
        header = record.header
        about_poison(record), header["attack"], dict(header["options"]), int(header["attack_seed"]), header["source"], header["sham"], header["warnings"], int(header["n_rows"])
        schema = int(header["schema"])
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise BenchError(f"{folder} is no poison record: {type(error).__name__}: {error}") from None
    if schema > SCHEMA:
        raise BenchError(f"{folder} has schema {schema}, this version reads up to {SCHEMA}; install a newer one")
    beside = folder / "request.json"
    if not beside.is_file():
        return Made(folder, record, asked.scale, _measuring(asked.sets), None, "recorded" if asked.eval else WORLD, asked)
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
    return Made(folder, record, scale, (*sets, *chosen), data, dataset, asked)


def of_record(made: Made, asked: Evaluation, loaded: Loaded, progress: Progress) -> World:
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
        for items in (probe.queries, probe.gallery, probe.floor):
            if isinstance(items, Images):
                _same_side(folder, items.images.shape[1], loaded)
    return World(
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
        poison_key=digest({"code": plugin.source, "record": {path.name: file_sha256(path) for path in sorted([folder / "record.json", *folder.glob("*.npy")])}}),
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
