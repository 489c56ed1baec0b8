"""A matrix on a Ray cluster of two nodes gives the records of this machine, whatever dies or joins meanwhile."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmark.cluster import Cluster, Keys, _too_much
from benchmark.request import Asked, Request

pytest.importorskip("ray")

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", "COLUMNS": "200"}
SETS = ["train.epochs=4", "data.n_pairs=512", "data.n_held_out=64", "data.n_clean=32", "data.n_test=100", "data.n_probe=200", "evaluation.linear_probe=none"]
NODES = """
import sys
from ray.cluster_utils import Cluster
options = {"num_cpus": 1, "object_store_memory": 80_000_000}
cluster = Cluster(initialize_head=True, head_node_args={**options, "include_dashboard": False})
nodes = [cluster.add_node(**options)]
print(cluster.address, flush=True)
for line in sys.stdin:
    if line.strip() == "add":
        nodes.append(cluster.add_node(**options))
    elif line.strip() == "remove":
        cluster.remove_node(nodes.pop(0), allow_graceful=False)
    print("done", flush=True)
cluster.shutdown()
"""
PLUGIN = '''
from _halves import half
from benchmark.contract import Defense


class Mine(Defense):
    """Clip at half of the loss."""

    def loss(self, model, batch, now):
        return half(super().loss(model, batch, now))
'''


def test_a_cell_that_no_node_has_room_for_is_named():
    class Nodes:
        @staticmethod
        def nodes():
            return [{"Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0}}, {"Alive": False, "Resources": {"CPU": 64.0}}]

    large = Asked("none", "clip", 0, Request(scale="paper", device="cuda"))
    assert _too_much(Nodes, large, Cluster()).startswith("no node of the cluster has the 8 CPUs and 1 GPUs")
    assert _too_much(Nodes, Asked("none", "clip", 0, Request(scale="small", device="cuda")), Cluster()) == ""


@pytest.fixture(scope="module")
def cluster():
    """The address of a cluster of two nodes with one CPU each, and a way to tell it something."""
    process = subprocess.Popen([sys.executable, "-c", NODES], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=ENVIRONMENT)
    assert process.stdin is not None
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    assert address, "the cluster did not start"

    def tell(word: str) -> None:
        process.stdin.write(f"{word}\n")
        process.stdin.flush()
        assert process.stdout.readline().strip() == "done"

    yield address, tell
    process.stdin.close()
    process.wait(timeout=300)
    process.stdout.close()


def grid(folder: Path, defenses: list[str], seeds: list[int]) -> Path:
    folder.mkdir(parents=True)
    (folder / "_halves.py").write_text("def half(x):\n    return x / 2\n")
    (folder / "mine.py").write_text(PLUGIN)
    listed = json.dumps([str(folder / name) if name.endswith(".py") else name for name in defenses])
    (folder / "grid.toml").write_text(f'scale = "smoke"\nset = {json.dumps(SETS)}\n\n[[part]]\nattacks = ["backdoor"]\ndefenses = {listed}\nseeds = {json.dumps(seeds)}\n')
    return folder / "grid.toml"


def matrix(path: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmark", "matrix", str(path), "--results", str(path.parent / "r"), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=path.parent)


def records(folder: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in folder.glob("r/runs/*/record.json")}


def wait_for(folder: Path, pattern: str, process: subprocess.Popen[str]) -> Path:
    deadline = time.monotonic() + 1200
    while not (found := list(folder.glob(pattern))):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    return found[0]


def worker_in_training(folder: Path) -> int:
    return next(json.loads(text)["process"] for path in (folder / "r" / "running").glob("*.json") for text in [path.read_text()] if text)


@pytest.mark.slow
def test_a_cluster_gives_the_records_of_this_machine_though_a_worker_is_killed(cluster, tmp_path):
    local = grid(tmp_path / "local", ["mine.py"], [0])
    _, errors = (process := matrix(local, "--jobs", "1")).communicate(timeout=1200)
    assert process.returncode == 0, errors
    path = grid(tmp_path / "ray", ["mine.py"], [0])
    process = matrix(path, "--on", "ray", "--address", cluster[0])
    wait_for(path.parent, "r/cache/train/*.part/epoch-002.safetensors", process)
    first = next(path.parent.glob("r/cache/train/*.part"))
    os.kill(worker_in_training(path.parent), signal.SIGKILL)
    _, errors = process.communicate(timeout=1200)
    assert process.returncode == 0, errors
    assert "its worker ended; starting it again" in errors
    assert len(list(path.parent.glob("r/cache/train/*/log.json"))) == 1
    assert not first.exists()
    assert records(path.parent) == records(local.parent) != {}
    assert not list(path.parent.rglob(".shared-*"))
    assert len(list(path.parent.glob("runs/*/record.json"))) == 1, "kept beside the grid, as by a local matrix"


@pytest.mark.slow
def test_nodes_may_join_and_leave_and_shared_stages_are_made_once(cluster, tmp_path):
    address, tell = cluster
    local = grid(tmp_path / "local", ["clip", "roclip", "mine.py"], [0, 1])
    _, errors = (process := matrix(local, "--jobs", "2")).communicate(timeout=1800)
    assert process.returncode == 0, errors
    path = grid(tmp_path / "ray", ["clip", "roclip", "mine.py"], [0, 1])
    process = matrix(path, "--on", "ray", "--address", address)
    wait_for(path.parent, "r/cache/train/*.part/epoch-001.safetensors", process)
    tell("add")
    wait_for(path.parent, "r/runs/*/record.json", process)
    tell("remove")
    printed, errors = process.communicate(timeout=1800)
    assert process.returncode == 0, (printed, errors)
    assert records(path.parent) == records(local.parent)
    assert len(records(local.parent)) == 6
    assert {folder.name for folder in path.parent.glob("r/cache/poison/*") if folder.is_dir()} == {
        folder.name for folder in local.parent.glob("r/cache/poison/*") if folder.is_dir()
    }


@pytest.mark.slow
def test_without_a_cluster_the_command_says_how_to_start_one(tmp_path):
    path = grid(tmp_path / "ray", ["clip"], [0])
    _, errors = (process := matrix(path, "--on", "ray", "--address", "127.0.0.1:1")).communicate(timeout=120)
    assert process.returncode == 2
    assert "no Ray cluster at 127.0.0.1:1" in errors
    assert "ray start --head" in errors
    _, errors = (process := matrix(path, "--address", "127.0.0.1:1")).communicate(timeout=120)
    assert process.returncode == 2
    assert "--on ray" in errors


def test_a_stage_is_granted_to_one_cell_and_freed_when_that_cell_ends():
    keys = Keys()
    assert keys.ask("stage", "one")
    assert keys.ask("stage", "one")
    assert not keys.ask("stage", "two")
    keys.free("stage", "two")
    assert keys.held() == {"stage"}
    keys.forget("one")
    assert keys.ask("stage", "two")
    keys.free("stage", "two")
    assert keys.held() == set()
