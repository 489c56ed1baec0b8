"""Attack success: one implementation, driven by the probe's goal. No attack chooses a denominator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmark.contract import Images, Probe, Texts
from benchmark.data.eval_sets import EvalSet, Suite
from benchmark.errors import BenchError
from benchmark.evaluate.features import Encoder, ranks, tied
from benchmark.evaluate.metric import Metric, rate
from benchmark.evaluate.statistics import TARGET_IMAGES
from benchmark.evaluate.zero_shot import test_name
from benchmark.settings import digest


@dataclass(frozen=True)
class Queries:
    """The images of a probe: as they are, with the trigger, true classes (-1: not known) and goals, each (n,)."""

    ids: tuple[str, ...]
    plain: NDArray[np.uint8]
    triggered: NDArray[np.uint8]
    true: Tensor
    goal: Tensor
    name: str

    def attacked(self, probe: Probe) -> Tensor:
        """Which queries count: true class other than the goal, and among the probe's sources if it has any."""
        counts = self.true != self.goal
        if probe.sources is not None:
            counts &= torch.isin(self.true, torch.tensor(probe.sources))
        return counts


def queries(probe: Probe, suite: Suite, stamped: dict[str, NDArray[np.uint8]] | None = None) -> Queries:
    """Stamps the probe's trigger on its images. The trigger is the one that poisoned the training images.

    Args:
        stamped: images with triggers of other probes, by `triggered_name`; those that are made here join them.
    """
    check_queries(probe, suite)
    eval_set = suite.get(probe.eval_set)
    if isinstance(probe.queries, Images):
        ids, plain, true = probe.queries.ids, probe.queries.images, torch.tensor(probe.queries.true)
        name = f"probe/{probe.name}/{digest(list(ids))[:16]}"
    else:
        ids, plain, true = eval_set.test.ids, eval_set.test.images, torch.from_numpy(eval_set.test.labels)
        name = test_name(eval_set)
    trigger = probe.trigger
    triggered = plain
    if trigger is not None:
        known = {} if stamped is None else stamped
        key = triggered_name(name, probe)
        if key not in known:
            known[key] = np.empty(plain.shape, np.uint8)
            for row, row_id in enumerate(ids):
                known[key][row] = trigger.image(np.asarray(plain[row]), row_id, at_test=True)
        triggered = known[key]
    return Queries(ids, plain, triggered, true, _goals(probe, true), name)


def triggered_name(name: str, probe: Probe) -> str:
    """What stands for the images of this name with the probe's trigger."""
    return name if probe.trigger is None else f"{name}/{digest(probe.trigger.spec())[:16]}"


def check_queries(probe: Probe, suite: Suite) -> None:
    """Checks what `queries` and `attack_success` take for granted.

    Raises:
        BenchError: texts instead of images, a k as large as the number of classes, or goals that do not fit the queries.
    """
    eval_set = suite.get(probe.eval_set)
    if probe.task != "classify" or isinstance(probe.queries, Texts):
        raise BenchError(f"probe {probe.name!r}: images are classified, and this one is a {probe.task} of {type(probe.queries).__name__}")
    if max(probe.ks) >= len(eval_set.classnames):
        raise BenchError(f"probe {probe.name!r}: k = {max(probe.ks)} of {len(eval_set.classnames)} classes is no success; use a smaller k")
    _goals(probe, torch.tensor(probe.queries.true) if isinstance(probe.queries, Images) else torch.from_numpy(eval_set.test.labels))


def attack_success(encoder: Encoder, probe: Probe, asked: Queries, suite: Suite) -> tuple[list[Metric], pd.DataFrame]:
    """ASR with its floor, and what else the same forward pass tells; a prediction row per query.

    Images of the goal class are in neither numerator nor denominator; `asr_all` has them, for comparison with published
    code only. A probe without a trigger (targeted) counts targets, or the images of each, and its floor is the share of other images that are
    taken for each target's class.
    """
    eval_set = suite.get(probe.eval_set)
    check_queries(probe, suite)
    card = digest(card_of(probe, asked, suite))[:16]
    units = units_of(probe)
    scores = encoder.scores(triggered_name(asked.name, probe), asked.triggered, eval_set, probe.trigger)
    plain = encoder.scores(asked.name, asked.plain, eval_set)
    counts = asked.attacked(probe)
    n = int(counts.sum())
    known = counts & (asked.true >= 0)
    rank_goal = ranks(scores, asked.goal)
    rank_true = ranks(scores, asked.true.clamp(min=0))
    floor_rank = ranks(plain, asked.goal)
    metrics = [rate(probe.control or "asr", probe.name, int((rank_goal <= 1)[counts].sum()), n, card, units)]
    goal_score = scores.gather(1, asked.goal.view(-1, 1)).squeeze(1)
    best_other = scores.scatter(1, asked.goal.view(-1, 1), -torch.inf).amax(dim=1)
    if probe.control is None:
        metrics += [rate(f"asr_top{k}", probe.name, int((rank_goal <= k)[counts].sum()), n, card, units) for k in probe.ks if k > 1]
        if probe.trigger is None:
            metrics.append(_collateral(encoder, probe, asked, eval_set, card))
        else:
            metrics.append(rate("asr_floor", probe.name, int((floor_rank <= 1)[counts].sum()), n, card))
            metrics.append(rate("asr_all", probe.name, int((rank_goal <= 1).sum()), len(counts), card))
            metrics.append(rate("untriggered_acc1", probe.name, int((ranks(plain, asked.true.clamp(min=0)) <= 1)[known].sum()), int(known.sum()), card))
        metrics.append(rate("triggered_acc1", probe.name, int((rank_true <= 1)[known].sum()), int(known.sum()), card, units))
        if n:
            ranked = rank_goal[counts].float()
            metrics.append(Metric("goal_rank_median", probe.name, float(ranked.quantile(0.5)), n, units, card=card))
            metrics.append(Metric("goal_rank_mean", probe.name, float(ranked.mean()), n, units, card=card))
            metrics.append(Metric("goal_margin_mean", probe.name, float((goal_score - best_other)[counts].mean()), n, units, card=card))
        metrics.append(Metric("n_ties", probe.name, float(tied(scores, asked.goal)[counts].sum()), n, units, card=card))
    predictions = pd.DataFrame(
        {
            "query_id": asked.ids,
            "true": asked.true.numpy(),
            "goal": asked.goal.numpy(),
            "counted": counts.numpy(),
            "pred": scores.argmax(dim=1).numpy(),
            "rank_goal": rank_goal.numpy(),
            "rank_true": torch.where(asked.true >= 0, rank_true, -1).numpy(),
            "rank_goal_untriggered": floor_rank.numpy(),
            "margin": (goal_score - best_other).numpy(),
        }
    )
    return metrics, predictions


def units_of(probe: Probe) -> str:
    """What a probe's queries count as."""
    if probe.trigger is not None:
        return "queries"
    return "targets" if probe.per_target == 1 else TARGET_IMAGES


def card_of(probe: Probe, asked: Queries, suite: Suite) -> dict[str, Any]:
    """What an attack's numbers refer to; values whose cards differ are never averaged."""
    card = {**suite.get(probe.eval_set).card, "task": probe.task, "ks": list(probe.ks), "exclusion": "true class is the goal", "rank": "pessimistic", "sources": probe.sources}
    if probe.control is not None:
        card["control"] = probe.control
    if probe.trigger is None:
        several = {"images_per_target": probe.per_target} if probe.per_target > 1 else {}
        return {**card, "queries": "targets", "floor": "other test images taken for the goal", "n_targets": len(asked.ids) // probe.per_target, **several}
    spec = probe.trigger.spec()
    goal = dict(probe.goal) if isinstance(probe.goal, Mapping) else probe.goal
    return {**card, "queries": "test", "trigger": spec, "goal": {str(key): value for key, value in goal.items()} if isinstance(goal, dict) else goal}


def _goals(probe: Probe, true: Tensor) -> Tensor:
    if isinstance(probe.goal, int):
        return torch.full_like(true, probe.goal)
    if isinstance(probe.goal, Mapping):
        return torch.tensor([probe.goal[int(label)] for label in true])
    if len(probe.goal) != len(true):
        raise BenchError(f"probe {probe.name!r} has {len(probe.goal)} goals for {len(true)} queries; give one goal, or one for each query")
    return torch.tensor(probe.goal)


def _collateral(encoder: Encoder, probe: Probe, asked: Queries, eval_set: EvalSet, card: str) -> Metric:
    """Mean over targets of the share of the set's test images, of other classes, that are taken for the target's class."""
    scores = encoder.scores(test_name(eval_set), eval_set.test.images, eval_set)
    labels = torch.from_numpy(eval_set.test.labels)
    shares = []
    for goal in asked.goal.tolist():
        others = labels != goal
        shares.append(float((ranks(scores, torch.full_like(labels, goal)) <= 1)[others].float().mean()))
    return Metric("asr_floor", probe.name, float(np.mean(shares)), len(labels), "queries", card=card)
