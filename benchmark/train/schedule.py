"""The learning rate: linear warm-up, then a cosine to zero."""

import math

from benchmark.errors import BenchError
from benchmark.settings import TrainSettings


def warmup(settings: TrainSettings, total: int) -> int:
    """Warm-up in steps of `total`.

    Raises:
        BenchError: a warm-up as long as the whole training, where the cosine is not defined.
    """
    steps = settings.warmup_steps if settings.warmup_steps is not None else int(settings.warmup_frac * total)
    if steps >= total:
        raise BenchError(f"a warm-up of {steps} steps does not fit into a training of {total}; lower train.warmup_steps or use --set train.warmup_frac=0.2")
    return steps


def factor(step: float, warm: int, total: int) -> float:
    """The share of the peak rate at a step counted from 0."""
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / (total - warm)))
