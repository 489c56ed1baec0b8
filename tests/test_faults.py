"""Runs that are killed, damaged or started twice end with the record of an undisturbed one."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

ARGUMENTS = (
    "run",
    "--attack",
    "backdoor",
    "--defense",
    "roclip+aug",
    "--scale",
    "smoke",
    "--no-baseline",
    "--jobs",
    "1",
    "--set=train.epochs=6",
    "--set=data.n_test=100",
    "--set=data.n_probe=200",
    "--set=data.n_pairs=512",
    "--set=evaluation.linear_probe=none",
)
TWO_CELLS = (*("2" if argument == "1" else argument for argument in ARGUMENTS), "--defense", "clip")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def start(results: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "benchmark", *ARGUMENTS, *more, "--results", str(results)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        # A shell that starts the tests in the background has them, and so the run, ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - no threads here
    )


def finish(results: Path, *more: str) -> bytes:
    process = start(results, *more)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    (record,) = results.glob("runs/*/record.json")
    return record.read_bytes()


def wait_for_epoch(process: subprocess.Popen[str], results: Path, epoch: int) -> None:
    """Until a training that goes on has saved this epoch."""
    deadline = time.monotonic() + 600
    while not list(results.glob(f"cache/train/*.part/epoch-{epoch:03d}.safetensors")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)


class Undisturbed(NamedTuple):
    record: bytes
    seconds: float
    results: Path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The record, how long the run took, and where it lies."""
    results = tmp_path_factory.mktemp("undisturbed")
    began = time.monotonic()
    return Undisturbed(finish(results), time.monotonic() - began, results)


@pytest.fixture
def prepared(undisturbed, tmp_path):
    """A results folder with the data of the run, and nothing trained."""
    shutil.copytree(undisturbed.results / "cache", tmp_path / "cache", ignore=shutil.ignore_patterns("train", "trained_pairs", "evaluate", "features"))
    return tmp_path


@pytest.fixture
def finished(undisturbed, tmp_path):
    """A results folder with the whole run."""
    return shutil.copytree(undisturbed.results, tmp_path / "finished")


def killed_somewhere(results: Path, seconds: float, seed: int) -> None:
    """Starts the run and kills it at a random moment of its first `seconds`."""
    process = start(results)
    time.sleep(random.Random(seed).uniform(0.2, 1.0) * seconds)
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.mark.parametrize("seed", range(2))
def test_a_killed_run_continues_to_the_same_record(seed, undisturbed, tmp_path):
    killed_somewhere(tmp_path, undisturbed.seconds, seed)
    assert finish(tmp_path) == undisturbed.record


def test_a_run_killed_in_the_middle_of_training_does_not_train_its_epochs_again(undisturbed, prepared):
    process = start(prepared, "--keep-snapshots")
    wait_for_epoch(process, prepared, 2)
    process.kill()
    process.communicate()
    written = next(prepared.glob("cache/train/*.part/epoch-001.safetensors")).stat().st_mtime_ns
    assert finish(prepared, "--keep-snapshots") == undisturbed.record
    (snapshot,) = prepared.glob("cache/train/*/epoch-001.safetensors")
    assert snapshot.stat().st_mtime_ns == written


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 150))
def test_fifty_kills_end_with_the_same_record(seed, undisturbed, tmp_path):
    killed_somewhere(tmp_path, undisturbed.seconds, seed)
    killed_somewhere(tmp_path, undisturbed.seconds / 2, seed + 1000)
    assert finish(tmp_path) == undisturbed.record


def test_ctrl_c_ends_with_130_and_a_word(undisturbed, prepared):
    process = start(prepared)
    wait_for_epoch(process, prepared, 1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "the same command continues from here" in errors
    assert finish(prepared) == undisturbed.record


def test_a_truncated_record_is_named_and_made_again(undisturbed, finished):
    (path,) = finished.glob("runs/*/record.json")
    path.write_bytes(path.read_bytes()[:100])
    process = start(finished)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0
    assert path.parent.name in errors
    assert "is damaged" in errors
    assert path.read_bytes() == undisturbed.record


def test_a_damaged_stage_is_named_and_made_again(undisturbed, finished):
    (record,) = finished.glob("runs/*/record.json")
    record.unlink()
    weights = next(finished.glob("cache/train/*/epoch-006.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    process = start(finished)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert "epoch-006.safetensors" in errors
    assert record.read_bytes() == undisturbed.record


def test_two_processes_on_one_run_make_one_record(undisturbed, tmp_path):
    first, second = start(tmp_path), start(tmp_path)
    for process in (first, second):
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
    (path,) = tmp_path.glob("runs/*/record.json")
    assert path.read_bytes() == undisturbed.record
    assert len(list(tmp_path.glob("cache/train/*/log.json"))) == 1


def test_a_clock_that_was_set_back_or_forward_changes_nothing(undisturbed, prepared):
    process = start(prepared)
    wait_for_epoch(process, prepared, 2)
    process.kill()
    process.communicate()
    for index, path in enumerate(sorted(prepared.rglob("*"))):
        os.utime(path, (0, 0) if index % 2 else (4e9, 4e9))
    assert finish(prepared) == undisturbed.record
    assert len(list(prepared.glob("cache/train/*/log.json"))) == 1


@pytest.mark.slow
def test_two_matrices_on_one_results_folder_make_each_record_once(undisturbed, tmp_path):
    sets = [argument.removeprefix("--set=") for argument in ARGUMENTS if argument.startswith("--set=")]
    cells = 'attacks = ["backdoor"]\ndefenses = ["clip", "roclip+aug"]\nseeds = [0, 1]'
    (tmp_path / "grid.toml").write_text(f'scale = "smoke"\nset = {json.dumps(sets)}\n\n[[part]]\n{cells}\n')
    command = [sys.executable, "-m", "benchmark", "matrix", str(tmp_path / "grid.toml"), "--jobs", "2", "--results", str(tmp_path / "r")]
    matrices = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) for _ in range(2)]
    for process in matrices:
        _, errors = process.communicate(timeout=900)
        assert process.returncode == 0, errors
    records = {path.read_bytes() for path in tmp_path.glob("r/runs/*/record.json")}
    assert len(records) == 4
    assert undisturbed.record in records
    assert {path.read_bytes() for path in tmp_path.glob("runs/*/record.json")} == records
    assert len(list(tmp_path.glob("r/cache/train/*/log.json"))) == 4


@pytest.mark.slow
def test_the_example_grid_goes_on_after_it_was_killed(tmp_path):
    grid = Path(__file__).parents[1] / "docs" / "example" / "grid.toml"
    (tmp_path / "grid.toml").write_bytes(grid.read_bytes())

    def matrix(results: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "benchmark", "matrix", str(tmp_path / "grid.toml"), "--jobs", "2", "--results", str(tmp_path / results)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, start_new_session=True)

    def kept(results: str) -> dict[str, bytes]:
        return {path.parent.name: path.read_bytes() for path in (tmp_path / results / "runs").glob("*/record.json")}

    for done in (2, 9):
        process = matrix("killed")
        deadline = time.monotonic() + 1200
        while len(kept("killed")) < done:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    first = kept("killed")
    assert 9 <= len(first) < 18
    for results in ("killed", "undisturbed"):
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)  # the copies beside the grid, which would be taken as done
        process = matrix(results)
        _, errors = process.communicate(timeout=1800)
        assert process.returncode == 0, errors
    assert len(kept("undisturbed")) == 18
    assert kept("killed") == kept("undisturbed")
    assert first.items() <= kept("undisturbed").items()


def test_a_killed_worker_is_replaced_and_the_others_finish(undisturbed, prepared):
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmark", *TWO_CELLS, "--results", str(prepared)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=ENVIRONMENT
    )
    wait_for_epoch(process, prepared, 1)
    notes = [path.read_text() for path in prepared.glob("running/*.json")]
    os.kill(next(json.loads(note)["process"] for note in notes if note), signal.SIGKILL)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert "a worker process was killed; starting the unfinished cells again" in errors
    records = {path.read_bytes() for path in prepared.glob("runs/*/record.json")}
    assert len(records) == 2
    assert undisturbed.record in records


@pytest.mark.skipif(not Path(f"/proc/self/task/{os.getpid()}/children").exists(), reason="asks Linux for the children of a process")
def test_workers_end_with_the_process_that_started_them(prepared):
    process = subprocess.Popen([sys.executable, "-m", "benchmark", *TWO_CELLS, "--results", str(prepared)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=ENVIRONMENT)
    deadline = time.monotonic() + 120
    while len(list(prepared.glob("cache/train/*.part"))) < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert len(children) >= 2
    process.kill()
    process.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in children):
        assert time.monotonic() < deadline, "a worker outlives its parent"
        time.sleep(0.05)
