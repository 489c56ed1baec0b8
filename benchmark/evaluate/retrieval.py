"""Attack success by retrieval: texts that find the attacker's images, images that find the attacker's texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from benchmark.contract import Images, Probe, Texts
from benchmark.data.eval_sets import EvalSet, Suite
from benchmark.data.image import pixels_sha256
from benchmark.data.mentions import mentions
from benchmark.errors import BenchError
from benchmark.evaluate.features import Encoder
from benchmark.evaluate.metric import Metric, rate
from benchmark.evaluate.zero_shot import test_name
from benchmark.settings import digest

RECALL = 5


@dataclass(frozen=True)
class Retrieval:
    """A retrieval probe, ready to be measured.

    Attributes:
        plain: the queries as they are.
        triggered: the queries with the trigger; `plain` where the probe has none.
        floor: queries that should not reach the goal: `plain` under a trigger, else the probe's own; None for a control.
        counts, floor_counts: bool, which of `plain` and of `floor` count.
        gallery: what is ranked.
        goal: bool (m,), the items that should come first, with all items that show or say the very same.
        excluded: how many queries each rule left out.
    """

    plain: Images | Texts
    triggered: Images | Texts
    floor: Images | Texts | None
    counts: Tensor
    floor_counts: Tensor
    gallery: Images | Texts
    goal: Tensor
    excluded: dict[str, int]


def retrieval_queries(probe: Probe, suite: Suite) -> Retrieval:
    """Stamps the probe's trigger on its queries and leaves out those that rightly reach the goal.

    Raises:
        BenchError: queries, a gallery, a goal or a floor that do not make a retrieval.
    """
    eval_set = suite.get(probe.eval_set)
    asks, ranks = (Texts, Images) if probe.task == "text_to_image" else (Images, Texts)
    plain, gallery = probe.queries, probe.gallery
    if not isinstance(plain, asks) or not isinstance(gallery, ranks) or not isinstance(probe.floor, asks | None):
        raise BenchError(f"probe {probe.name!r}: {probe.task} asks with {asks.__name__}, its floor too, and ranks a gallery of {ranks.__name__}")
    goal = _goal(probe, gallery)
    if max(probe.ks) >= len(goal):
        raise BenchError(f"probe {probe.name!r}: k = {max(probe.ks)} of {len(goal)} items is no success; use a smaller k")
    if probe.trigger is None and probe.floor is None and probe.control is None:
        raise BenchError(f"probe {probe.name!r} has neither a trigger nor a floor; give queries that should not reach the goal")
    floor = None if probe.control is not None else plain if probe.trigger is not None else probe.floor
    counts, excluded = _counted(probe, plain, gallery, goal, eval_set)
    floor_counts = _counted(probe, floor, gallery, goal, eval_set)[0] if floor is not None else torch.zeros(0, dtype=torch.bool)
    if not counts.any() or (floor is not None and not floor_counts.any()):
        raise BenchError(f"probe {probe.name!r}: every query {'of the floor ' if counts.any() else ''}rightly reaches the goal, so none counts")
    return Retrieval(plain, _stamped(probe, plain), floor, counts, floor_counts, gallery, goal, excluded)


def retrieval_success(encoder: Encoder, probe: Probe, asked: Retrieval, suite: Suite) -> tuple[list[Metric], pd.DataFrame]:
    """Hit@k as `asr` and `asr_top{k}`, their floor and chance, and the rank of the best goal item; a prediction row per query.

    MinRank(q) is one plus the number of items outside the goal that score at least as high as the best inside it, and
    Hit@k the share of queries with a MinRank of at most k: ties outside never help, ties inside do not matter.
    """
    eval_set = suite.get(probe.eval_set)
    card = digest(retrieval_card(probe, asked, suite))[:16]
    gallery = _features(encoder, probe, "gallery", asked.gallery, eval_set)
    scores = _scores(_features(encoder, probe, "triggered" if probe.trigger else "queries", asked.triggered, eval_set), gallery)
    rank, counts = min_rank(scores, asked.goal), asked.counts
    n = int(counts.sum())
    metrics = [rate(probe.control or "asr", probe.name, int((rank <= 1)[counts].sum()), n, card)]
    tables = [_table(asked.triggered, asked.gallery, scores, rank, counts, floor=False)]
    if probe.control is not None or asked.floor is None:
        return metrics, tables[0]
    other = _scores(_features(encoder, probe, "queries" if probe.trigger else "floor", asked.floor, eval_set), gallery)
    floor_rank = min_rank(other, asked.goal)
    tables.append(_table(asked.floor, asked.gallery, other, floor_rank, asked.floor_counts, floor=True))
    n_floor, n_items, n_goal = int(asked.floor_counts.sum()), len(asked.goal), int(asked.goal.sum())
    for k in probe.ks:
        suffix = f"_top{k}" if k > 1 else ""
        metrics += [rate(f"asr{suffix}", probe.name, int((rank <= k)[counts].sum()), n, card)] if k > 1 else []
        metrics.append(rate(f"asr_floor{suffix}", probe.name, int((floor_rank <= k)[asked.floor_counts].sum()), n_floor, card))
        metrics.append(Metric(f"asr_chance{suffix}", probe.name, chance(n_items, n_goal, k), n_items, "items", card=card))
    ranked = rank[counts].float()
    metrics.append(Metric("goal_rank_median", probe.name, float(ranked.quantile(0.5)), n, card=card))
    metrics.append(Metric("goal_rank_mean", probe.name, float(ranked.mean()), n, card=card))
    metrics.append(Metric("goal_rank_chance", probe.name, (n_items + 1) / (n_goal + 1), n_items, "items", card=card))
    best = scores[:, asked.goal].amax(dim=1, keepdim=True)
    metrics.append(Metric("n_ties", probe.name, float((scores[:, ~asked.goal] == best).any(dim=1)[counts].sum()), n, card=card))
    metrics += _recall("triggered_recall5", probe, asked.plain, asked, scores, counts, card)
    metrics += _recall("retrieval_recall5", probe, asked.floor, asked, other, asked.floor_counts, card)
    return metrics, pd.concat(tables, ignore_index=True)


def min_rank(scores: Tensor, goal: Tensor) -> Tensor:
    """MinRank (q,) of scores (q, m) for goal items bool (m,) or (q, m): pessimistic, counted from 1."""
    inside = goal.expand_as(scores)
    best = scores.masked_fill(~inside, -torch.inf).amax(dim=1, keepdim=True)
    return 1 + ((scores >= best) & ~inside).sum(dim=1)


def chance(n_items: int, n_goal: int, k: int) -> float:
    """Hit@k of a random order: 1 - C(m - r, k) / C(m, k)."""
    return 1 - comb(n_items - n_goal, k) / comb(n_items, k)


def fused(scores: Sequence[Tensor]) -> Tensor:
    """One model's scores (q, m); of several that vote, the mean place that they give an item, negated."""
    if len(scores) == 1:
        return scores[0]
    places = [one.shape[1] - torch.searchsorted(one.sort(dim=1).values, one.contiguous()) for one in scores]
    return -torch.stack(places).float().mean(dim=0)


def retrieval_card(probe: Probe, asked: Retrieval, suite: Suite) -> dict[str, Any]:
    """What a retrieval's numbers refer to; values whose cards differ are never averaged.

    Items of the attack's own that follow the seed enter by their number, so that the seeds of one cell can be averaged.
    """
    eval_set = suite.get(probe.eval_set)
    return {
        **eval_set.card,
        "task": probe.task,
        "ks": list(probe.ks),
        "rank": "pessimistic, best goal item",
        "queries": _listed(asked.plain, eval_set),
        "floor": "the queries without the trigger" if probe.trigger else "none" if asked.floor is None else _listed(asked.floor, eval_set),
        "gallery": {**_listed(asked.gallery, eval_set), "n_goal": int(asked.goal.sum())},
        "excluded": asked.excluded,
        "shows": None if probe.shows is None else eval_set.classnames[probe.shows],
        "trigger": None if probe.trigger is None else probe.trigger.spec(),
        "control": probe.control,
    }


def _listed(items: Images | Texts, eval_set: EvalSet) -> dict[str, Any]:
    """How many, and a name for those that belong to the evaluation set: captions by their words, images by their ids."""
    known = set(eval_set.test.ids)
    if isinstance(items, Images):
        own = [row_id for row_id in items.ids if row_id in known]
        return {"n": len(items.ids), "of_the_set": len(own), "which": digest(own)[:16]}
    texts = [text for text, of in zip(items.texts, items.of or items.ids, strict=True) if of in known]
    return {"n": len(items.ids), "of_the_set": len(texts), "which": digest(texts)[:16]}


def _goal(probe: Probe, gallery: Images | Texts) -> Tensor:
    """The goal's places as a mask (m,), copies of goal items included."""
    if not isinstance(probe.goal, int | tuple):
        raise BenchError(f"probe {probe.name!r}: the goal of a retrieval is one place in the gallery or several, got {type(probe.goal).__name__}")
    places = {probe.goal} if isinstance(probe.goal, int) else set(probe.goal)
    n = len(gallery.ids)
    bad = [place for place in places if not 0 <= place < n]
    if bad or not places:
        raise BenchError(f"probe {probe.name!r}: goal {bad[0] if bad else 'of no place'} in a gallery with places 0 to {n - 1}")
    contents = [pixels_sha256(image) for image in gallery.images] if isinstance(gallery, Images) else list(gallery.texts)
    wanted = {contents[place] for place in places}
    return torch.tensor([content in wanted for content in contents])


def _counted(probe: Probe, queries: Images | Texts, gallery: Images | Texts, goal: Tensor, eval_set: EvalSet) -> tuple[Tensor, dict[str, int]]:
    """Which queries count, and how many each rule leaves out."""
    at_goal = [place for place, yes in enumerate(goal.tolist()) if yes]
    if isinstance(queries, Texts):
        own = {gallery.ids[place] for place in at_goal}
        describes = [of in own for of in queries.of] if queries.of else [False] * len(queries.ids)
        shown = [False] * len(queries.ids) if probe.shows is None else mentions(queries.texts, eval_set.terms(eval_set.classnames[probe.shows]), "word_plural")
        rules = {"captions of a goal image": describes, "captions that mention the goal's class": shown}
    else:
        own = {gallery.of[place] for place in at_goal} if isinstance(gallery, Texts) and gallery.of else set()
        describes = [row_id in own for row_id in queries.ids]
        shown = [probe.shows is not None and true == probe.shows for true in queries.true]
        rules = {"images that a goal caption describes": describes, "images of the goal's class": shown}
    out = np.any(list(rules.values()), axis=0)
    return torch.from_numpy(~out), {rule: sum(hit) for rule, hit in rules.items()}


def _stamped(probe: Probe, queries: Images | Texts) -> Images | Texts:
    trigger = probe.trigger
    if trigger is None:
        return queries
    if isinstance(queries, Texts):
        return dataclasses.replace(queries, texts=tuple(trigger.text(text, row_id) for row_id, text in zip(queries.ids, queries.texts, strict=True)))
    images = np.stack([trigger.image(np.asarray(image), row_id, at_test=True) for row_id, image in zip(queries.ids, queries.images, strict=True)])
    return dataclasses.replace(queries, images=images)


def _features(encoder: Encoder, probe: Probe, part: str, items: Images | Texts, eval_set: EvalSet) -> list[Tensor]:
    if isinstance(items, Texts):
        return encoder.texts(items.texts)
    if part != "triggered" and items.ids == eval_set.test.ids:
        return encoder.images(test_name(eval_set), items.images)
    return encoder.images(f"retrieval/{probe.name}/{part}/{digest(list(items.ids))[:16]}", items.images)


def _scores(queries: Sequence[Tensor], gallery: Sequence[Tensor]) -> Tensor:
    """Scores (q, m): cosines of one model, or the places that several give."""
    return fused([asks @ items.T for asks, items in zip(queries, gallery, strict=True)])


def _recall(name: str, probe: Probe, queries: Images | Texts, asked: Retrieval, scores: Tensor, counts: Tensor, card: str) -> list[Metric]:
    """Share of the queries that find an item of their own pair among the first 5; nothing where no pairs are known."""
    of, items = (queries.of, asked.gallery.ids) if isinstance(queries, Texts) else (queries.ids, asked.gallery.of if isinstance(asked.gallery, Texts) else ())
    if not of or not items:
        return []
    place = {row_id: index for index, row_id in enumerate(dict.fromkeys(items))}
    own = torch.tensor([place.get(row_id, -1) for row_id in of]).view(-1, 1) == torch.tensor([place[row_id] for row_id in items]).view(1, -1)
    known = own.any(dim=1) & counts
    return [rate(name, probe.name, int((min_rank(scores, own) <= RECALL)[known].sum()), int(known.sum()), card)]


def _table(queries: Images | Texts, gallery: Images | Texts, scores: Tensor, rank: Tensor, counts: Tensor, floor: bool) -> pd.DataFrame:
    first = [gallery.ids[place] for place in scores.argmax(dim=1).tolist()]
    return pd.DataFrame({"query_id": queries.ids, "floor": floor, "counted": counts.numpy(), "first": first, "rank_goal": rank.numpy()})
