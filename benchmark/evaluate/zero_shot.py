"""Zero-shot accuracy on untouched test images."""

from __future__ import annotations

import pandas as pd
import torch
from torch import Tensor

from benchmark.data.eval_sets import EvalSet
from benchmark.evaluate.features import Encoder, ranks, tied
from benchmark.evaluate.metric import Metric, rate
from benchmark.settings import digest


def test_name(eval_set: EvalSet) -> str:
    """A name for the set's test images; sets that share images share it."""
    return eval_set.test.name


def zero_shot(encoder: Encoder, eval_set: EvalSet) -> tuple[list[Metric], pd.DataFrame]:
    """Accuracy with prompt ensembles, and a prediction row per image. Ties never help."""
    scores = encoder.scores(test_name(eval_set), eval_set.test.images, eval_set)
    labels = torch.from_numpy(eval_set.test.labels)
    rank = ranks(scores, labels)
    card = digest(eval_set.card)[:16]
    n = len(labels)
    metrics = [rate("zero_shot_acc1", eval_set.name, int((rank <= 1).sum()), n, card)]
    if len(eval_set.classnames) > 5:
        metrics.append(rate("zero_shot_acc5", eval_set.name, int((rank <= 5).sum()), n, card))
    metrics.append(Metric("zero_shot_mean_per_class_recall", eval_set.name, mean_per_class_recall(rank <= 1, labels), n, card=card))
    metrics.append(Metric("n_ties", eval_set.name, float(tied(scores, labels).sum()), n, card=card))
    predictions = pd.DataFrame({"query_id": eval_set.test.ids, "true": labels.numpy(), "pred": scores.argmax(dim=1).numpy(), "rank_true": rank.numpy()})
    return metrics, predictions


def mean_per_class_recall(correct: Tensor, labels: Tensor) -> float:
    """Mean over the classes that occur of the share recognised."""
    return float(torch.stack([correct[labels == label].float().mean() for label in torch.unique(labels)]).mean())
