"""Cells -> records, one after another or side by side."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context, parent_process
from typing import TYPE_CHECKING, Any

from benchmark.errors import BenchError, PluginError
from benchmark.progress import Progress, shown
from benchmark.registry import Plugin, configure, find
from benchmark.request import Asked, bare, label_of, pack_settings, plugin_settings, scale_label, scale_of
from benchmark.settings import RunSettings
from benchmark.stages import Stages

if TYPE_CHECKING:
    from benchmark.cluster import Cluster


@dataclass(frozen=True)
class Outcome:
    """What came of a cell: a record, or the reason why there is none."""

    asked: Asked
    record: dict[str, Any] | None
    error: str | None = None
    bad_request: bool = False


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
    from benchmark.train.synonyms import stamped

    request, scale = asked.request, scale_of(asked.request)
    words = {"synonyms": stamped(scale.augment.synonyms)} if asked.augmented and scale.augment.text == "eda" else {}
    attack_plugin, defense_plugin = find("attack", asked.attack), find("defense", bare(asked.defense))
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
        augment=scale.augment.model_copy(update=words),
        model=scale.model,
        evaluation=scale.evaluation,
        device=request.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        sham=request.sham,
        clean_model=request.clean_model,
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
    source = open_source(scale.data, request.data, request.image_root, stages, progress, request.reading, pack_settings(request).codec)
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


def run_all(cells: Sequence[Asked], progress: Progress, cluster: Cluster | None = None) -> list[Outcome]:
    """Every cell's outcome, in order. A failed cell does not stop the others; Ctrl-C leaves all stages as they are."""
    if not cells:
        return []
    if cluster is not None:
        from benchmark.cluster import run_on_ray

        return run_on_ray(cells, cluster, progress)
    jobs = min(side_by_side(cells[0]), len(cells))
    if jobs == 1 or several_processes():
        return [run_one(asked, progress) for asked in cells]
    # Data that all cells share is made before they start, so that no worker waits for another's drawing. What is wrong with
    # them, each cell says for itself.
    with contextlib.suppress(BenchError, OSError):
        open_cell(cells[0], progress)
    return _run_pool(cells, jobs, progress)


def side_by_side(asked: Asked) -> int:
    """How many cells like this one run at once on this machine, unless the request says it: what its cores hold, and on a GPU four small models or one large."""
    import torch

    if asked.request.jobs:
        return asked.request.jobs
    scale = scale_of(asked.request)
    cores = max(1, (os.cpu_count() or 1) // scale.train.threads)
    on_gpu = (asked.request.device or ("cuda" if torch.cuda.is_available() else "cpu")) == "cuda"
    return min(cores, 4 if scale.model.name == "bench-small" else 1) if on_gpu else cores


def several_processes() -> bool:
    """Whether torchrun started this process beside others, which train together."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def run_one(asked: Asked, progress: Progress, stages: Stages | None = None, noted_as: Asked | None = None) -> Outcome:
    """The outcome of one cell, run in this process; a failure leaves its reason on disk.

    Where several processes train together, a failure is raised as well: they stay in step, or end.

    Args:
        stages: replaces the request's cache.
        noted_as: the cell as it was asked for, where plugins have another path here.
    """
    from benchmark.status import note_failure, noted
    from benchmark.train import distributed

    noted_as = noted_as or asked
    with noted(noted_as):
        try:
            outcome = _run_one(asked, progress, stages)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            outcome = Outcome(asked, None, f"no room left on the disk of {asked.request.cache_folder}; free some, and the same command continues from here")
    if distributed.leads():
        note_failure(noted_as, outcome.error)
    if outcome.error is not None and distributed.size() > 1:
        raise (BenchError if outcome.bad_request else PluginError)(outcome.error)
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
                with replace(cell.stages, root=cell.results).lock(cell.folder):
                    keep(cell.folder, kept / cell.settings.run_id)
        return Outcome(asked, record)
    except BenchError as error:
        return Outcome(asked, None, str(error), True)
    except PluginError as error:
        return Outcome(asked, None, str(error))
    except Exception as error:
        if distributed.size() > 1 or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)):
            raise
        return Outcome(asked, None, f"the run failed:\n{traceback.format_exc().strip()}")


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
