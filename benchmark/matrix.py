"""Attacks x defenses x seeds -> cells -> records, one after another or side by side."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from benchmark.data.eval_names import known_name
from benchmark.data.reading import Reading, check_reading
from benchmark.errors import BenchError, PluginError, nearest, unknown
from benchmark.progress import Progress, shown
from benchmark.registry import Plugin, configure, find, names
from benchmark.settings import SCALES, AugmentSettings, DataSettings, EvaluationSettings, ModelSettings, PackSettings, PluginSettings, RunSettings, Scale, TrainSettings
from benchmark.stages import Stages

if TYPE_CHECKING:
    from benchmark.cluster import Cluster

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


@dataclass(frozen=True)
class Outcome:
    """What came of a cell: a record, or the reason why there is none."""

    asked: Asked
    record: dict[str, Any] | None
    error: str | None = None
    bad_request: bool = False


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
    defenses = _expand("defense", request.defenses)
    if request.baseline:
        wanted = ["clip"] + (["clip+aug"] if any(name.endswith("+aug") for name in defenses) else [])
        defenses = [*(name for name in wanted if name not in defenses), *defenses]
    options = _plugin_options(request.sets, {"attack": attacks, "defense": defenses})
    return [
        Asked(attack, defense, seed, request, options["attack"].get(attack, {}), options["defense"].get(_bare(defense), {}))
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
        raise BenchError(f"{section}.{problem['loc'][0]}: {problem['msg'][0].lower()}{problem['msg'][1:]}, got {problem['input']!r}") from None
    return scale.model_copy(update=changed)


@dataclass(frozen=True)
class Resolved:
    """A cell with every option filled in."""

    settings: RunSettings
    attack_plugin: Plugin
    attack: Any
    defense_plugin: Plugin
    defense: Any


def resolve(asked: Asked, dataset: str | None = None, data_hash: str = "", suite_hash: str = "", find: Callable[[Any, str], Plugin] = find) -> Resolved:
    """Settings and plugins of a cell; the data need not be opened, and then their hashes are empty.

    Args:
        find: looks plugins up.
    """
    import torch

    from benchmark.data.reader import name_of
    from benchmark.data.source import WORLD
    from benchmark.train import distributed

    request, scale = asked.request, scale_of(asked.request)
    attack_plugin, defense_plugin = find("attack", asked.attack), find("defense", _bare(asked.defense))
    attack = configure(attack_plugin, scale.options.get(attack_plugin.name, {}), asked.attack_options)
    defense = configure(defense_plugin, scale.options.get(defense_plugin.name, {}), asked.defense_options)
    settings = RunSettings(
        attack=plugin_settings(attack_plugin, attack),
        defense=plugin_settings(defense_plugin, defense),
        augmented=asked.augmented,
        scale=request.scale,
        seed=asked.seed,
        dataset=dataset or (name_of(request.data) if request.data is not None else WORLD),
        data_hash=data_hash,
        suite_hash=suite_hash,
        data=scale.data,
        train=scale.train,
        augment=scale.augment,
        model=scale.model,
        evaluation=scale.evaluation,
        device=request.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        sham=request.sham,
        processes=distributed.size(),
    )
    return Resolved(settings, attack_plugin, attack, defense_plugin, defense)


def open_cell(asked: Asked, progress: Progress, stages: Stages | None = None) -> Any:
    """The cell with its data opened and every option filled in; `stages` replaces the request's cache."""
    from benchmark.cell import Cell
    from benchmark.data.eval_sets import open_suite
    from benchmark.data.source import open_source
    from benchmark.train import distributed

    request, scale = asked.request, scale_of(asked.request)
    stages = stages or distributed.SharedStages(request.cache_folder, progress.say)
    source = open_source(scale.data, request.data, request.image_root, stages, progress, request.reading, _means(request).codec)
    suite = open_suite(scale.data, request.eval, stages, progress, request.eval_root, request.templates)
    one = resolve(asked, source.name, source.content, suite.content)
    return Cell(
        one.settings,
        one.attack_plugin,
        one.attack,
        one.defense_plugin,
        one.defense,
        source,
        suite,
        request.results,
        stages,
        progress,
        labels_of(asked, one),
        request.keep_snapshots,
    )


def labels_of(asked: Asked, one: Resolved) -> dict[str, str]:
    """What tables call a cell."""
    scale = scale_of(asked.request)
    return {
        "attack": label_of(one.attack_plugin, one.attack, scale, ""),
        "defense": label_of(one.defense_plugin, one.defense, scale, "+aug" if asked.augmented else ""),
        "scale": scale_label(asked.request),
        "dataset": one.settings.dataset,
        "model": scale.model.name,
    }


def _means(request: Request) -> PackSettings:
    return PackSettings(**{option: value for section, option, value in map(parse_set, request.sets) if section == "pack"})


def run_all(cells: Sequence[Asked], progress: Progress, cluster: Cluster | None = None) -> list[Outcome]:
    """Every cell's outcome, in order. A failed cell does not stop the others; Ctrl-C leaves all stages as they are."""
    if not cells:
        return []
    if cluster is not None:
        from benchmark.cluster import run_on_ray

        return run_on_ray(cells, cluster, progress)
    jobs = min(cells[0].request.jobs or os.cpu_count() or 1, len(cells))
    # Data that all cells share is made before they start, so that no worker waits for another's drawing.
    try:
        open_cell(cells[0], progress)
    except BenchError as error:
        if len(cells) == 1:
            return [Outcome(cells[0], None, str(error), True)]
    if jobs == 1 or several_processes():
        return [run_one(asked, progress) for asked in cells]
    return _run_pool(cells, jobs, progress)


def several_processes() -> bool:
    """Whether torchrun started this process beside others, which train together."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def run_one(asked: Asked, progress: Progress, stages: Stages | None = None, noted_as: Asked | None = None) -> Outcome:
    """The outcome of one cell, run in this process; a failure leaves its reason on disk.

    Args:
        stages: replaces the request's cache.
        noted_as: the cell as it was asked for, where plugins have another path here.
    """
    from benchmark.status import note_failure, noted

    noted_as = noted_as or asked
    with noted(noted_as):
        try:
            outcome = _run_one(asked, progress, stages)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            outcome = Outcome(asked, None, f"no room left on the disk of {asked.request.cache_folder}; free some, and the same command continues from here")
    note_failure(noted_as, outcome.error)
    return outcome


def _run_one(asked: Asked, progress: Progress, stages: Stages | None) -> Outcome:
    from benchmark.cell import run_cell
    from benchmark.kept import find_kept, keep
    from benchmark.train import distributed

    try:
        cell = open_cell(asked, replace(progress, label=asked.name), stages)
        kept = asked.request.keep / "runs" if asked.request.keep else None
        record = distributed.from_first(lambda: find_kept(cell, kept) if kept else None)
        if record is None:
            record = run_cell(cell)
            if kept and distributed.leads():
                keep(cell.folder, kept / cell.settings.run_id)
        return Outcome(asked, record)
    except BenchError as error:
        if distributed.size() > 1:
            raise  # the processes of one training stay in step, or end
        return Outcome(asked, None, str(error), True)
    except PluginError as error:
        if distributed.size() > 1:
            raise
        return Outcome(asked, None, str(error))


def _run_pool(cells: Sequence[Asked], jobs: int, progress: Progress) -> list[Outcome]:
    context = get_context("spawn")
    if progress.console.is_terminal and not progress.quiet:
        queue = context.Queue()
        with shown(queue, progress.console):
            return _work(cells, jobs, context, replace(progress, queue=queue))
    return _work(cells, jobs, context, progress)


def _work(cells: Sequence[Asked], jobs: int, context: Any, progress: Progress) -> list[Outcome]:
    """Outcomes of all cells. A worker that is killed takes its pool with it; unfinished cells start again in a new one."""
    from benchmark.status import note_failure

    outcomes: dict[int, Outcome] = {}
    without_progress = 0
    while len(outcomes) < len(cells):
        before = len(outcomes)
        error = _work_in_one_pool(cells, outcomes, jobs, context, progress)
        without_progress = without_progress + 1 if len(outcomes) == before else 0
        if error is not None and without_progress < _POOLS:
            progress.say("a worker process was killed; starting the unfinished cells again")
            continue
        for index in [index for index in range(len(cells)) if index not in outcomes]:
            outcomes[index] = Outcome(cells[index], None, f"the worker process ended: {error}")
            note_failure(cells[index], outcomes[index].error)
    return [outcomes[index] for index in range(len(cells))]


_POOLS = 3


def _work_in_one_pool(cells: Sequence[Asked], outcomes: dict[int, Outcome], jobs: int, context: Any, progress: Progress) -> BrokenProcessPool | None:
    """Adds the outcomes of unfinished cells, until all have one or a worker is killed; returns the pool's error then."""
    from benchmark.status import note_failure

    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker, initargs=(progress.queue,))
    try:
        futures = {pool.submit(_run_in_worker, asked, progress.quiet): index for index, asked in enumerate(cells) if index not in outcomes}
        waiting = set(futures)
        broken: BrokenProcessPool | None = None
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                index, error = futures[future], future.exception()
                if isinstance(error, BrokenProcessPool):
                    broken = error
                    continue
                outcomes[index] = future.result() if error is None else Outcome(cells[index], None, f"the worker process ended: {error}")
                if error is not None:
                    note_failure(cells[index], outcomes[index].error)
                state = "failed" if outcomes[index].record is None else "done"
                progress.say(f"{len(outcomes)}/{len(cells)} {cells[index].name}: {state}")
    except BaseException:
        workers = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.terminate()
        raise
    pool.shutdown()
    return broken


_queue: Any = None


def _start_worker(queue: Any) -> None:
    """Ctrl-C is the parent's to handle; bars go to the parent if it shows any, plain lines to stderr otherwise.

    A worker ends with its parent, however that ends: nobody would ask for its result, and a second start of the same
    command would wait for it.
    """
    global _queue
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _queue = queue
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run_in_worker(asked: Asked, quiet: bool) -> Outcome:
    from rich.console import Console

    return run_one(asked, Progress(Console(stderr=True, highlight=False, force_terminal=False), quiet=quiet, queue=_queue))


def _expand(kind: Any, given: Sequence[str]) -> list[str]:
    found: list[str] = []
    for name in given:
        bare = _bare(name) if kind == "defense" else name
        if bare == "all":
            chosen = [plugin + ("+aug" if name.endswith("+aug") else "") for plugin in names(kind) if find(kind, plugin).load().default]
        else:
            find(kind, bare)
            chosen = [name]
        found += [one for one in chosen if one not in found]
    return found


def _bare(defense: str) -> str:
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
    return {Path(_bare(name)).stem: (kind, _bare(name)) for kind, plugins in asked.items() for name in plugins}


def _fitting(section: str, option: str, asked: dict[str, list[str]]) -> list[str]:
    plugins = dict.fromkeys(map(_bare, asked[section]))
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
                configure(find(section, _bare(asked[section][-1])), {}, {option: value})  # type: ignore[arg-type]
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
    return request.scale + (f"[{','.join(changed)}]" if changed else "") + ("+sham" if request.sham else "")
