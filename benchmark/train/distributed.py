"""One training over several processes, as `torchrun --nproc-per-node N -m benchmark run ...` starts them.

Every process runs the same program. They train together, each on its part of every batch; all else (drawing, packing,
evaluation, records) is done by the first one, and the others get its answer. Started without torchrun there is one process,
and every function here returns at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmark.errors import BenchError, PluginError, ProcessLost
from benchmark.stages import Stages

T = TypeVar("T")

TOGETHER = ("train",)
"""Kinds of stages that all processes make together; any other is made by the first one."""

_WAIT = timedelta(days=2)  # the others wait while the first one packs or evaluates; a process that dies is noticed at once
LOST = "another process of this run has ended, so this one stops; the same command continues after the last whole epoch"

_first_alone = False


def rank() -> int:
    """Which process this is, from 0; the first one while it works alone (`from_first`)."""
    return dist.get_rank() if dist.is_initialized() and not _first_alone else 0


def size() -> int:
    """How many processes train together; one while the first works alone (`from_first`), as on an attack's surrogate."""
    return dist.get_world_size() if dist.is_initialized() and not _first_alone else 1


def leads() -> bool:
    """Whether this process is the one that writes."""
    return rank() == 0


def facts() -> dict[str, int]:
    """What a training's key says of its processes: batch statistics are gathered by each from its own part. Nothing for one process."""
    return {"processes": size()} if size() > 1 else {}


def own_stream() -> tuple[int, ...]:
    """What sets a process's random draws for its part of a batch apart from the others'; nothing for the first process."""
    return (rank(),) if rank() else ()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Joins the processes that torchrun started; does nothing where it started none or one."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        torch.cuda.set_device(local % torch.cuda.device_count())
    before = signal.signal(signal.SIGTERM, _told_to_stop)
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_WAIT)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.ExitStack() as quiet:
            if not leads():
                quiet.enter_context(contextlib.redirect_stdout(nowhere))
                quiet.enter_context(contextlib.redirect_stderr(nowhere))
            yield
    finally:
        signal.signal(signal.SIGTERM, before)
        dist.destroy_process_group()


def gather(x: Tensor) -> Tensor:
    """The tensors (b, ...) of all processes in rank order, (N b, ...).

    With `average_gradients`, its gradient is that of the mean of all processes' losses: a loss of gathered features has the
    gradient that one process with the whole batch would have.
    """
    if size() == 1:
        return x
    gathered: Tensor = _Gather.apply(x)
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(size())]
        with _peers():
            dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        with _peers():
            dist.all_reduce(total)
        return total.chunk(size())[rank()]


def share(rows: Tensor) -> Tensor:
    """The rows (b / N,) of a batch (b,) that this process trains on."""
    return rows if size() == 1 else rows.chunk(size())[rank()]


def check_batch(batch_size: int) -> None:
    """Raises BenchError: a batch that cannot be divided among the processes."""
    if batch_size % size():
        near = batch_size // size() * size() or size()
        raise BenchError(f"a batch of {batch_size} pairs cannot be divided among {size()} processes; use --set train.batch_size={near} or another number of processes")


def flat_gradients(parameters: Sequence[Tensor]) -> Tensor | None:
    """One buffer of zeros in which the gradients of all parameters lie from now on; None for one process alone.

    `zero_grad(set_to_none=False)` keeps them there, and a tower that gets no gradient keeps zeros.
    """
    if size() == 1:
        return None
    buffer = torch.zeros(sum(parameter.numel() for parameter in parameters), device=parameters[0].device)
    begin = 0
    for parameter in parameters:
        part = buffer[begin : begin + parameter.numel()]
        parameter.grad = part.as_strided(parameter.shape, parameter.stride(), part.storage_offset())
        begin += parameter.numel()
    return buffer


def average_gradients(buffer: Tensor | None) -> None:
    """The mean over the processes, in place."""
    if buffer is not None:
        with _peers():
            dist.all_reduce(buffer)
        buffer /= size()


@torch.no_grad()
def average_buffers(net: nn.Module) -> None:
    """Gives all processes the mean of their batch statistics, which each has gathered from its own part of the batches."""
    if size() == 1:
        return
    means = [buffer for name, buffer in net.named_buffers() if name.endswith(("running_mean", "running_var"))]
    if not means:
        return
    flat = torch.cat([buffer.flatten() for buffer in means])
    with _peers():
        dist.all_reduce(flat)
    flat /= size()
    begin = 0
    for buffer in means:
        buffer.copy_(flat[begin : begin + buffer.numel()].view_as(buffer))
        begin += buffer.numel()


def average(values: dict[str, float]) -> dict[str, float]:
    """The mean over the processes of each named number; all must have the same names."""
    if size() == 1:
        return values
    names = sorted(values)
    if not names:
        return values
    flat = torch.tensor([values[name] for name in names], dtype=torch.float64)
    with _peers():
        dist.all_reduce(flat)
    return {name: value / size() for name, value in zip(names, flat.tolist(), strict=True)}


def encode_together(encode: Callable[[Any], Tensor], choose: Callable[[NDArray[np.int64]], Any], rows: NDArray[np.int64]) -> Tensor:
    """Features (n, d) of what `choose` takes for these rows, of which each process encodes a part."""
    if size() == 1:
        return encode(choose(rows))
    n = len(rows)
    most = -(-n // size())
    mine = encode(choose(rows[rank() * most : (rank() + 1) * most]))
    padded = torch.zeros(most, mine.shape[1])
    padded[: len(mine)] = mine
    return gather(padded)[:n]


def same_everywhere(state: dict[str, Any]) -> bool:
    """Gives all processes the first one's defense state; returns whether each had the very same."""
    if size() == 1:
        return True
    given = from_first(lambda: {name: value.cpu() if isinstance(value, Tensor) else value for name, value in state.items()})
    equal = given.keys() == state.keys() and all(_equal(given[name], state[name]) for name in given)
    for name, value in given.items():
        state[name] = value.to(state[name].device) if isinstance(value, Tensor) and isinstance(state.get(name), Tensor) else value
    different = average({"different": float(not equal)})["different"]
    return different == 0


def from_first(call: Callable[[], T]) -> T:
    """What `call` returns in the first process, in all of them; its BenchError or PluginError as well.

    Inside, the first process is alone: `size` is one, and stages and trainings are its own business there.
    """
    global _first_alone
    if size() == 1:
        return call()
    answer: list[Any] = [None, None]
    if leads():
        _first_alone = True
        try:
            answer[0] = call()
        except (BenchError, PluginError) as error:
            answer[1] = (isinstance(error, BenchError), str(error))
        finally:
            _first_alone = False
    with _peers():
        dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        bad_request, text = answer[1]
        raise (BenchError if bad_request else PluginError)(text)
    found: T = answer[0]
    return found


class SharedStages(Stages):
    """Stages of a run over several processes: the first one makes them, and trainings are made together."""

    def make(self, kind: str, facts: Any, build: Callable[[Path], None], resume: bool = False) -> Path:
        """As `Stages.make`; `build` of a training runs in every process, the first one's writes."""
        make = super().make
        if size() == 1 or kind not in TOGETHER:
            return from_first(lambda: make(kind, facts, build, resume))

        def announced(folder: Path) -> None:
            from_first(lambda: folder)
            build(folder)

        if leads():
            made = make(kind, facts, announced, resume)
            from_first(lambda: None)
            return made
        while (folder := from_first(_nothing)) is not None:
            build(folder)
        return self.path(kind, facts)


def _nothing() -> Path | None:
    return None


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other.cpu())
    return type(one) is type(other) and bool(one == other)


@contextlib.contextmanager
def _peers() -> Iterator[None]:
    """Turns the error of a collective whose peer has died into a sentence."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessLost(f"{LOST} ({str(error).splitlines()[0]})") from None


def _told_to_stop(number: int, frame: Any) -> None:
    sys.stderr.write(f"error: {LOST}\n")
    sys.stderr.flush()
    os._exit(1)
