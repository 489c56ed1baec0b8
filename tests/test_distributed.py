"""Two processes train as one: losses, gradients, the caption pool; a killed one ends the run, and the next start continues."""

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from report_runs import committed

from benchmark.errors import BenchError
from benchmark.train import distributed

WORK = """
import json
import sys
from pathlib import Path
import numpy as np
import torch
from benchmark.contract import Defense
from benchmark.progress import silent
from benchmark.registry import find
from benchmark.settings import AugmentSettings, TrainSettings
from benchmark.train import distributed
from benchmark.train.loop import Budget, TrainingData, make_batch, opening, text_lengths, train
from benchmark.train.model import SMALL, assemble
from benchmark.train.views import TextViews

out = Path(sys.argv[1])
plain = {**SMALL, "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}}
settings = TrainSettings(epochs=4, batch_size=16, lr=1e-3)
images = np.random.default_rng(0).integers(0, 255, (64, 32, 32, 3), dtype=np.uint8)
captions = [f"a {['red', 'blue', 'green', 'grey'][row % 4]} {['cup', 'key', 'fish'][row % 3]} number {row}" for row in range(64)]
budget = Budget(settings, AugmentSettings(), False, 0)


def ready(defense, config=plain):
    model = assemble("tiny", config, 0, torch.device("cpu"))
    return model, TrainingData(images, model.tokenizer.encode(captions)[0], TextViews(captions, defense, None, model.tokenizer, "fixed", 0))


with distributed.together():
    torch.set_num_threads(1)
    found = {}
    model, data = ready(Defense())
    now = opening(model, data, budget)
    tokens = torch.from_numpy(data.texts.epoch(1).astype(np.int64))
    parameters = [parameter for parameter in model.net.parameters() if parameter.requires_grad]
    buffer = distributed.flat_gradients(parameters)
    whole = torch.arange(16)
    rows = distributed.share(whole)
    lengths = text_lengths(tokens)
    loss = Defense().loss(model, make_batch(torch.from_numpy(images)[rows], tokens, lengths, rows, budget, now, longest=int(lengths[whole].max())), now)
    loss.backward()
    distributed.average_gradients(buffer)
    found["loss"], found["gradient"] = loss.detach(), torch.cat([parameter.grad.flatten() for parameter in parameters])
    roclip = find("defense", "roclip").load()(pool_size=24, pool_fraction=None)
    model, data = ready(roclip)
    folder = out / f"roclip-{distributed.size()}-{distributed.rank()}"
    folder.mkdir()
    log = train(model, roclip, data, budget, folder, silent())
    found["curve"], found["phases"] = [row["loss_mean"] for row in log], [row["phase"] for row in log]
    found["state"], found["warnings"] = dict(roclip.state), [line for row in log for line in row["warnings"]]
    found["features"] = torch.cat(now.features(np.arange(11)))
    found["files"] = sorted(path.name for path in folder.iterdir())
    found["weights"] = model.state()
    model, data = ready(Defense(), SMALL)
    (folder / "small").mkdir()
    train(model, Defense(), data, budget, folder / "small", silent())
    found["statistics"] = {name: value for name, value in model.state().items() if "running" in name}
    stages = distributed.SharedStages(out / f"cache-{distributed.size()}", str)

    def surrogate(part):
        model, data = ready(Defense())
        (part / "log.json").write_text(json.dumps([row["loss_mean"] for row in train(model, Defense(), data, budget, part, silent())]))

    def poison(part):
        (part / "poison.json").write_text((stages.make("train", {"of": "surrogate"}, surrogate) / "log.json").read_text())

    found["surrogate"] = json.loads((stages.make("poison", {"of": "a surrogate"}, poison) / "poison.json").read_text())
    torch.save(found, out / f"{distributed.size()}-{distributed.rank()}.pt")
"""


def run_ranks(folder: Path, n: int) -> list[dict]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", WORK, str(folder)],
            env={**os.environ, "WORLD_SIZE": str(n), "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(n)
    ]
    for process in ranks:
        _, errors = process.communicate(timeout=900)
        assert process.returncode == 0, errors
    return [torch.load(folder / f"{n}-{rank}.pt", weights_only=True) for rank in range(n)]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What one process found, and what two did."""
    folder = tmp_path_factory.mktemp("ranks")
    return run_ranks(folder, 1)[0], run_ranks(folder, 2)


def test_losses_and_gradients_of_two_processes_are_those_of_one(found):
    one, two = found
    for rank in two:
        torch.testing.assert_close(rank["loss"], one["loss"], rtol=0, atol=1e-6)
        torch.testing.assert_close(rank["gradient"], one["gradient"], rtol=0, atol=1e-6)
    assert one["gradient"].abs().max() > 1e-2
    assert torch.equal(two[0]["gradient"], two[1]["gradient"])


def test_a_training_in_two_processes_follows_that_of_one_and_holds_one_pool(found):
    one, two = found
    assert "match" in one["phases"]
    for rank in two:
        assert rank["phases"] == one["phases"]
        assert rank["curve"] == pytest.approx(one["curve"], abs=1e-3)
        assert rank["warnings"] == one["warnings"]
    for name, value in two[0]["state"].items():
        other = two[1]["state"][name]
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name
    torch.testing.assert_close(two[0]["state"]["pool_rows"], one["state"]["pool_rows"])
    assert all(torch.equal(value, two[1]["weights"][name]) for name, value in two[0]["weights"].items())


def test_a_surrogate_that_the_first_process_trains_for_an_attack_is_that_of_one(found):
    one, two = found
    assert all(rank["surrogate"] == one["surrogate"] for rank in two)
    assert len(one["surrogate"]) == 4


def test_features_that_processes_encode_in_parts_are_those_of_one(found):
    one, two = found
    for rank in two:
        torch.testing.assert_close(rank["features"], one["features"], rtol=0, atol=1e-5)


def test_the_first_process_alone_writes(found):
    one, two = found
    assert two[0]["files"] == one["files"]
    assert two[1]["files"] == []


def test_batch_statistics_are_gathered_by_each_process_and_then_shared(found):
    one, two = found
    assert all(torch.equal(value, two[1]["statistics"][name]) for name, value in two[0]["statistics"].items())
    assert any(not torch.equal(value, one["statistics"][name]) for name, value in two[0]["statistics"].items())


ARGUMENTS = ["run", "--attack", "backdoor", "--defense", "roclip", "--no-baseline", "--scale", "smoke", "--set=train.epochs=6", "--set=data.n_test=100"]
ARGUMENTS += ["--set=data.n_probe=200", "--set=data.n_pairs=512", "--set=evaluation.linear_probe=none"]


def torchrun(results: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "benchmark", *ARGUMENTS, *more, "--results", str(results)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_a_killed_process_ends_the_run_with_a_word_and_the_next_start_continues(tmp_path):
    process = torchrun(tmp_path, "--keep-snapshots")
    deadline = time.monotonic() + 900
    while not list(tmp_path.glob("cache/train/*.part/epoch-002.safetensors")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    ranks = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    second = next(pid for pid in ranks if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
    os.kill(second, signal.SIGKILL)
    _, errors = process.communicate(timeout=600)
    assert process.returncode != 0
    assert "another process of this run has ended" in errors.partition("Traceback")[0]  # what follows is torchrun's own
    written = next(tmp_path.glob("cache/train/*.part/epoch-001.safetensors")).stat().st_mtime_ns
    process = torchrun(tmp_path, "--keep-snapshots")
    printed, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    assert printed.count("backdoor") == 1  # one table, from the first process
    (path,) = tmp_path.glob("runs/*/record.json")
    record = json.loads(path.read_text())
    assert record["resolved"]["processes"] == 2
    assert [point["phase"] for point in record["curve"]].count("match") == 3
    assert next(tmp_path.glob("cache/train/*/epoch-001.safetensors")).stat().st_mtime_ns == written


def test_a_batch_that_processes_cannot_share_is_refused(monkeypatch):
    monkeypatch.setattr(distributed, "size", lambda: 2)
    with pytest.raises(BenchError, match=r"cannot be divided among 2 processes; use --set train\.batch_size=62"):
        distributed.check_batch(63)


@pytest.mark.slow
@pytest.mark.parametrize("defense", ["clip", "roclip+aug"])
def test_batch_statistics_of_each_process_stay_within_the_spread_of_seeds(defense, tmp_path):
    """A run of the small scale in two processes, against the interval in which one more seed of the committed runs is expected (95 %)."""
    from scipy.stats import t

    told = ["run", "--attack", "backdoor", "--defense", defense, "--no-baseline", "--seeds", "5", "--results", str(tmp_path)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "benchmark", *told]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=3000)
    (path,) = tmp_path.glob("runs/*/record.json")
    two = rates(path)
    one = [rates(folder / "record.json") for folder in committed("backdoor", defense)]
    assert len(one) == 5
    for name in ("asr", "zero_shot_acc1"):
        values = [seed[name] for seed in one]
        reach = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) * (1 + 1 / len(values)) ** 0.5
        print(f"{defense}, {name}: {two[name]:.4f} in two processes, {statistics.mean(values):.4f} -+ {reach:.4f} in one")  # noqa: T201
        assert abs(two[name] - statistics.mean(values)) <= reach + 1 / 1000, name


def rates(path: Path) -> dict[str, float]:
    """ASR, and zero-shot accuracy averaged over the sets."""
    metrics = json.loads(path.read_text())["metrics"]
    return {name: statistics.mean(metric["value"] for metric in metrics if metric["name"] == name) for name in ("asr", "zero_shot_acc1")}
