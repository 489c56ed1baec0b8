"""Groups of words that go with one kind of image although the rest of the caption argues for another (docs/methods/filters.md)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from benchmark.suspicion.clusters import shares

_WORD = re.compile(r"[^\W_]+")
_BOUND = 20.0
_BLOCK = 4096
_PSEUDO = 1.0
_COMMON = 0.1
NOTHING = -_BOUND


@dataclass(frozen=True)
class WordGroups:
    """Words that stand together in nearly the same captions, and how suspicious each group is.

    Attributes:
        words: of each group, in alphabetical order.
        n_rows: (G,) captions that hold the group's first word.
        scores: (G,) above 0 where in three quarters of its captions the rest contradicts the image.
        rows: (n,) the highest score of a row's groups; -20 for a row without any.
        winners: int64 (n,) the group with that score, or -1.
        incidence: bool (n, G), which group stands in which caption.
    """

    words: tuple[tuple[str, ...], ...]
    n_rows: NDArray[np.int64]
    scores: NDArray[np.float64]
    rows: NDArray[np.float64]
    winners: NDArray[np.int64]
    incidence: sparse.csr_array


def words_of(caption: str) -> list[str]:
    """Lower-case runs of letters and digits."""
    return _WORD.findall(caption.lower())


def word_lift(captions: Sequence[str], clusters: NDArray[np.int64], min_rows: int = 5, jaccard: float = 0.8) -> WordGroups:
    """Scores word groups by how often the rest of a caption contradicts the cluster of its image.

    Args:
        clusters: (n,) of each row's image.
        min_rows: words in fewer captions are left out.
        jaccard: words join a group whose first word stands in this share of the captions of either.
    """
    words, presence = _presence(captions, min_rows)
    founders, members = _groups(presence, jaccard)
    groups = tuple(tuple(words[place] for place in one) for one in members)
    inside = presence[:, founders].tocsr() if founders else sparse.csr_array((len(captions), 0))
    counts = np.asarray(inside.sum(axis=0)).ravel().astype(np.int64)
    n_clusters = int(clusters.max()) + 1 if len(clusters) else 0
    lift = _lift(inside, counts, clusters, n_clusters)
    margins = _margins(inside, lift, clusters, shares(clusters, n_clusters))
    scores = _scores(margins, inside, counts, lift, len(captions))
    rows, winners = _best(inside, scores)
    return WordGroups(groups, counts, scores, rows, winners, inside)


def _presence(captions: Sequence[str], min_rows: int) -> tuple[list[str], sparse.csc_array]:
    """Words in alphabetical order, and which caption holds which, (n, V)."""
    numbers: dict[str, int] = {}
    ids: list[NDArray[np.int64]] = []
    for caption in captions:
        ids.append(np.array([numbers.setdefault(word, len(numbers)) for word in dict.fromkeys(words_of(caption))], dtype=np.int64))
    lengths = np.array([len(one) for one in ids], dtype=np.int64)
    flat = np.concatenate(ids) if ids else np.zeros(0, dtype=np.int64)
    table = sparse.csc_array((np.ones(len(flat), dtype=np.float32), (np.repeat(np.arange(len(ids)), lengths), flat)), shape=(len(captions), len(numbers)))
    often = np.diff(table.indptr) >= min_rows
    known = sorted((word, number) for word, number in numbers.items() if often[number])
    return [word for word, _ in known], table[:, [number for _, number in known]]


def _groups(presence: sparse.csc_array, jaccard: float) -> tuple[list[int], list[list[int]]]:
    """Founding word of each group, and all of its words. Each word joins the first group whose founder it resembles."""
    sizes = np.diff(presence.indptr).astype(np.int64)
    place: dict[int, int] = {}
    founders: list[int] = []
    members: list[list[int]] = []
    for begin in range(0, presence.shape[1], _BLOCK):
        shared = (presence[:, begin : begin + _BLOCK].T @ presence).tocsr()
        for offset in range(shared.shape[0]):
            word = begin + offset
            span = slice(shared.indptr[offset], shared.indptr[offset + 1])
            others, both = shared.indices[span], shared.data[span]
            alike = np.sort(others[both >= jaccard * (sizes[word] + sizes[others] - both)])
            group = next((place[other] for other in alike.tolist() if other in place), None)
            if group is None:
                place[word] = len(founders)
                founders.append(word)
                members.append([word])
            else:
                members[group].append(word)
    return founders, members


def _lift(inside: sparse.csr_array, counts: NDArray[np.int64], clusters: NDArray[np.int64], n_clusters: int) -> NDArray[np.float32]:
    """A_g(c) = ln[(n_gc + a p(c)) / ((n_g + a) p(c))], (G, C)."""
    members = sparse.csr_array((np.ones(len(clusters), dtype=np.float32), (np.arange(len(clusters)), clusters)), shape=(len(clusters), n_clusters))
    together = np.asarray((inside.T @ members).todense(), dtype=np.float32)
    p = np.maximum(shares(clusters, n_clusters), 1e-12)
    return np.log((together + _PSEUDO * p) / ((counts[:, None] + _PSEUDO) * p)).astype(np.float32)


def _margins(inside: sparse.csr_array, lift: NDArray[np.float32], clusters: NDArray[np.int64], p: NDArray[np.float64]) -> NDArray[np.float32]:
    """For every group in every row: by how much the rest of the caption prefers another cluster to the image's, in [-20, 20]."""
    out = np.empty(inside.nnz, dtype=np.float32)
    prior = np.log(np.maximum(p, 1e-12)).astype(np.float32)
    for begin in range(0, inside.shape[0], _BLOCK):
        block = inside[begin : begin + _BLOCK]
        evidence = prior + np.asarray(block @ lift)
        rows = np.repeat(np.arange(block.shape[0]), np.diff(block.indptr))
        rest = evidence[rows] - lift[block.indices]
        own = clusters[begin + rows]
        place = np.arange(len(rows))
        of_own = rest[place, own]
        rest[place, own] = -np.inf
        first = inside.indptr[begin]
        out[first : first + len(rows)] = np.clip((rest.max(axis=1) if rest.shape[1] > 1 else of_own) - of_own, -_BOUND, _BOUND)
    return out


def _scores(margins: NDArray[np.float32], inside: sparse.csr_array, counts: NDArray[np.int64], lift: NDArray[np.float32], n: int) -> NDArray[np.float64]:
    """Of each group: the lower quartile of its margins times its largest lift; -20 for groups in more than a tenth of the rows."""
    scores = np.full(len(counts), NOTHING)
    order = np.lexsort((margins, inside.indices))
    ends = np.cumsum(np.bincount(inside.indices, minlength=len(counts)))
    for group in np.flatnonzero((counts <= _COMMON * n) & (counts > 0)).tolist():
        of_group = margins[order[ends[group] - counts[group] : ends[group]]]
        scores[group] = float(np.quantile(of_group, 0.25)) * float(lift[group].max())
    return scores


def _best(inside: sparse.csr_array, scores: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    rows, winners = np.full(inside.shape[0], NOTHING), np.full(inside.shape[0], -1, dtype=np.int64)
    filled = np.flatnonzero(np.diff(inside.indptr) > 0)
    if len(filled):
        of_entries = scores[inside.indices]
        rows[filled] = np.maximum.reduceat(of_entries, inside.indptr[filled])
        owner = np.repeat(np.arange(inside.shape[0]), np.diff(inside.indptr))
        hits = np.flatnonzero(of_entries == rows[owner])[::-1]
        winners[owner[hits]] = inside.indices[hits]
    return rows, winners
