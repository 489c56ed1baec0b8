"""Where a grid stands: what is done, running, failed and to do, what is cached, and how long the rest takes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from benchmark.errors import BenchError
from benchmark.matrix import Resolved, labels_of, resolve, side_by_side
from benchmark.progress import silent
from benchmark.registry import Plugin, find, with_defaults
from benchmark.request import Asked, Request, absolute, scale_of
from benchmark.settings import RunSettings, digest
from benchmark.stages import Stages, write_atomically

Where = Literal["done", "running", "failed", "to do"]
Costs = dict[tuple[str, str, int, int], list[float]]

# Rough, from one core of the machine described in results/performance.md, for cells of which no kin is recorded.
_SECONDS_PER_PAIR = {"bench-small": 1 / 800, "RN50": 1 / 4, "RN50-quickgelu": 1 / 4}
_SECONDS_BESIDE = 5  # loading, poisoning, evaluation
_HOW = ("attacks", "defenses", "seeds", "results", "cache", "jobs", "baseline", "keep_snapshots", "keep", "device", "reading")


@dataclass(frozen=True)
class State:
    """One cell of a grid.

    Attributes:
        name: its labels and seed, for people.
        why: the reason of a failure, or what is cached of a cell that is to do.
        seconds: how long it takes, roughly; 0 for a finished one.
    """

    asked: Asked
    name: str
    where: Where
    run_id: str | None = None
    why: str = ""
    seconds: float = 0.0


def cell_key(asked: Asked) -> str:
    """A name for what a cell asks for, known before its data are opened and equal on all machines that share the folders."""
    asked = absolute(asked)
    request = {field.name: getattr(asked.request, field.name) for field in fields(Request) if field.name not in _HOW}
    facts = {**asdict(replace(asked, request=Request())), "request": request}
    return digest(json.loads(json.dumps(facts, default=str)))[:16]


@contextlib.contextmanager
def noted(asked: Asked) -> Iterator[None]:
    """While a cell runs, holds a lock that the kernel frees when the process dies: `bench status` looks at it."""
    path = _note(asked.request.results, "running", asked)
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):  # who needs the folder says so itself
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = held.enter_context(open(path, "w+"))  # NFS wants a file that can be read for this lock, and written for that below
            fcntl.flock(handle, fcntl.LOCK_SH)
            handle.write(json.dumps({"cell": asked.name, "process": os.getpid()}))
            handle.flush()
        yield
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def note_failure(asked: Asked, error: str | None) -> None:
    """Leaves the reason of a failed cell in `<results>/failed`; without a reason, takes an older one away."""
    path = _note(asked.request.results, "failed", asked)
    with contextlib.suppress(OSError):
        if error is None:
            path.unlink(missing_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps({"cell": asked.name, "attack": asked.attack, "defense": asked.defense, "seed": asked.seed, "error": error}).encode())


def states(cells: Sequence[Asked]) -> list[State]:
    """Where each cell stands, from records and notes on disk; no data is opened.

    A record counts if its settings are the cell's. Whether the data have changed since shows only when they are read.
    """
    if not cells:
        return []
    own = cells[0].request.results / "runs"
    folders = [*dict.fromkeys(asked.request.keep / "runs" for asked in cells if asked.request.keep), own]
    known = cache(find)
    settings = {folder: _recorded(folder, known) for folder in folders}
    recorded = {_settings_key(one): run_id for folder in folders for run_id, one in settings[folder].items()}
    costs = _costs(own, settings[own])
    return [_state(asked, resolve(asked, find=known), recorded, costs) for asked in cells]


def _state(asked: Asked, one: Resolved, recorded: Mapping[str, str], costs: Costs) -> State:
    name = " ".join(labels_of(asked, one)[kind] for kind in ("attack", "defense", "scale")) + f" seed {asked.seed}"
    run_id = recorded.get(_settings_key(one.settings))
    if run_id is not None:
        return State(asked, name, "done", run_id)
    seconds = _seconds(asked, costs)
    if _held(_note(asked.request.results, "running", asked)):
        return State(asked, name, "running", seconds=seconds)
    failed = _read(_note(asked.request.results, "failed", asked))
    if failed:
        return State(asked, name, "failed", why=str(failed.get("error", "")), seconds=seconds)
    return State(asked, name, "to do", seconds=seconds)


def cached_parts(asked: Asked) -> str:
    """Which stages before the training are there, as a phrase; nothing is made, decoded or drawn."""
    from benchmark.data.pack import pack
    from benchmark.data.poison import poison
    from benchmark.matrix import open_cell
    from benchmark.surrogate import Surrogates
    from benchmark.train.model import tokenizer

    there: list[str] = []
    stages = _Looking(asked.request.cache_folder)
    try:
        cell = open_cell(asked, silent(), stages)
        there.append("data")
        surrogates = Surrogates(cell.settings, cell.source, cell.suite, stages, silent())
        poisoned = poison(cell.attack_plugin, cell.attack, asked.seed, cell.source, cell.suite, cell.settings.sham, stages, surrogates)
        there.append("poison")
        pack(poisoned, cell.source, tokenizer(cell.settings.model), cell.settings.train.eot, stages, silent())
        there.append("packed pairs")
    except _NotMade:
        pass
    return ", ".join(there)


class _NotMade(Exception):
    """A stage that somebody asked for is not there."""


class _Looking(Stages):
    """Stages that are found or not; nothing is made."""

    def make(self, kind: str, facts: Any, build: Any, resume: bool = False) -> Path:
        found = self.open(kind, facts)
        if found is None:
            raise _NotMade(kind)
        return found


def preview(cells: Sequence[Asked], look: bool) -> tuple[list[str], float]:
    """A line for each cell and one of totals, and a rough number of hours that the missing ones take here.

    Args:
        look: also say which stages of the missing ones are cached.
    """
    found = states(cells)
    todo = [state for state in found if state.where != "done"]
    jobs = _jobs(cells, len(todo))
    looked: dict[str, str] = {}
    hours = sum(state.seconds for state in todo) / jobs / 3600
    lines = []
    for state in found:
        facts = f" {state.run_id}" if state.run_id else ""
        if look and state.where != "done":
            key = _poison_key(state.asked)
            parts = looked[key] if key in looked else looked.setdefault(key, cached_parts(state.asked))
            facts = f", about {_minutes(state.seconds)}" + (f"; cached: {parts}" if parts else "; nothing cached")
        lines.append(f"{state.name}: {state.where}{facts}")
    if cells:
        lines.append(f"{len(cells)} cells, {len(todo)} to do, about {_minutes(hours * 3600)} with {jobs} side by side; {_disk([state.asked for state in todo], cells[0].request)}")
        if hours > 2:
            lines.insert(0, f"about {hours:.1f} hours of work on this machine")
    return lines, hours


def report(cells: Sequence[Asked], results: Path) -> list[str]:
    """`bench status` of a grid, or of whatever a results folder holds if there are no cells."""
    if not cells:
        return _report_folder(results)
    found = states(cells)
    count = {where: sum(state.where == where for state in found) for where in ("done", "running", "failed", "to do")}
    jobs = _jobs(cells, len(cells))
    left = sum(state.seconds for state in found if state.where in ("running", "failed", "to do")) / jobs
    lines = [", ".join(f"{n} {where}" for where, n in count.items()) + f" of {len(cells)} cells; about {_minutes(left)} left with {jobs} side by side"]
    for where in ("running", "failed", "to do"):
        lines += [f"{where}: {state.name}{f': {_first_line(state.why)}' if state.why else ''}" for state in found if state.where == where]
    return lines


def _report_folder(results: Path) -> list[str]:
    if not results.is_dir():
        raise BenchError(f"no folder {results}; `bench run` makes one, and --results names another")
    running = [note for path in sorted((results / "running").glob("*.json")) if _held(path) for note in [_read(path)] if note]
    failed = [note for path in sorted((results / "failed").glob("*.json")) for note in [_read(path)] if note]
    done = sum(1 for path in (results / "runs").glob("*/record.json") if path.parent.suffix != ".part")
    lines = [f"{done} done, {len(running)} running, {len(failed)} failed in {results}"]
    lines += [f"running: {note['cell']} (process {note['process']})" for note in running]
    return lines + [f"failed: {note['cell']}: {_first_line(note['error'])}" for note in failed]


def _first_line(text: str) -> str:
    """The sentence of an error; of a traceback, its last line."""
    lines = text.strip().splitlines() or [""]
    return lines[0] if len(lines) == 1 or not lines[0].endswith("failed:") else f"{lines[0]} {lines[-1]}"


def _note(results: Path, kind: str, asked: Asked) -> Path:
    return results / kind / f"{cell_key(asked)}.json"


def _held(path: Path) -> bool:
    """Whether a living process holds the note's lock."""
    try:
        with open(path, "r+") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found


def _recorded(folder: Path, find: Callable[[Any, str], Plugin]) -> dict[str, RunSettings]:
    """Settings of the finished runs in a folder, by run id; options that have come since are set to their defaults."""
    found = {}
    for path in sorted(folder.glob("*/record.json")):
        record = _read(path)
        if record is None or path.parent.suffix == ".part" or not path.with_name("done.json").is_file():
            continue
        try:
            today = with_defaults(record["resolved"], lambda kind, one: None if one["file"] else find(kind, one["name"]))
            found[path.parent.name] = RunSettings(**today)
        except (KeyError, TypeError, ValidationError):
            continue
    return found


def _settings_key(settings: RunSettings) -> str:
    """A name for the settings without hashes of data, and without code of the attack, which a kept record may outlive."""
    values = settings.as_json()
    return digest({**values, "data_hash": "", "suite_hash": "", "attack": {**values["attack"], "source": ""}})


def _seconds(asked: Asked, costs: Costs) -> float:
    """What cells like this one took on this machine, else a rough guess."""
    scale, bare = scale_of(asked.request), Path(asked.defense.removesuffix("+aug")).stem
    measured = costs.get((asked.request.scale, bare, scale.train.epochs, scale.data.n_pairs))
    if measured:
        return statistics.median(measured)
    side = (scale.data.side / 32) ** 2 if scale.model.name == "bench-small" else 1
    return _SECONDS_PER_PAIR.get(scale.model.name, 0.2) * scale.data.n_pairs * scale.train.epochs * side + _SECONDS_BESIDE


def _costs(folder: Path, recorded: Mapping[str, RunSettings]) -> Costs:
    found: Costs = {}
    for run_id, settings in recorded.items():
        cost = _read(folder / run_id / "cost.json") or {}
        seconds = max(float(cost.get("train_seconds") or 0), float(cost.get("wall_seconds_now") or 0))
        found.setdefault((settings.scale, settings.defense.name, settings.train.epochs, settings.data.n_pairs), []).append(seconds)
    return found


def _jobs(cells: Sequence[Asked], most: int) -> int:
    return max(1, min(side_by_side(cells[0]) if cells else 1, most))


def _disk(cells: Sequence[Asked], request: Request) -> str:
    sizes = {}
    for asked in cells:
        data = scale_of(asked.request).data
        sizes[_poison_key(asked)] = data.n_pairs * data.side**2 * 3 / 1e6
    folder = next((one for one in (request.results, *request.results.absolute().parents) if one.is_dir()), Path())
    free = shutil.disk_usage(folder).free / 1e6
    text = f"about {sum(sizes.values()):,.0f} MB of cache for {len(sizes)} poisoned data sets, {free / 1e3:,.0f} GB free"
    return text + (": not enough" if sum(sizes.values()) > free else "")


def _poison_key(asked: Asked) -> str:
    """A name for the poisoned data set of a cell; cells that differ in the defense share it."""
    scale = scale_of(asked.request)
    return f"{asked.attack} {json.dumps(asked.attack_options, sort_keys=True)} {asked.seed} {asked.request.sham} {asked.request.clean_model} {scale.data} {scale.model} {scale.train.eot}"


def _minutes(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
