"""The one training loop. Every defense trains through it; a run that was killed continues from its last epoch.

plan -> batches -> augment -> views -> loss -> backward -> step -> snapshot
"""

from __future__ import annotations

import copy
import io
import pickle
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmark.contract import Batch, Defense, Pass
from benchmark.data.images import Images, pick
from benchmark.errors import BenchError
from benchmark.progress import Progress
from benchmark.seeding import torch_generator
from benchmark.settings import AugmentSettings, TrainSettings
from benchmark.stages import write_atomically
from benchmark.train import distributed, schedule, towers
from benchmark.train.augment import augment
from benchmark.train.model import Model, optimizer, save_weights
from benchmark.train.model import passes as counts
from benchmark.train.pixels import Pixels, sent
from benchmark.train.views import TextViews

MAX_LOGIT_SCALE = 4.6052  # ln 100


@dataclass
class Now:
    """Where the training stands, and what a hook may ask for.

    Attributes:
        epoch: counted from 1.
        step: position on the schedule, counted from 0.
        phase: what the curve shows beside the epoch; None for the phases of the passes.
        model: the model in training.
        start: a frozen copy of the initial model.
        augmented: whether the run says `+aug`.
    """

    epochs: int
    steps_per_epoch: int
    batch_size: int
    n_rows: int
    model: Model
    start: Model
    data: TrainingData
    augment_settings: AugmentSettings
    rng: torch.Generator
    epoch: int = 1
    step: int = 0
    seed: int = 0
    augmented: bool = False
    phase: str | None = None
    sums: dict[str, tuple[float | Tensor, int]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def begin(self, epoch: int) -> None:
        """Starts an epoch (counted from 1) at its first step, with empty sums and the epoch's own augmentation draws."""
        self.epoch, self.phase, self.sums, self.counts, self.warnings = epoch, None, {}, {}, []
        self.step = self.steps_per_epoch * (epoch - 1)
        self.rng = torch_generator("augment", self.seed, epoch, *distributed.own_stream())

    def features(self, rows: NDArray[np.int64] | None = None, augmented: bool = False) -> tuple[Tensor, Tensor]:
        """Unit-length image and text features (n, d) of training rows in eval mode, on the CPU.

        Without augmentation; `augmented` takes one augmented view of each image and the first text view of each caption,
        drawn from a generator of its own.
        """
        rows = np.arange(self.n_rows) if rows is None else rows
        encode, encode_tokens = self.model.encode_images, self.model.encode_tokens
        images = partial(pick, self.data.images)  # nothing is read before its batch is encoded
        distributed.average_buffers(self.model.net)
        if not augmented:
            return distributed.encode_together(encode, images, rows), distributed.encode_together(encode_tokens, self.data.plain_tokens.__getitem__, rows)
        rng = torch_generator("features", self.seed, self.epoch, *distributed.own_stream())
        image = distributed.encode_together(partial(encode, view=lambda batch: augment(batch, self.augment_settings, rng)), images, rows)
        return image, distributed.encode_together(encode_tokens, self.data.texts.epoch(self.epoch)[0].__getitem__, rows)

    def augment(self, images: Tensor, boxes: Tensor | None = None) -> Tensor:
        """One more augmented view of images in [0, 1], with the scale's augmentation whether or not the run says `+aug`.

        `boxes`, int64 (b, 4) of top, left, height, width, replace the crops that would be drawn.
        """
        return augment(images, self.augment_settings, self.rng, boxes)

    def gather(self, x: Tensor) -> Tensor:
        """The tensor of all processes, in rank order; gradient flows to the local part."""
        return distributed.gather(x)

    def generator(self, purpose: str) -> torch.Generator:
        """A CPU generator of its own for a purpose of the defense.

        The same purpose gives the same stream at every call: what is to differ from step to step needs the step in its
        name, as in `now.generator(f"noise {now.epoch} {now.step}")`.
        """
        return torch_generator("defense", self.seed, purpose)

    def warn(self, line: str) -> None:
        """A line for the run record: something that changes what a number means."""
        self.warnings.append(line)

    def tally(self, name: str, n: int = 1) -> None:
        """Adds to the epoch's count of `name`."""
        self.counts[name] = self.counts.get(name, 0) + n

    def log(self, name: str, value: float | Tensor) -> None:
        """Adds to the epoch's mean of `name`; a tensor is not read before the epoch ends."""
        total, n = self.sums.get(name, (0.0, 0))
        self.sums[name] = (total + (value.detach() if isinstance(value, Tensor) else value), n + 1)


@dataclass(frozen=True)
class TrainingData:
    """Rows in training order.

    Attributes:
        images: uint8 (n, S, S, 3), decoded or not.
        plain_tokens: uint16 (n, L), captions as they are.
        texts: the text views of each epoch.
    """

    images: Images
    plain_tokens: NDArray[np.uint16]
    texts: TextViews

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Budget:
    """How a training runs: the scale's settings with what `lab.train` overrode."""

    settings: TrainSettings
    augment: AugmentSettings
    augmented: bool
    seed: int


def train(model: Model, defense: Defense, data: TrainingData, budget: Budget, folder: Path, progress: Progress) -> list[dict[str, Any]]:
    """Trains `model` in place and returns one log row an epoch. Snapshots and the resumable state go to `folder`.

    Raises:
        BenchError: no complete batch, a pass without a step, a loss that is not finite.
    """
    settings = budget.settings
    n, batch_size = len(data), settings.batch_size
    steps_per_epoch = n // batch_size
    if steps_per_epoch == 0:
        raise BenchError(f"{n} pairs do not fill one batch of {batch_size}; use --set train.batch_size={max(2, n // 4)}")
    distributed.check_batch(batch_size)
    total = steps_per_epoch * settings.epochs
    warm = schedule.warmup(settings, total)
    torch.set_num_threads(settings.threads)
    pixels = Pixels(data.images, model.device)
    now = opening(model, data, budget)
    used = data.texts.vocabulary(data.plain_tokens)
    if used is not None:
        model.train_only(used)
    towers.prepare(model.net, settings)
    adam = optimizer(model.net, settings)
    log = _resume(folder / "state.pt", model, adam, defense, progress)
    gradients = _zero_gradients(adam)
    model.net.train()
    with progress.bar("training", settings.epochs * steps_per_epoch * batch_size, "pairs", len(log) * steps_per_epoch * batch_size) as advance:
        for epoch in range(len(log) + 1, settings.epochs + 1):
            now.begin(epoch)
            began, counted = time.perf_counter(), Counter(counts)  # what a defense plans is part of what it costs
            rng = torch_generator("views", budget.seed, epoch, *distributed.own_stream())
            tokens = torch.from_numpy(data.texts.epoch(epoch).astype(np.int64)).to(model.device)
            lengths = text_lengths(tokens)
            passes = defense.plan(epoch, now)
            model.net.train()
            work = [_batches(part, index, n, batch_size, budget.seed, epoch) for index, part in enumerate(passes)]
            planned = sum(len(batches) for batches in work)
            rates: list[float] = []
            done = 0
            for part, batches in zip(passes, work, strict=True):
                for index, (rows, shown) in enumerate(pixels.feed([distributed.share(rows) for rows in batches])):
                    position = steps_per_epoch * (epoch - 1) + done * steps_per_epoch / planned
                    now.step = int(position)
                    late = steps_per_epoch if settings.schedule == "official" else 0
                    peak = settings.lr if part.lr is None else part.lr
                    rate = peak(index, len(batches)) if callable(peak) else peak * schedule.factor(position + late, warm, total)
                    rates.append(rate)
                    for group in adam.param_groups:
                        group["lr"] = rate
                    batch = make_batch(shown, tokens, lengths, rows, budget, now, longest=int(lengths[batches[index]].max()))
                    adam.zero_grad(set_to_none=False)
                    loss = (part.loss or defense.loss)(model, defense.views(batch, rng), now)
                    torch.autograd.backward(loss)
                    distributed.average_gradients(gradients)
                    adam.step()
                    with torch.no_grad():
                        model.net.get_parameter("logit_scale").clamp_(0, MAX_LOGIT_SCALE)
                    now.log("loss_mean", loss)
                    done += 1
                    if done % 10 == 0 or done == planned:
                        advance(10 * batch_size if done % 10 == 0 else (done % 10) * batch_size, epoch=epoch, loss=float(loss.detach()))
            if not distributed.same_everywhere(defense.state):
                now.warn(f"epoch {epoch}: the defense's state differed between processes, and the first one's was kept; a defense must fill it from now.gather")
            distributed.average_buffers(model.net)
            log.append(_epoch_row(now, passes, rates, model, done, batch_size, time.perf_counter() - began, Counter(counts) - counted))
            if not distributed.leads():
                continue
            if _keeps(epoch, settings):
                save_weights(model, folder / snapshot_name(epoch))
            _save(folder / "state.pt", model, adam, defense, log)
    return log


def opening(model: Model, data: TrainingData, budget: Budget) -> Now:
    """Where a training stands before its first epoch."""
    settings, n = budget.settings, len(data)
    start = replace(model, net=_frozen_copy(model))
    return Now(
        settings.epochs, n // settings.batch_size, settings.batch_size, n, model, start, data, budget.augment, torch.Generator(), seed=budget.seed, augmented=budget.augmented
    )


def snapshot_name(epoch: int) -> str:
    """File name of an epoch's weights."""
    return f"epoch-{epoch:03d}.safetensors"


def _keeps(epoch: int, settings: TrainSettings) -> bool:
    return settings.snapshots == "all" or epoch % 4 == 0 or epoch > settings.epochs - 4


def handles(rows: Any, n: int, where: str) -> NDArray[np.int64]:
    """Row numbers as int64 (k,), in their order.

    Raises:
        BenchError: a mask, which numpy would take for rows 0 and 1, or a number outside of 0..n - 1; the sentence begins with `where`.
    """
    chosen = np.asarray(rows)
    if chosen.ndim != 1 or (chosen.size and not np.issubdtype(chosen.dtype, np.integer)):
        raise BenchError(f"{where} wants a list of row numbers, got {chosen.dtype} of shape {chosen.shape}; np.flatnonzero(mask) makes one of a mask")
    if chosen.size and (chosen.min() < 0 or chosen.max() >= n):
        raise BenchError(f"{where} holds handles outside 0..{n - 1}")
    return chosen.astype(np.int64)


def _batches(part: Pass, index: int, n: int, batch_size: int, seed: int, epoch: int) -> list[Tensor]:
    where = f"epoch {epoch}, pass {index + 1} ({part.phase})"
    rows = torch.arange(n) if part.rows is None else torch.as_tensor(handles(part.rows, n, f"{where}: Pass(rows=...)"))
    if len(rows) < batch_size:
        raise BenchError(f"{where}: {len(rows)} rows do not fill one batch of {batch_size}, so it would train nothing")
    order = rows[torch.randperm(len(rows), generator=torch_generator("order", seed, epoch, index))]
    return list(order[: len(rows) // batch_size * batch_size].view(-1, batch_size))


def text_lengths(tokens: Tensor) -> Tensor:
    """The longest text (n,) of each row in tokens (views, n, L), on the CPU."""
    return tokens.argmax(dim=-1).amax(dim=0).cpu() + 1  # the end token has the largest id


def make_batch(images: Tensor, tokens: Tensor, lengths: Tensor, rows: Tensor, budget: Budget, now: Now, longest: int | None = None) -> Batch:
    """The batch of these rows (b,): their images uint8 (b, S, S, 3), and their part of all tokens (views, n, L).

    `longest` is the number of tokens to keep where the rows are a part of a larger batch.
    """
    longest = longest or int(lengths[rows].max())
    rows = sent(rows, images.device)
    raw = images.permute(0, 3, 1, 2).float().div_(255)
    shown = augment(raw, budget.augment, now.rng) if budget.augmented else raw
    return Batch(shown, raw, tokens[:, rows, :longest], rows)


def _epoch_row(now: Now, passes: list[Pass], rates: list[float], model: Model, steps: int, batch_size: int, seconds: float, counted: Counter[str]) -> dict[str, Any]:
    row: dict[str, Any] = distributed.average({name: float(total) / n for name, (total, n) in now.sums.items()})
    if not all(np.isfinite(value) for value in row.values()):
        raise BenchError(f"epoch {now.epoch}: the loss is not finite; lower the learning rate, for instance --set train.lr={max(rates) / 4:g}")
    phases = sorted({part.phase for part in passes})
    row |= now.counts | {
        "epoch": now.epoch,
        "phase": now.phase or "+".join(phases),
        "warnings": now.warnings,
        "lr_first": rates[0],
        "lr_last": rates[-1],
        "logit_scale": float(model.scale.detach()),
        "steps": steps,
        "pairs": steps * batch_size,
        "seconds": seconds,
        "passes": {name: n * distributed.size() for name, n in counted.items()},
    }
    return row


def _zero_gradients(adam: torch.optim.Optimizer) -> Tensor | None:
    """Gradients of zero instead of none, so that a tower that a loss leaves out is stepped alike before and after a restart.

    Where several processes train, all of them lie in the buffer that is returned.
    """
    buffer = distributed.flat_gradients([parameter for group in adam.param_groups for parameter in group["params"]])
    if buffer is not None:
        return buffer
    for group in adam.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    return None


def _frozen_copy(model: Model) -> torch.nn.Module:
    frozen = copy.deepcopy(model.net).eval()
    frozen.requires_grad_(False)
    return frozen


def _save(path: Path, model: Model, adam: torch.optim.Optimizer, defense: Defense, log: list[dict[str, Any]]) -> None:
    buffer = io.BytesIO()
    torch.save({"model": model.net.state_dict(), "optimizer": adam.state_dict(), "defense": dict(defense.state), "log": log}, buffer)
    write_atomically(path, buffer.getvalue())


def _resume(path: Path, model: Model, adam: torch.optim.Optimizer, defense: Defense, progress: Progress) -> list[dict[str, Any]]:
    """Continues from the last whole epoch; a checkpoint that cannot be read is named and the training starts anew."""
    if not path.is_file():
        return []

    def to_device(storage: Any, place: str) -> Any:
        return storage if place == "cpu" else storage.to(device=model.device)

    try:
        saved = torch.load(path, map_location=to_device, weights_only=True)
        missing = {"model", "optimizer", "defense", "log"} - set(saved)
        if missing:
            raise ValueError(f"it has no {', '.join(sorted(missing))}")
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, TypeError, KeyError) as error:
        progress.say(f"the checkpoint {path} cannot be read ({(str(error).splitlines() or ['empty'])[0]}); training from the start")
        return []
    model.net.load_state_dict(saved["model"])
    adam.load_state_dict(saved["optimizer"])
    defense.state.clear()
    defense.state.update(saved["defense"])
    return list(saved["log"])
