"""BatchNorm's running statistics while a repair trains on images that nobody will query."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from benchmark.train.model import Model


@contextmanager
def still(model: Model, on: bool = True) -> Iterator[None]:
    """Passes within it normalise by their own batch, as training does, and leave the running mean and variance as they are.

    A few hundred steps on noisy or cropped images move those to images that the model is not evaluated on, whatever the
    learning rate. `on=False` does nothing.
    """
    norms = [module for module in model.net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)] if on else []
    before = [module.momentum for module in norms]
    for module in norms:
        module.momentum = 0.0
    try:
        yield
    finally:
        for module, momentum in zip(norms, before, strict=True):
            module.momentum = momentum
