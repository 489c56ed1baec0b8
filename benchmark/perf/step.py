"""What a training step costs beside what it must cost."""

from __future__ import annotations

import functools
import io
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmark.contract import Defense
from benchmark.data import world
from benchmark.data.images import EncodedImages, Images, write_encoded
from benchmark.data.tokens import Tokenizer
from benchmark.progress import silent
from benchmark.registry import find
from benchmark.settings import SCALES, ModelSettings, TrainSettings
from benchmark.train.loop import Budget, TrainingData, text_lengths, train
from benchmark.train.loss import contrastive
from benchmark.train.model import build, optimizer, tokenizer
from benchmark.train.views import TextViews

ROWS = 3000
_EPOCHS = 2


@functools.cache
def pairs(n: int = ROWS, side: int = 32) -> tuple[NDArray[np.uint8], list[str]]:
    """Drawn images uint8 (n, side, side, 3) and captions."""
    images = np.stack([world.drawn_row(0, "train", row, side).image for row in range(n)])
    return images, [world.scene(0, "train", row).captions[0] for row in range(n)]


def clip() -> Defense:
    """Plain CLIP."""
    defense: Defense = find("defense", "clip").load()()
    return defense


def loop_seconds(images: Images, captions: list[str], defense: Defense, augmented: bool, settings: TrainSettings, name: str = "bench-small", side: int = 32) -> list[float]:
    """Seconds of each epoch of the project's own loop."""
    model_settings = ModelSettings(name=name)
    words = tokenizer(model_settings)
    model = build(model_settings, side, 0, torch.device("cpu"))
    data = TrainingData(images, words.encode(captions)[0], TextViews(captions, defense, None, words, "fixed", 0))
    with tempfile.TemporaryDirectory() as folder:
        log = train(model, defense, data, Budget(settings, SCALES["small"].augment, augmented, 0), Path(folder), silent())
    return [row["seconds"] for row in log]


def small() -> TrainSettings:
    """The small scale's training, of two epochs."""
    return SCALES["small"].train.model_copy(update={"epochs": _EPOCHS})


def bare_seconds(text_gradient: bool = True, precision: str = "fp32") -> float:
    """Seconds of the faster of two epochs of forward, backward and optimizer on one batch already in place."""
    images, captions = pairs()
    settings = SCALES["small"].train
    words: Tokenizer = tokenizer(ModelSettings())
    model = build(ModelSettings(), 32, 0, torch.device("cpu"), precision)
    tokens = words.encode(captions)[0]
    model.train_only(np.unique(tokens).astype(np.int64))
    adam = optimizer(model.net, settings)
    for parameter in model.net.parameters():
        parameter.grad = torch.zeros_like(parameter)  # a tower without gradient is stepped all the same, as in the loop
    size = settings.batch_size
    longest = text_lengths(torch.from_numpy(tokens[None, :size].astype(np.int64))).max()
    shown = torch.from_numpy(images[:size]).permute(0, 3, 1, 2).float().div(255).contiguous(memory_format=torch.channels_last)
    batch = torch.from_numpy(tokens[:size, :longest].astype(np.int64))
    model.net.train()
    seconds = []
    for _ in range(_EPOCHS):
        began = time.perf_counter()
        for _ in range(ROWS // size):
            adam.zero_grad(set_to_none=False)
            with torch.set_grad_enabled(text_gradient):
                text = model.text(batch)
            torch.autograd.backward(contrastive(model.image(shown), text, model.scale))
            adam.step()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def loop_ratio(augmented: bool) -> float:
    """The loop's rate over the bare step's."""
    bare = bare_seconds()
    return bare / min(loop_seconds(*pairs(), clip(), augmented, small()))


def augmentation_ratio() -> float:
    """The rate with augmentation over the rate without."""
    plain = min(loop_seconds(*pairs(), clip(), False, small()))
    return plain / min(loop_seconds(*pairs(), clip(), True, small()))


def matched_ratio() -> float:
    """Of four epochs of RoCLIP every second is matched; the fourth is compared with the third."""
    settings = small().model_copy(update={"epochs": 4})
    *_, plain, matched = loop_seconds(*pairs(), find("defense", "roclip").load()(pool_fraction=0.05), False, settings)
    return matched / plain


def text_backward_ratio() -> float:
    """What a step costs that gives the text tower no gradient."""
    whole = bare_seconds()
    return bare_seconds(text_gradient=False) / whole


def precision_ratio() -> float:
    """The rate of a step in bf16 over that of one in fp32, on this processor."""
    whole = bare_seconds()
    return whole / bare_seconds(precision="bf16")


def allocator_ratio() -> float:
    """The same training in two processes, of which one keeps what it frees."""

    def seconds(told: str) -> float:
        code = (
            "import torch\nfrom benchmark.perf import step\nfrom benchmark.train.allocator import keep_freed_memory\ntorch.set_num_threads(1)\n"
            f"{told}\nprint(min(step.loop_seconds(*step.pairs(), step.clip(), False, step.small())))"
        )
        return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)

    return seconds("") / seconds("keep_freed_memory()")


def codec_ratio() -> float:
    """Training from JPEG files in one block over training from their pixels; files are decoded on all cores."""
    images, captions = pairs()
    with tempfile.TemporaryDirectory() as folder:
        write_encoded(Path(folder), (_jpeg(image) for image in images))
        encoded = EncodedImages(Path(folder), 32)
        decoded = min(loop_seconds(encoded[:], captions, clip(), False, small()))
        return decoded / min(loop_seconds(encoded, captions, clip(), False, small()))


def _jpeg(image: NDArray[np.uint8]) -> bytes:
    """A file of 128 px, as web images are larger than what is trained on."""
    buffer = io.BytesIO()
    Image.fromarray(image).resize((128, 128), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
