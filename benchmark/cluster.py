"""The cells of a matrix on an existing Ray cluster: Ray decides where each runs; here is what they share.

All nodes see the results and cache folders, which every cell checks by a token. A stage is granted to one cell at a time by
an actor; a cell that would have to wait gives its place back and is started again when the stage is there. A cell whose
worker dies is started again, on whatever node is left, and continues after its last whole epoch.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sys
import tempfile
import uuid
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmark.errors import BenchError
from benchmark.matrix import Outcome, run_one
from benchmark.progress import Progress, silent
from benchmark.registry import find, source_files, source_hash
from benchmark.request import Asked, absolute, scale_of
from benchmark.stages import write_atomically
from benchmark.status import note_failure
from benchmark.train.distributed import SharedStages

_ATTEMPTS = 4
_ASK_AGAIN = 5.0  # seconds between looks at what has been freed


@dataclass(frozen=True)
class Cluster:
    """A running Ray cluster.

    Attributes:
        address: as `ray start --head` prints it; None for the one that this machine belongs to.
        gpus: GPUs of one cell, a fraction where several share one; None for a quarter of one for small models.
    """

    address: str | None = None
    gpus: float | None = None


@dataclass(frozen=True)
class Carried:
    """A plugin's file and the `_` modules beside it, on their way to a node; or a known plugin by name, with its hash."""

    name: str
    files: dict[str, bytes]
    source: str


class MustWait(BaseException):
    """Another cell makes the stage that this one needs. No error, so no plugin may catch it."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


class Keys:
    """Grants each stage to one cell at a time; runs as an actor."""

    def __init__(self) -> None:
        self.holders: dict[str, str] = {}

    def ask(self, key: str, holder: str) -> bool:
        """Whether the stage is now this cell's to make."""
        return self.holders.setdefault(key, holder) == holder

    def free(self, key: str, holder: str) -> None:
        """Gives a stage back."""
        if self.holders.get(key) == holder:
            del self.holders[key]

    def forget(self, holder: str) -> None:
        """Frees all that a cell held which has ended, however it did."""
        self.holders = {key: other for key, other in self.holders.items() if other != holder}

    def held(self) -> set[str]:
        """The stages that are being made."""
        return set(self.holders)


@dataclass(frozen=True)
class ClusterStages(SharedStages):
    """Stages whose locks hold on all nodes: the actor's grant first, then this machine's lock."""

    keys: Any = None
    holder: str = ""

    @contextlib.contextmanager
    def lock(self, folder: Path) -> Iterator[None]:
        """Holds the stage's lock.

        Raises:
            MustWait: another cell has it.
        """
        import ray

        key = str(folder)
        if not ray.get(self.keys.ask.remote(key, self.holder)):
            raise MustWait(key)
        try:
            with super().lock(folder):
                yield
        finally:
            ray.get(self.keys.free.remote(key, self.holder))


def run_on_ray(cells: Sequence[Asked], cluster: Cluster, progress: Progress) -> list[Outcome]:
    """Every cell's outcome, in order.

    Raises:
        BenchError: Ray is not installed, or there is no cluster at this address.
    """
    ray = _ray()
    _check_address(cluster.address)
    try:
        ray.init(address=cluster.address or "auto", log_to_driver=False, logging_level="ERROR", ignore_reinit_error=True)
    except (ConnectionError, ValueError, RuntimeError) as error:
        where = f"at {cluster.address}" if cluster.address else "that this machine belongs to"
        raise BenchError(f"no Ray cluster {where} ({str(error).splitlines()[0]}); `ray start --head` starts one, and --address names another") from None
    try:
        return _drive(ray, cells, cluster, progress)
    finally:
        ray.shutdown()


def _drive(ray: Any, cells: Sequence[Asked], cluster: Cluster, progress: Progress) -> list[Outcome]:
    device = cells[0].request.device or ("cuda" if ray.cluster_resources().get("GPU") else "cpu")
    token = uuid.uuid4().hex
    keys = _keys(ray)
    run = ray.remote(max_retries=0)(_run_cell)
    asked = [absolute(replace(cell, request=replace(cell.request, device=device))) for cell in cells]
    for folder in {folder for cell in asked for folder in _shared_folders(cell)}:
        _leave_token(folder, token)
    carried = [(_carry("attack", cell.attack), _carry("defense", cell.defense.removesuffix("+aug"))) for cell in asked]
    ready, waiting, running = deque(range(len(asked))), dict[int, str](), dict[Any, tuple[int, str]]()
    outcomes: dict[int, Outcome] = {}
    attempts: Counter[int] = Counter()
    most = cells[0].request.jobs or len(cells)
    for line in dict.fromkeys(_too_much(ray, one, cluster) for one in asked):
        if line:
            progress.say(line)
    try:
        while len(outcomes) < len(asked):
            while ready and len(running) < most:
                index = ready.popleft()
                holder = uuid.uuid4().hex
                cpus, gpus = _demand(asked[index], cluster)
                running[run.options(num_cpus=cpus, num_gpus=gpus).remote(asked[index], *carried[index], token, keys, holder)] = (index, holder)
            ended = ray.wait(list(running), timeout=_ASK_AGAIN)[0] if running else []
            for one in ended:
                index, holder = running.pop(one)
                ray.get(keys.forget.remote(holder))
                try:
                    found = ray.get(one)
                except ray.exceptions.RayError as error:
                    attempts[index] += 1
                    if isinstance(error, ray.exceptions.RayTaskError) or attempts[index] == _ATTEMPTS:
                        found = Outcome(cells[index], None, _sentence(error, attempts[index]))
                        note_failure(cells[index], found.error)
                    else:
                        progress.say(f"{cells[index].name}: its worker ended; starting it again")
                        ready.appendleft(index)
                        continue
                if isinstance(found, str):
                    waiting[index] = found
                    continue
                outcomes[index] = replace(found, asked=cells[index])
                progress.say(f"{len(outcomes)}/{len(cells)} {cells[index].name}: {'failed' if found.record is None else 'done'}")
            if waiting:
                held = ray.get(keys.held.remote())
                free = [index for index, key in waiting.items() if key not in held]
                for index in free:
                    del waiting[index]
                ready.extend(free)
    finally:
        for one in running:
            ray.cancel(one, force=True)
        for folder in {folder for cell in asked for folder in _shared_folders(cell)}:
            with contextlib.suppress(OSError):
                _token_file(folder, token).unlink(missing_ok=True)
    return [outcomes[index] for index in range(len(cells))]


def _keys(ray: Any) -> Any:
    """The granting actor, on this machine: a node that is lost must not take it along."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(node_id=ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0)(Keys).options(scheduling_strategy=here).remote()


def _demand(asked: Asked, cluster: Cluster) -> tuple[int, float]:
    """CPUs and GPUs of a cell."""
    return scale_of(asked.request).train.threads, _gpus(asked, cluster)


def _too_much(ray: Any, asked: Asked, cluster: Cluster) -> str:
    """A line about a cell that no node has room for, so that it waits for one that may never come; empty if one has."""
    cpus, gpus = _demand(asked, cluster)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
        return ""
    return f"no node of the cluster has the {cpus} CPUs and {gpus:g} GPUs that a cell takes (train.threads, --gpus); waiting for one that joins"


def _run_cell(asked: Asked, attack: Carried, defense: Carried, token: str, keys: Any, holder: str) -> Outcome | str:
    """Runs in a worker: the outcome of a cell, or the key of the stage that it has to wait for."""
    for folder in _shared_folders(asked):
        if not _token_file(folder, token).is_file():
            where = os.uname().nodename
            return Outcome(asked, None, f"node {where} does not see the folder {folder}; all nodes must share the results and the cache, see --results and --cache", True)
    with contextlib.ExitStack() as unpacked:
        try:
            names = [unpacked.enter_context(_unpacked(kind, one)) for kind, one in (("attack", attack), ("defense", defense))]
        except BenchError as error:
            return Outcome(asked, None, str(error), True)
        here = replace(asked, attack=names[0], defense=names[1] + ("+aug" if asked.augmented else ""))
        stages = ClusterStages(asked.request.cache_folder, silent().say, keys, holder)
        try:
            return run_one(here, silent(), stages, noted_as=asked)
        except MustWait as wait:
            return wait.key


def _carry(kind: Any, name: str) -> Carried:
    plugin = find(kind, name)
    files = {path.name: path.read_bytes() for path in source_files(plugin.file)} if plugin.by_path else {}
    return Carried(plugin.file.name if plugin.by_path else name, files, plugin.source)


@contextlib.contextmanager
def _unpacked(kind: Any, plugin: Carried) -> Iterator[str]:
    """The name or path of a plugin on this node, whose code is that of the machine that asks.

    Raises:
        BenchError: this node has other code under the name.
    """
    if not plugin.files:
        here = find(kind, plugin.name).source
        if here != plugin.source:
            raise BenchError(f"node {os.uname().nodename} has another version of {kind} {plugin.name}; install the same version on all nodes")
        yield plugin.name
        return
    folder = Path(tempfile.mkdtemp(prefix="bench-plugin-"))
    try:
        for name, content in plugin.files.items():
            (folder / name).write_bytes(content)
        path = folder / plugin.name
        if source_hash(path) != plugin.source:
            raise BenchError(f"{kind} {plugin.name} imports modules that do not lie beside it, so it cannot travel to node {os.uname().nodename}; install it as a package there")
        yield str(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _shared_folders(asked: Asked) -> list[Path]:
    return list(dict.fromkeys([asked.request.results, asked.request.cache_folder, *([asked.request.keep] if asked.request.keep else [])]))


def _token_file(folder: Path, token: str) -> Path:
    return folder / f".shared-{token}"


def _leave_token(folder: Path, token: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(_token_file(folder, token), token.encode())
    except OSError as error:
        raise BenchError(f"cannot write to {folder}: {error.strerror}. Choose another folder with --results or --cache") from None


def _gpus(asked: Asked, cluster: Cluster) -> float:
    if asked.request.device != "cuda":
        return 0.0
    if cluster.gpus is not None:
        return cluster.gpus
    return 0.25 if scale_of(asked.request).model.name == "bench-small" else 1.0


def _sentence(error: Exception, attempts: int) -> str:
    cause = getattr(error, "cause", None)
    if isinstance(cause, ModuleNotFoundError):
        return f"a node cannot import {cause.name}; install this program with its extra `ray` on every node"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"the worker failed {attempts} times; the last time: {lines[-1]}"


def _check_address(address: str | None) -> None:
    """Raises BenchError at once where nobody listens; Ray itself would try for minutes."""
    host, colon, port = (address or "").rpartition(":")
    if not colon or not port.isdigit() or "/" in host:
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise BenchError(f"no Ray cluster at {address} ({error.strerror or error}); `ray start --head` starts one, and --address names another") from None


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise BenchError(f"--on ray needs Ray, which is not installed; in the checkout: {Path(sys.executable).name} -m pip install -e '.[ray]'") from None
    return ray
