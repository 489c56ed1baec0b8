"""The warm-up of a training that is a part of the run: of fewer pairs, or of fewer epochs."""

from __future__ import annotations

from benchmark.settings import TrainSettings
from benchmark.train.lab import Lab


def shrunk(settings: TrainSettings, part: int, whole: int) -> float | None:
    """Warm-up as a share of a training of `part` steps, for `lab.train(warmup_frac=...)`; None where the run's own fits.

    A warm-up in steps that does not fit becomes its share of `whole` steps; if it does not fit those either, it is left to be refused.
    """
    if settings.warmup_steps is None or settings.warmup_steps < part or settings.warmup_steps >= whole:
        return None
    return settings.warmup_steps / whole


def of_epochs(lab: Lab, epochs: int | None) -> float | None:
    """The warm-up of a training of all pairs for these epochs, None for all of the run's, beside that of the run."""
    settings = lab.train_settings
    steps = len(lab.pairs) // settings.batch_size
    return shrunk(settings, steps * (epochs or settings.epochs), steps * settings.epochs)
