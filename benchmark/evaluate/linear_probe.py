"""Linear probe: multinomial logistic regression on frozen image features, L2 chosen on a validation split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional

from benchmark.data.eval_sets import EvalSet, Split
from benchmark.evaluate.features import Encoder
from benchmark.evaluate.metric import Metric, rate
from benchmark.evaluate.zero_shot import mean_per_class_recall, test_name
from benchmark.settings import digest

DECADES = tuple(10.0**power for power in range(-6, 3))
_GRADIENT = 1e-5
_ITERATIONS = 1000


@dataclass(frozen=True)
class Fitted:
    """Weights (d, C) and bias (C,) on standardised features, and how they were chosen."""

    weights: Tensor
    bias: Tensor
    mean: Tensor
    sd: Tensor
    strength: float
    at_edge: bool

    def predict(self, features: Tensor) -> Tensor:
        """Class indices (n,)."""
        return (((features - self.mean) / self.sd) @ self.weights + self.bias).argmax(dim=1)


def fit(features: Tensor, labels: Tensor, n_classes: int, strength: float, start: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Weights (d, C) and bias (C,) that minimise mean cross-entropy + strength / 2 * |W|^2, the bias free.

    Full-batch L-BFGS with strong Wolfe line search in float32, until the largest gradient entry is below 1e-5 or 1,000
    iterations; from zero, or from a neighbouring solution. The problem is convex: where it starts changes the time it takes.
    """
    weights, bias = start or (torch.zeros(features.shape[1], n_classes), torch.zeros(n_classes))
    weights, bias = weights.clone().requires_grad_(), bias.clone().requires_grad_()
    solver = torch.optim.LBFGS([weights, bias], max_iter=_ITERATIONS, tolerance_grad=_GRADIENT, tolerance_change=1e-9, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = functional.cross_entropy(features @ weights + bias, labels) + strength / 2 * (weights * weights).sum()
        torch.autograd.backward(loss)
        return loss

    step: Callable[[Callable[[], Tensor]], Tensor] = solver.step
    step(closure)
    return weights.detach(), bias.detach()


def fit_validated(train: Tensor, train_labels: Tensor, validation: Tensor, validation_labels: Tensor, n_classes: int) -> Fitted:
    """The probe with the best L2: whole decades of 1e-6..1e2, then the half-decades beside the best; refit on both splits."""
    both = torch.cat([train, validation])
    mean, sd = both.mean(dim=0), both.std(dim=0).clamp(min=1e-6)
    train, validation, both = ((features - mean) / sd for features in (train, validation, both))
    scored: dict[float, float] = {}
    solutions: dict[float, tuple[Tensor, Tensor]] = {}

    def score(strength: float, start: tuple[Tensor, Tensor] | None) -> None:
        weights, bias = solutions[strength] = fit(train, train_labels, n_classes, strength, start)
        scored[strength] = float(((validation @ weights + bias).argmax(dim=1) == validation_labels).float().mean())

    for strength in reversed(DECADES):
        score(strength, solutions.get(strength * 10))
    best = _best(scored)
    for strength in (best / 10**0.5, best * 10**0.5):
        score(strength, solutions[best])
    best = _best(scored)
    weights, bias = fit(both, torch.cat([train_labels, validation_labels]), n_classes, best, solutions[best])
    return Fitted(weights, bias, mean, sd, best, best <= min(DECADES) or best >= max(DECADES))


def linear_probe(encoder: Encoder, eval_set: EvalSet, fitted: dict[str, Fitted]) -> tuple[list[Metric], Fitted]:
    """Accuracy of the probe on the set's test images. `fitted` holds probes by training set, so that shared ones fit once."""
    key = digest([eval_set.train.name, eval_set.train.labels.tolist(), eval_set.classnames])
    if key not in fitted:
        train, validation = (_features(encoder, split) for split in (eval_set.train, eval_set.validation))
        fitted[key] = fit_validated(train, torch.from_numpy(eval_set.train.labels), validation, torch.from_numpy(eval_set.validation.labels), len(eval_set.classnames))
    probe = fitted[key]
    test = torch.cat(encoder.images(test_name(eval_set), eval_set.test.images), dim=1)
    labels = torch.from_numpy(eval_set.test.labels)
    correct = probe.predict(test) == labels
    card = digest({**eval_set.card, "probe": "lbfgs"})[:16]
    metrics = [
        rate("linear_probe_acc1", eval_set.name, int(correct.sum()), len(labels), card),
        Metric("linear_probe_mean_per_class_recall", eval_set.name, mean_per_class_recall(correct, labels), len(labels), card=card),
        Metric("linear_probe_lambda", eval_set.name, probe.strength, len(eval_set.validation.labels), card=card),
    ]
    return metrics, probe


def predicted(encoder: Encoder, eval_set: EvalSet, probe: Fitted) -> pd.DataFrame:
    """A prediction row per test image."""
    classes = probe.predict(torch.cat(encoder.images(test_name(eval_set), eval_set.test.images), dim=1))
    return pd.DataFrame({"query_id": eval_set.test.ids, "true": eval_set.test.labels, "pred": classes.numpy()})


def missing_probe(eval_set: EvalSet) -> list[Metric]:
    """The probe's metrics without a value, for a set on which none can be trained."""
    card = digest({**eval_set.card, "probe": "lbfgs"})[:16]
    return [Metric(name, eval_set.name, None, 0, card=card) for name in ("linear_probe_acc1", "linear_probe_mean_per_class_recall")]


def _features(encoder: Encoder, split: Split) -> Tensor:
    return torch.cat(encoder.images(split.name, split.images), dim=1)


def _best(scored: dict[float, float]) -> float:
    """The best accuracy; ties go to the larger strength."""
    return max(scored, key=lambda strength: (scored[strength], strength))
