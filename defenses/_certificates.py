"""Certificates of votes: how large a change of the voters provably leaves a prediction as it is.

All on whole numbers: votes int64 (m, C) of m queries, ties to the smaller class. Checked against every attack on small cases.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from benchmark.contract import Certificates

Ints = NDArray[np.int64]


def winners(votes: Ints) -> Ints:
    """Classes (m,) with the most votes; ties, and queries without a vote, go to the smaller class."""
    return np.asarray(votes.argmax(axis=1), dtype=np.int64)


def gaps(votes: Ints) -> Ints:
    """How many votes (m,) the winner is ahead of what would beat each other class, at least: min over c of s_a - s_c - [c < a]."""
    best = winners(votes)
    classes = np.arange(votes.shape[1])
    ahead = np.take_along_axis(votes, best[:, None], axis=1) - votes - (classes < best[:, None])
    ahead[classes == best[:, None]] = np.iinfo(np.int64).max
    return np.asarray(ahead.min(axis=1), dtype=np.int64)


def nearest_votes(distances: NDArray[np.floating], labels: Ints, n_classes: int, longest: int) -> Ints:
    """Votes (m, longest + 1, C) of the 0, 1, ..., `longest` nearest support images, by distances (m, n) and then by place.

    Where there are fewer images, all of them vote.
    """
    order = np.argsort(distances, axis=1, kind="stable")[:, :longest]
    single = labels[order][:, :, None] == np.arange(n_classes)
    votes = np.zeros((len(distances), longest + 1, n_classes), dtype=np.int64)
    np.cumsum(single, axis=1, out=votes[:, 1 : order.shape[1] + 1])
    votes[:, order.shape[1] + 1 :] = votes[:, order.shape[1]][:, None]
    return votes


def knn_holds(votes: Ints, k: int, added: int, removed: int) -> NDArray[np.bool_]:
    """Whether the k-nearest vote stays (m,) if exactly `added` images are added and `removed` are taken away, at their worst.

    New images come first and push out the farthest of the old; images taken away are of the winner's class and let the next
    ones in. `votes` as of `nearest_votes`, up to k + removed at least.
    """
    best = winners(votes[:, k])
    if added > k:
        return np.zeros(len(votes), dtype=bool)
    left = votes[:, k - added + removed]
    classes = np.arange(votes.shape[2])
    enough = np.take_along_axis(left, best[:, None], axis=1) - removed >= left + added + (classes < best[:, None])
    enough[classes == best[:, None]] = True
    return np.asarray(enough.all(axis=1))


def knn_added(votes: Ints, k: int) -> Ints:
    """Radius (m,) against added images: at most k - 1, as k of them are the whole vote."""
    return _longest_run([knn_holds(votes, k, size, 0) for size in range(k)])


def knn_removed(votes: Ints, k: int) -> Ints:
    """Radius (m,) against images taken away, up to what `votes` reach beyond k."""
    return _longest_run([knn_holds(votes, k, 0, size) for size in range(votes.shape[1] - k)])


def knn_mixed(votes: Ints, k: int, added: int, removed: int) -> NDArray[np.bool_]:
    """Whether the vote stays (m,) under up to `added` new images and up to `removed` taken away."""
    return np.asarray(np.all([knn_holds(votes, k, more, less) for more in range(added + 1) for less in range(removed + 1)], axis=0))


def knn_modified(votes: Ints, k: int) -> Ints:
    """Radius (m,) against e images added and e taken away, so against e changed ones (Jia et al., 2022): half the gap."""
    return np.asarray(gaps(votes[:, k]) // 2)


def ball_votes(distances: NDArray[np.floating], labels: Ints, n_classes: int, radius: float) -> Ints:
    """Votes (m, C) of the support images within a distance, by distances (m, n)."""
    inside = (distances <= radius).astype(np.int64)
    return np.asarray(inside @ (labels[:, None] == np.arange(n_classes)).astype(np.int64))


def joint_turned(ahead: Ints, predicted: Ints, correct: NDArray[np.bool_], size: int) -> int:
    """How many of the correct queries one attack of this size can turn at most, by gaps (m,) of votes in balls.

    In a group of correct queries of pairwise different classes, an attack that adds `size` images can use all of them
    against every query, but an image taken away serves against one query alone: that of its class. So query i costs
    max(0, gap_i + 1 - size) removals, and the cheapest are turned first. Groups: the j-th surest query of every class.
    """
    turned = 0
    place = np.zeros(len(ahead), dtype=np.int64)
    for one in np.unique(predicted[correct]):
        rows = np.flatnonzero(correct & (predicted == one))
        place[rows[np.argsort(-ahead[rows], kind="stable")]] = np.arange(len(rows))
    for group in range(int(place[correct].max(initial=-1)) + 1):
        costs = np.sort(np.maximum(0, ahead[correct & (place == group)] + 1 - size))
        turned += int((np.cumsum(costs) <= size).sum())
    return turned


def trimmed(distances: NDArray[np.floating], shift: int = 0) -> NDArray[np.float64]:
    """Mean of the middle of sorted distances (..., K): positions K'+1 .. K-K', moved by `shift`, with K' = (K - 1) // 2."""
    shots = distances.shape[-1]
    cut = (shots - 1) // 2
    if abs(shift) > cut:
        raise ValueError(f"a shift of {shift} leaves the {shots} distances")
    return np.asarray(distances[..., cut + shift : shots - cut + shift].mean(axis=-1))


def few_shot_radii(distances: NDArray[np.floating], everywhere: bool) -> tuple[Ints, Ints]:
    """Predictions and radii (m,) of the class with the smallest trimmed mean distance (FCert; Wang et al., 2024).

    Args:
        distances: (m, C, K), of each query to the K support images of each class.
        everywhere: the attacker changes up to T images in every class; else up to T in all.
    """
    ordered = np.sort(np.asarray(distances, dtype=np.float64), axis=2)
    cut = (ordered.shape[2] - 1) // 2
    predicted = trimmed(ordered).argmin(axis=1)
    upper, lower = ([trimmed(ordered, sign * size) for size in range(cut + 1)] for sign in (1, -1))
    classes = np.arange(ordered.shape[1])

    def holds(own: int, others: int) -> NDArray[np.bool_]:
        above = np.take_along_axis(upper[own], predicted[:, None], axis=1)
        below = lower[others]
        enough = np.where(predicted[:, None] < classes, above <= below, above < below)
        enough[classes == predicted[:, None]] = True
        return np.asarray(enough.all(axis=1))

    if everywhere:
        return predicted, _longest_run([holds(size, size) for size in range(cut + 1)])
    return predicted, _longest_run([np.all([holds(own, size - own) for own in range(size + 1)], axis=0) for size in range(cut + 1)])


def partition_certificates(predicted: Ints, n_classes: int, unit: str = "images") -> list[Certificates]:
    """Certificates of the majority vote of models trained on disjoint partitions (Levine and Feizi, 2021).

    One training row or distinct image more or less changes one partition, a changed one at most two.

    Args:
        predicted: classes (P, m) of each model.
        unit: `images` if partitions go by the image, `rows` if they go by image and caption.
    """
    votes = (predicted[:, :, None] == np.arange(n_classes)).sum(axis=0)
    radius = gaps(votes) // 2
    parts, best = len(predicted), winners(votes)
    words = {"images": "distinct training images", "rows": "training rows"}[unit]
    about = f"the vote of {parts} models, each trained on its own part of the pairs, at most {parts // 2} of which an attack may change"
    return [
        Certificates("insert_delete", best, radius, f"{words} added or removed", "none", about, parts // 2, parts),
        Certificates("modify", best, radius // 2, f"{words} changed", "none", about, parts // 4, parts),
    ]


def _longest_run(holds: list[NDArray[np.bool_]]) -> Ints:
    """The last size (m,) up to which all sizes hold, from 0; -1 if the first does not."""
    return np.asarray(np.cumprod(np.stack(holds), axis=0).sum(axis=0) - 1, dtype=np.int64)
