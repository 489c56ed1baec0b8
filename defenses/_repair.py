"""What methods share that repair a poisoned model: where they start, how long they train, and their learning rate."""

from __future__ import annotations

from functools import partial

from benchmark.contract import Defense
from benchmark.train.lab import Granted, Lab, Trained
from benchmark.train.loop import Now
from benchmark.train.model import Model
from benchmark.train.schedule import factor
from defenses.clip import Clip


def poisoned(lab: Lab) -> Model:
    """The model of `--defense clip`, trained once for all of them; `+aug` is about the pairs that repair it, not about this."""
    return lab.train(Clip(), augmented=False).model


def sweeps(n_pairs: int, batch_size: int, epochs: int, min_steps: int) -> int:
    """Epochs: at least as many as asked for, and enough for the fewest steps."""
    return max(epochs, -(-min_steps // max(1, n_pairs // batch_size)))


def fine_tune(lab: Lab, defense: Defense, clean: Granted, epochs: int, batch_size: int, **changes: object) -> Trained:
    """Continues from the poisoned model on clean pairs, with a fresh optimizer and the rates of the defense's own passes."""
    batch = min(batch_size, len(clean))
    return lab.train(defense, start=poisoned(lab), data=clean, epochs=epochs, batch_size=batch, warmup_frac=0.0, schedule="fixed", **changes)  # type: ignore[arg-type]


def cosine(lr: float, warmup_steps: int, epoch: int, now: Now, late: bool = False) -> partial[float]:
    """Rates of an epoch (from 1) on a linear warm-up of at most 5 % of all steps and a cosine to zero.

    `late` counts steps one epoch late and does not shorten the warm-up, as CleanCLIP's released code.
    """
    total = now.epochs * now.steps_per_epoch
    warm = warmup_steps if late else min(warmup_steps, max(1, int(0.05 * total)))
    return partial(_rate, lr, now.steps_per_epoch * (epoch - (0 if late else 1)), warm, total)


def _rate(lr: float, offset: int, warm: int, total: int, step: int, n_steps: int) -> float:
    return lr * factor(offset + step, warm, total) if total > warm else lr
