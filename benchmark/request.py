"""What a user asks for -> checked cells with their options and labels; nothing is opened."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from benchmark.data.eval_names import known_name
from benchmark.data.reading import Reading, check_reading
from benchmark.errors import BenchError, nearest, unknown
from benchmark.registry import Plugin, configure, find, names
from benchmark.settings import SCALES, AugmentSettings, DataSettings, EvaluationSettings, ModelSettings, PackSettings, PluginSettings, Scale, TrainSettings

SECTIONS: dict[str, type[BaseModel]] = {"data": DataSettings, "train": TrainSettings, "augment": AugmentSettings, "model": ModelSettings, "evaluation": EvaluationSettings}


# Sections that change how a run is carried out and nothing of its result.
MEANS: dict[str, type[BaseModel]] = {"pack": PackSettings}


@dataclass(frozen=True)
class Request:
    """What the user asks for.

    Attributes:
        sets: options as `section.option=value`; the section is attack, defense, a plugin's name or one of SECTIONS.
        baseline: run `clip` beside every defense, and `clip+aug` beside those that end in `+aug`.
        eval: evaluation sets, as folders or names of known ones; the main one first. Empty: the drawn world's.
        eval_root: where the data of named sets lie.
        templates: prompts of all evaluation sets: `set` (their own), `openai`, or a file.
        reading: how `data` is read.
        sham: the attack's edits are made without its trigger.
        clean_model: train on the pairs as they were before the attack, and measure what the attack asks for.
        keep: a folder that finished records are copied to and found in (committed reference tables).
    """

    attacks: tuple[str, ...] = ("backdoor",)
    defenses: tuple[str, ...] = ("roclip",)
    seeds: tuple[int, ...] = (0,)
    scale: str = "small"
    sets: tuple[str, ...] = ()
    data: Path | None = None
    eval: tuple[str, ...] = ()
    eval_root: Path | None = None
    templates: str = "set"
    image_root: Path | None = None
    reading: Reading = field(default_factory=Reading)
    results: Path = Path("results")
    cache: Path | None = None
    jobs: int | None = None
    baseline: bool = True
    keep_snapshots: bool = False
    sham: bool = False
    clean_model: bool = False
    device: str | None = None
    keep: Path | None = None

    @property
    def cache_folder(self) -> Path:
        """Where stages live."""
        return self.cache or self.results / "cache"


@dataclass(frozen=True)
class Asked:
    """One cell, checked but not opened: names, options and scale settings are known to be good."""

    attack: str
    defense: str
    seed: int
    request: Request
    attack_options: dict[str, Any] = field(default_factory=dict)
    defense_options: dict[str, Any] = field(default_factory=dict)

    @property
    def augmented(self) -> bool:
        """Whether the defense's name ends in `+aug`."""
        return self.defense.endswith("+aug")

    @property
    def name(self) -> str:
        """Short, for progress lines."""
        return f"{Path(self.attack).stem} {Path(self.defense.removesuffix('+aug')).stem}{'+aug' if self.augmented else ''} seed {self.seed}"


def plan(request: Request) -> list[Asked]:
    """The cells of a request, baselines first. Imports no plugin and no torch.

    Raises:
        BenchError: unknown names, options, scales or values.
    """
    scale_of(request)
    check_reading(request.reading, request.data is not None)
    if request.data is not None and not request.eval:
        raise BenchError("--data needs --eval: a folder with train/<class>/ and test/<class>/ images to measure on, or the name of a known set such as cifar10")
    if request.eval and request.data is None:
        raise BenchError("--eval needs --data: the drawn world brings its own evaluation sets")
    if request.templates != "set" and not request.eval:
        raise BenchError("--templates needs --eval: the drawn world's evaluation sets have prompts of their own")
    for one in request.eval:
        known_name(one)
    if request.scale == "paper" and request.data is None and not any(one.startswith("data.n_pairs=") for one in request.sets):
        raise BenchError("scale 'paper' trains on your own pairs: give --data and --eval, or name a number of drawn ones with --set data.n_pairs=N")
    attacks = _expand("attack", request.attacks)
    if request.clean_model and request.sham:
        raise BenchError("--sham and --clean-model do not go together: one trains on edits without the trigger, the other on none")
    if request.sham and "none" in attacks:
        raise BenchError("--sham leaves out the trigger of an attack, and attack none has none; leave --sham or that attack out")
    if request.clean_model and "none" in attacks:
        raise BenchError("--clean-model measures what an attack asks for, and attack none asks for nothing; leave --clean-model or that attack out")
    defenses = _expand("defense", request.defenses)
    if request.baseline:
        wanted = ["clip"] + (["clip+aug"] if any(name.endswith("+aug") for name in defenses) else [])
        defenses = [*(name for name in wanted if name not in defenses), *defenses]
    options = _plugin_options(request.sets, {"attack": attacks, "defense": defenses})
    return [
        Asked(attack, defense, seed, request, options["attack"].get(attack, {}), options["defense"].get(bare(defense), {}))
        for attack in attacks
        for seed in request.seeds
        for defense in defenses
    ]


def scale_of(request: Request) -> Scale:
    """The scale with the request's changes to its sections."""
    if request.scale not in SCALES:
        raise unknown("scale", request.scale, SCALES)
    scale = SCALES[request.scale]
    changes: dict[str, dict[str, Any]] = {}
    sections = SECTIONS | MEANS
    for section, option, value in map(parse_set, request.sets):
        if section in sections:
            if option not in sections[section].model_fields:
                guess = nearest(option, sections[section].model_fields)
                raise BenchError(
                    f"unknown option {section}.{option}.{f' Did you mean {guess!r}?' if guess else ''} Options of {section}: {', '.join(sorted(sections[section].model_fields))}."
                )
            changes.setdefault(section, {})[option] = value
    try:
        for section, means in MEANS.items():
            means(**changes.pop(section, {}))
        changed = {section: SECTIONS[section](**{**getattr(scale, section).model_dump(), **values}) for section, values in changes.items()}
    except ValidationError as error:
        problem = error.errors()[0]
        section = next(name for name, model in sections.items() if model.__name__ == error.title)
        if not problem["loc"]:  # of options together
            raise BenchError(f"{section}: {problem['msg'].removeprefix('Value error, ')}") from None
        raise BenchError(f"{section}.{problem['loc'][0]}: {problem['msg'][0].lower()}{problem['msg'][1:]}, got {problem['input']!r}") from None
    return scale.model_copy(update=changed)


def absolute(asked: Asked) -> Asked:
    """The cell with all its paths made absolute."""
    request = asked.request
    paths = {name: value.absolute() for name in ("results", "cache", "keep", "data", "image_root", "eval_root") for value in [getattr(request, name)] if value is not None}
    sets = tuple(str(Path(one).absolute()) if Path(one).exists() else one for one in request.eval)
    templates = str(Path(request.templates).absolute()) if Path(request.templates).is_file() else request.templates
    return replace(asked, request=replace(request, eval=sets, templates=templates, **paths))


def pack_settings(request: Request) -> PackSettings:
    """How packing is carried out."""
    return PackSettings(**{option: value for section, option, value in map(parse_set, request.sets) if section == "pack"})


def _expand(kind: Any, given: Sequence[str]) -> list[str]:
    found: list[str] = []
    for name in given:
        plain = bare(name) if kind == "defense" else name
        if plain == "all":
            chosen = [plugin + ("+aug" if name.endswith("+aug") else "") for plugin in names(kind) if find(kind, plugin).load().default]
        else:
            find(kind, plain)
            chosen = [name]
        found += [one for one in chosen if one not in found]
    return found


def bare(defense: str) -> str:
    """The defense's name without `+aug`."""
    return defense.removesuffix("+aug")


def parse_set(text: str) -> tuple[str, str, Any]:
    """Section, option and value of `section.option=value`."""
    left, equals, value = text.partition("=")
    section, dot, option = left.strip().partition(".")
    if not equals or not dot:
        raise BenchError(f"expected --set section.option=value, got {text!r}; for instance --set attack.rate=0.001")
    try:
        return section, option, json.loads(value)
    except ValueError:
        return section, option, value


def takes(text: str, request: Request) -> bool:
    """Whether the option of `--set text` has somewhere to go in a request: any plugin it names, or the scale."""
    section, option, _ = parse_set(text)
    asked = {"attack": _expand("attack", request.attacks), "defense": _expand("defense", request.defenses)}
    if section in asked:
        return bool(_fitting(section, option, asked))
    return section in SECTIONS or section in MEANS or section in _by_name(asked)


def _by_name(asked: dict[str, list[str]]) -> dict[str, tuple[str, str]]:
    return {Path(bare(name)).stem: (kind, bare(name)) for kind, plugins in asked.items() for name in plugins}


def _fitting(section: str, option: str, asked: dict[str, list[str]]) -> list[str]:
    plugins = dict.fromkeys(map(bare, asked[section]))
    return [name for name in plugins if option in find(section, name).load().model_fields]  # type: ignore[arg-type]


def _plugin_options(sets: Sequence[str], asked: dict[str, list[str]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Options by kind and plugin; `attack.` and `defense.` reach every asked plugin that has the option."""
    options: dict[str, dict[str, dict[str, Any]]] = {"attack": {}, "defense": {}}
    by_name = _by_name(asked)
    for section, option, value in map(parse_set, sets):
        if section in SECTIONS or section in MEANS:
            continue
        if section in ("attack", "defense"):
            fitting = _fitting(section, option, asked)
            if not fitting:
                configure(find(section, bare(asked[section][-1])), {}, {option: value})  # type: ignore[arg-type]
            if section == "attack" and option == "rate" and value == 0:
                raise BenchError("attack.rate is 0, which is no attack: use --attack none")
            for name in fitting:
                options[section].setdefault(name, {})[option] = value
        elif section in by_name:
            kind, name = by_name[section]
            options[kind].setdefault(name, {})[option] = value
        else:
            raise unknown("section", section, ["attack", "defense", *SECTIONS, *MEANS, *by_name])
    for kind, of_kind in options.items():
        for name, values in of_kind.items():
            configure(find(kind, name), {}, values)  # type: ignore[arg-type]
    return options


def plugin_settings(plugin: Plugin, instance: Any) -> PluginSettings:
    """What a run id and a record keep of a plugin."""
    return PluginSettings(name=plugin.name, options=instance.model_dump(mode="json"), source=plugin.source, file=plugin.by_path)


def label_of(plugin: Plugin, instance: Any, scale: Scale, suffix: str) -> str:
    """The plugin's name with what differs from the scale's defaults."""
    usual = configure(plugin, scale.options.get(plugin.name, {}), {}).model_dump(mode="json")
    changed = {name: value for name, value in instance.model_dump(mode="json").items() if value != usual[name]}
    inside = ",".join(f"{name}={value}" for name, value in sorted(changed.items()))
    source = f"@{plugin.source[:6]}" if plugin.by_path else ""
    return f"{plugin.name}{source}{suffix}{f'[{inside}]' if inside else ''}"


def scale_label(request: Request) -> str:
    """The scale's name with what the request changes of it."""
    changed = sorted(one for one in request.sets if parse_set(one)[0] in SECTIONS)
    return request.scale + (f"[{','.join(changed)}]" if changed else "") + ("+sham" if request.sham else "") + ("+clean" if request.clean_model else "")
