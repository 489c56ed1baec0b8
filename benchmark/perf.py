"""`make perf`: ratios of two things measured in one run, medians over repeats with their spread."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmark.contract import Defense
from benchmark.data import world
from benchmark.data.tokens import Tokenizer
from benchmark.progress import silent
from benchmark.registry import find
from benchmark.settings import SCALES, ModelSettings
from benchmark.train.loop import Budget, TrainingData, train
from benchmark.train.loss import contrastive
from benchmark.train.model import Model, build, optimizer, tokenizer
from benchmark.train.views import TextViews

_ROWS = 3000
_EPOCHS = 2


def main() -> None:
    """Prints one line a ratio: median [smallest, largest] over the repeats."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    data, words = _data()
    clip = find("defense", "clip").load()
    lines: list[tuple[str, Callable[[], float]]] = [
        ("loop / bare step, clip, small (pairs per second; goal 0.95)", lambda: _loop_ratio(data, words, clip(), augmented=False)),
        ("loop / bare step, clip+aug, small (pairs per second)", lambda: _loop_ratio(data, words, clip(), augmented=True)),
        ("matched RoCLIP epoch / CLIP epoch (pairs per second; goal 1)", lambda: _epoch_ratio(data, words)),
        ("drawing at 32 px / 2,000 images per second and core (goal 1)", _drawing),
        ("bench --help / python -c pass (seconds)", _start_up),
    ]
    for name, ratio in lines:
        values = sorted(ratio() for _ in range(repeats))
        print(f"{name}: {values[len(values) // 2]:.2f} [{values[0]:.2f}, {values[-1]:.2f}], n={repeats}", flush=True)  # noqa: T201


def _data() -> tuple[tuple[np.ndarray, list[str]], Tokenizer]:
    images = np.stack([world.drawn_row(0, "train", row, 32).image for row in range(_ROWS)])
    captions = [world.scene(0, "train", row).captions[0] for row in range(_ROWS)]
    return (images, captions), tokenizer(ModelSettings())


def _loop_seconds(data: tuple[np.ndarray, list[str]], words: Tokenizer, defense: Defense, augmented: bool) -> list[float]:
    """Seconds of each epoch of the project's own loop."""
    settings = SCALES["small"].train.model_copy(update={"epochs": _EPOCHS})
    model = build(ModelSettings(), 32, 0, torch.device("cpu"))
    texts = TextViews(data[1], defense, None, words, "fixed", 0)
    training = TrainingData(data[0], words.encode(data[1])[0], texts)
    with tempfile.TemporaryDirectory() as folder:
        log = train(model, defense, training, Budget(settings, SCALES["small"].augment, augmented, 0), Path(folder), silent())
    return [row["seconds"] for row in log]


def _bare_seconds(data: tuple[np.ndarray, list[str]], words: Tokenizer) -> float:
    """Seconds of one epoch of forward, backward and optimizer on tensors already in place."""
    settings = SCALES["small"].train
    model: Model = build(ModelSettings(), 32, 0, torch.device("cpu"))
    tokens = words.encode(data[1])[0]
    model.train_only(np.unique(tokens).astype(np.int64))
    adam = optimizer(model.net, settings)
    size = settings.batch_size
    images = torch.from_numpy(data[0][:size]).permute(0, 3, 1, 2).float().div(255).contiguous(memory_format=torch.channels_last)
    batch = torch.from_numpy(tokens[:size].astype(np.int64))
    model.net.train()
    began = time.perf_counter()
    for _ in range(_ROWS // size):
        adam.zero_grad(set_to_none=False)
        loss = contrastive(model.image(images), model.text(batch), model.scale)
        torch.autograd.backward(loss)
        adam.step()
    return time.perf_counter() - began


def _loop_ratio(data: tuple[np.ndarray, list[str]], words: Tokenizer, defense: Defense, augmented: bool) -> float:
    bare = _bare_seconds(data, words)
    return bare / min(_loop_seconds(data, words, defense, augmented))


def _epoch_ratio(data: tuple[np.ndarray, list[str]], words: Tokenizer) -> float:
    """The second epoch is matched, the first is not."""
    clip, matched = _loop_seconds(data, words, find("defense", "roclip").load()(pool_fraction=0.05), augmented=False)
    return clip / matched


def _drawing() -> float:
    began = time.perf_counter()
    for row in range(1000):
        world.drawn_row(0, "train", row, 32)
    return 1000 / (time.perf_counter() - began) / 2000


def _start_up() -> float:
    def seconds(*arguments: str) -> float:
        began = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - began

    return seconds("-m", "benchmark", "--help") / seconds("-c", "pass")


if __name__ == "__main__":
    main()
