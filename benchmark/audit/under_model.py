"""Suspects that a model sees: unlike pairs, outliers, and words that contradict the rest of their captions."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmark.audit.suspects import Suspect, suspect
from benchmark.data.image import decode_ref
from benchmark.errors import BenchError
from benchmark.progress import Progress
from benchmark.seeding import generator
from benchmark.suspicion.clusters import spherical_kmeans, usual_number
from benchmark.suspicion.neighbours import Points, dao, finite
from benchmark.suspicion.words import word_lift
from benchmark.train.model import Model

K = 16
REFERENCE = 2048
_BLOCK = 1024


def encode(model: Model, refs: Sequence[str], captions: Sequence[str], folder: Path, progress: Progress) -> tuple[Tensor, NDArray[np.float32], list[int]]:
    """Unit-length image features (n, d), kept in a file in `folder`, cosines of image and caption (n,), and rows that cannot be read."""
    features = np.lib.format.open_memmap(folder / "image.npy", mode="w+", dtype=np.float32, shape=(len(refs), model.width))
    cosines = np.zeros(len(refs), dtype=np.float32)
    broken: list[int] = []
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool, progress.bar("encoding pairs", len(refs), "pairs") as advance:
        for begin in range(0, len(refs), _BLOCK):
            shown = list(pool.map(partial(_decoded, model.side), refs[begin : begin + _BLOCK]))
            broken += [row for row, image in enumerate(shown, begin) if image is None]
            blank = np.zeros((model.side, model.side, 3), dtype=np.uint8)
            image = model.encode_images(np.stack([blank if one is None else one for one in shown]))
            text = model.encode_texts(captions[begin : begin + _BLOCK])
            features[begin : begin + len(image)] = image.numpy()
            cosines[begin : begin + len(image)] = (image * text).sum(dim=1).numpy()
            advance(len(image))
    features.flush()
    return torch.from_numpy(features), cosines, broken


def unlike(captions: Sequence[str], cosines: NDArray[np.float32], images: NDArray[np.int64], hashes: NDArray[np.uint64], skipped: Sequence[int]) -> Iterator[Suspect]:
    """Pairs whose image and caption are least similar."""
    for row in _first(-cosines.astype(np.float64), skipped):
        yield suspect("dissimilar", captions[row], f"cosine {cosines[row]:.3f} of image and caption", -float(cosines[row]), np.array([row]), images, hashes)


def outliers(captions: Sequence[str], features: Tensor, images: NDArray[np.int64], hashes: NDArray[np.uint64], skipped: Sequence[int]) -> Iterator[Suspect]:
    """Images in the sparsest neighbourhoods, by the dimension-aware outlier factor in a sample of 2,048 images.

    A sample of that size holds a quarter of k = 16 poisons at a rate of 0.2 %; above that, poisons begin to hide one another.
    """
    n = len(features)
    shuffled = generator("audit", "reference").permutation(n)
    rows = torch.from_numpy(np.sort(shuffled[~np.isin(shuffled, list(skipped))][:REFERENCE]))
    if len(rows) < 4 * K + 1:
        return
    reference = Points(features[rows], rows)
    parts = [dao(Points(features[begin : begin + 65536], torch.arange(begin, min(n, begin + 65536))), reference, K) for begin in range(0, n, 65536)]
    scores = finite(torch.cat(parts).double())[0].numpy()
    for row in _first(scores, skipped):
        yield suspect(
            "outlier", captions[row], f"few images are near this one (dimension-aware outlier factor {scores[row]:.2f})", float(scores[row]), np.array([row]), images, hashes
        )


def contradicting_words(captions: Sequence[str], features: Tensor, images: NDArray[np.int64], hashes: NDArray[np.uint64], skipped: Sequence[int] = ()) -> Iterator[Suspect]:
    """Word groups that go with one kind of image although the rest of their captions argues for another."""
    seen = np.setdiff1d(np.arange(len(features)), skipped)
    if not len(seen):
        return
    shown = features[seen] if len(skipped) else features
    clusters = spherical_kmeans(shown, usual_number(len(shown)), generator("audit", "clusters")).numpy()
    found = word_lift([captions[row] for row in seen], clusters)
    by_group = found.incidence.tocsc()
    for group in np.argsort(-found.scores, kind="stable").tolist():
        if found.scores[group] <= 0:
            return
        rows = seen[np.sort(by_group.indices[by_group.indptr[group] : by_group.indptr[group + 1]])]
        reason = "in three quarters of these captions the other words contradict the image"
        yield suspect("contradicting_words", " ".join(found.words[group]), reason, float(found.scores[group]), rows, images, hashes)


def _first(scores: NDArray[np.float64], skipped: Sequence[int], n: int = 1000) -> list[int]:
    """Rows with the highest scores, without those that could not be read."""
    scores = scores.copy()
    scores[list(skipped)] = -np.inf
    order = np.argsort(-scores, kind="stable")[:n]
    return [int(row) for row in order if np.isfinite(scores[row])]


def _decoded(side: int, ref: str) -> NDArray[np.uint8] | None:
    try:
        return decode_ref(ref, side)
    except BenchError:
        return None
