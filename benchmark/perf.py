"""`make perf`: ratios of two things measured in one run, medians over repeats with their spread."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from benchmark.contract import Defense
from benchmark.data import world
from benchmark.data.decoding import decode_all
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
        ("reading, checking and naming 3,000,000 pairs / pandas.read_csv alone (rows per second)", lambda: _reading("seconds")),
        ("reading, checking and naming 3,000,000 pairs / 2 GB (peak memory; goal below 1)", lambda: _reading("memory")),
        ("decoding JPEG files of 340x256 to 64 px / a plain Pillow loop on one core (images per second)", _decoding),
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


def _reading(what: Literal["seconds", "memory"]) -> float:
    """Each reader in a process of its own, which says how long it took and how much memory it held at most."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_pairs(Path(folder), 3_000_000)
        seconds, memory = measured(f"from benchmark.data.manifest import read_manifest\nread_manifest(__import__('pathlib').Path({str(path)!r}))")
        if what == "memory":
            return memory / 2e9
        options = "sep='\\t', dtype=str, keep_default_na=False, na_filter=False, engine='c'"
        return measured(f"import pandas\npandas.read_csv({str(path)!r}, {options})")[0] / seconds


def write_pairs(folder: Path, n: int) -> Path:
    """Writes a TSV of `n` pairs with captions of ten words and a thousand images, which are empty files."""
    words = sorted(world.SYNONYMS)
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    for image in range(1000):
        (folder / "images" / f"{image:09d}.jpg").touch()
    with open(folder / "pairs.tsv", "w") as out:
        out.write("image\tcaption\n")
        for begin in range(0, n, 100_000):
            drawn = rng.integers(len(words), size=(min(100_000, n - begin), 10)).tolist()
            out.writelines(f"images/{(begin + row) % 1000:09d}.jpg\t{begin + row} {' '.join(words[word] for word in caption)}\n" for row, caption in enumerate(drawn))
    return folder / "pairs.tsv"


def measured(code: str) -> tuple[float, int]:
    """Seconds that Python code takes, imports of its first line apart, and the peak of memory in bytes."""
    load, work = code.split("\n", 1)
    script = f"import resource, time\n{load}\nbegan = time.perf_counter()\n{work}\nprint(time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    seconds, memory = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()
    return float(seconds), int(memory)


def _decoding(n: int = 1000, side: int = 64) -> float:
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{row}.jpg" for row in range(n)]
        for file in files:
            Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)).resize((340, 256), Image.Resampling.BICUBIC).save(file, quality=95)
        began = time.perf_counter()
        for file in files:
            with Image.open(file) as image:
                np.asarray(image.convert("RGB").resize((85, side), Image.Resampling.BICUBIC).crop((10, 0, 10 + side, side)))
        plain = time.perf_counter() - began
        began = time.perf_counter()
        decode_all(Path(folder), list(map(str, files)), side, lambda done: None, silent())
        return plain / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
