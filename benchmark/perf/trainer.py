"""The project's loop against open_clip's own trainer on the same pairs, model, batch and precision."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from benchmark.errors import BenchError
from benchmark.perf.step import clip, loop_seconds, pairs
from benchmark.settings import TrainSettings
from benchmark.train.model import SMALL

WORKERS = (0, 1, 2, 4)
_LAUNCH = """
import runpy, sys, open_clip, torch
import benchmark.train.small_convnet
torch.set_num_threads(int(sys.argv.pop(1)))
open_clip.add_model_config(sys.argv.pop(1))
sys.argv[0] = "main"
runpy.run_module("open_clip_train.main", run_name="__main__")
"""


@dataclass(frozen=True)
class Setting:
    """What both train: n drawn pairs of this side. `constant` is its name in this module."""

    constant: str
    model: str
    side: int
    n: int
    batch: int


SMALL_IMAGES = Setting("SMALL_IMAGES", "bench-small", 32, 3072, 128)
RN50 = Setting("RN50", "RN50", 224, 64, 16)


def ratio(setting: Setting) -> float:
    """The loop's pairs per second over the best of the other trainer's, both with one thread beside workers that load."""
    return setting.n / min(_own_seconds(setting)) / max(_their_rate(setting, workers) for workers in WORKERS)


def machine_ratio(setting: Setting) -> float:
    """Pairs per second of two trainings side by side, as `bench matrix --jobs 2` runs them, over the most that the other trainer makes of two cores."""
    command = [sys.executable, "-c", f"from benchmark.perf import trainer\nprint(trainer.steady_rate(trainer.{setting.constant}))"]
    sides = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    ours = sum(float(side.communicate()[0]) for side in sides)
    return ours / max(_their_rate(setting, workers, threads) for workers in WORKERS for threads in (1, 2))


def steady_rate(setting: Setting) -> float:
    """The loop's pairs per second on one thread, without the first epoch and the last, in which a process beside it may not be at work."""
    torch.set_num_threads(1)
    seconds = _own_seconds(setting, epochs=6)[1:-1]
    return setting.n * len(seconds) / sum(seconds)


def _own_seconds(setting: Setting, epochs: int = 2) -> list[float]:
    images, captions = pairs(setting.n, setting.side)
    return loop_seconds(images, captions, clip(), False, TrainSettings(epochs=epochs, batch_size=setting.batch), setting.model, setting.side)


def _their_rate(setting: Setting, workers: int, threads: int = 1) -> float:
    """Pairs per second, from the log's batch times without those of the first quarter of an epoch.

    Raises:
        BenchError: the trainer is not installed or fails.
    """
    images, captions = pairs(setting.n, setting.side)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for row, image in enumerate(images):
            Image.fromarray(image).save(folder / f"{row}.png")
        (folder / "pairs.tsv").write_text("filepath\ttitle\n" + "".join(f"{folder}/{row}.png\t{caption}\n" for row, caption in enumerate(captions)))
        (folder / "bench-small.json").write_text(json.dumps(SMALL))
        given = {
            "dataset-type": "csv",
            "train-data": folder / "pairs.tsv",
            "batch-size": setting.batch,
            "epochs": 1,
            "lr": 2e-3,
            "wd": 0.1,
            "warmup": 10,
            "precision": "fp32",
            "device": "cpu",
            "workers": workers,
            "log-every-n-steps": 1,
            "save-frequency": 0,
            "model": setting.model,
            "logs": folder / "logs",
            "name": "run",
        }
        words = [part for key, value in given.items() for part in (f"--{key}", str(value))]
        command = [sys.executable, "-c", _LAUNCH, str(threads), str(folder / "bench-small.json"), *words, "--aug-cfg", "scale=(1.0,1.0)", "ratio=(1.0,1.0)"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, cwd=folder)
        if done.returncode:
            raise BenchError(f"open_clip_train failed: {done.stderr.strip().splitlines()[-1]}; it comes with the extra open-clip-train")
        seconds = [float(found) for found in re.findall(r"Batch \(t\): ([0-9.]+)", (folder / "logs" / "run" / "out.log").read_text())]
    kept = seconds[len(seconds) // 4 :]
    return setting.batch * len(kept) / sum(kept)
