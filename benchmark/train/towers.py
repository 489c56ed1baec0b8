"""How the towers of a model are run in training: activations computed a second time instead of kept, and a compiled image tower."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
from collections.abc import Iterator

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmark.errors import BenchError
from benchmark.settings import TrainSettings
from benchmark.train.model import RESIDUAL_BLOCKS

_COMPILERS = ("c++", "g++", "clang++")


def prepare(net: nn.Module, settings: TrainSettings) -> None:
    """Makes the towers run as the settings say, for as long as this network lives. Copies of it run in the plain way or in this one, with equal results.

    Raises:
        BenchError: the image tower has no blocks to recompute, or there is nothing to compile with.
    """
    if settings.towers == "recomputed":
        recompute(net)
    if settings.towers == "compiled":
        _check_compiler(next(net.parameters()).device)
        net.get_submodule("visual").compile()


def recompute(net: nn.Module) -> None:
    """Lets every residual block keep its input alone and compute the rest again for the gradient (Chen et al., 2016).

    Raises:
        BenchError: the image tower has no such blocks.
    """
    if not _blocks(net.get_submodule("visual")):
        raise BenchError("train.towers=recomputed needs an image tower of open_clip's residual blocks, as RN50 and ViT-B-32 have; this one has none")
    for block in _blocks(net):
        if "forward" not in vars(block):
            again = functools.partial(_without_statistics, block)
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, context_fn=lambda again=again: (contextlib.nullcontext(), again()))


def _blocks(net: nn.Module) -> list[nn.Module]:
    return [module for module in net.modules() if isinstance(module, RESIDUAL_BLOCKS)]


@contextlib.contextmanager
def _without_statistics(block: nn.Module) -> Iterator[None]:
    """Batch statistics are counted when a block is computed first, and not once more."""
    norms = [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)]
    counted = [dict(norm.named_buffers()) for norm in norms]
    for norm, buffers in zip(norms, counted, strict=True):
        for name, value in buffers.items():
            setattr(norm, name, value.clone())
    try:
        yield
    finally:
        for norm, buffers in zip(norms, counted, strict=True):
            for name, value in buffers.items():
                setattr(norm, name, value)


def _check_compiler(device: torch.device) -> None:
    if device.type == "cpu" and not os.environ.get("CXX") and not any(map(shutil.which, _COMPILERS)):
        raise BenchError("train.towers=compiled needs a C++ compiler for a CPU, and none is installed: apt install g++")
