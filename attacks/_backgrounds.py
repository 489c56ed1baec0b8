"""Captions whose background is typical of a class: how ToxicTextCLIP selects them, and how more are made of them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer

from benchmark.data.mentions import normalise
from benchmark.errors import BenchError
from benchmark.train.model import Model

Scores = NDArray[np.float64]
MAX_SUBSETS = 20_000
CANDIDATES = 20


class Closeness(Protocol):
    """How close texts are to a class that prompts describe."""

    def centroid(self, prompts: Sequence[str]) -> Any:
        """The unit-length mean of the prompts' unit-length features."""
        ...

    def to(self, centroid: Any, texts: Sequence[str]) -> Scores:
        """Cosines (n,) of texts with a centroid."""
        ...


class Tfidf:
    """Cosines of word counts, rare words counting more; asks for no model."""

    def __init__(self, captions: Sequence[str]) -> None:
        self._words = TfidfVectorizer(lowercase=True, token_pattern=r"(?u)\b\w+\b")
        try:
            self._words.fit(map(normalise, captions))
        except ValueError:
            raise BenchError("no caption has a word, so captions cannot be compared; use another attack.selector") from None

    def centroid(self, prompts: Sequence[str]) -> NDArray[np.float64]:
        """The unit-length mean (d,) of the prompts' vectors."""
        return _unit(np.asarray(self._words.transform(map(normalise, prompts)).mean(axis=0)).ravel())

    def to(self, centroid: NDArray[np.float64], texts: Sequence[str]) -> Scores:
        """Cosines (n,) of texts with a centroid."""
        return np.asarray(self._words.transform(map(normalise, texts)) @ centroid, dtype=np.float64)


@dataclass(frozen=True)
class Surrogate:
    """Cosines of a CLIP model's text features."""

    model: Model

    def centroid(self, prompts: Sequence[str]) -> NDArray[np.float64]:
        """The unit-length mean (d,) of the prompts' features."""
        return _unit(self.features(prompts).mean(axis=0))

    def to(self, centroid: NDArray[np.float64], texts: Sequence[str]) -> Scores:
        """Cosines (n,) of texts with a centroid."""
        return np.asarray(self.features(texts) @ centroid, dtype=np.float64)

    def features(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Unit-length features (n, d)."""
        return np.asarray(self.model.encode_texts(list(texts)).numpy(), dtype=np.float64)

    def image(self, image: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Unit-length features (d,) of one image (S, S, 3)."""
        return np.asarray(self.model.encode_images(image[None]).numpy()[0], dtype=np.float64)


def masked(caption: str, pattern: re.Pattern[str]) -> str:
    """The caption, normalised, without the words that the pattern finds."""
    return " ".join(pattern.sub(" ", normalise(caption)).split())


def best_subset(words: Sequence[str], n_out: int, most_out: int, image: NDArray[np.float64], name: NDArray[np.float64], reader: Surrogate) -> str:
    """The words, in order, that fit the image best and the class least: argmax cos(g("a photo that S"), f(x)) - cos(g(S), g(class)).

    Args:
        words: the caption without punctuation and without the class.
        n_out: how many words of the class have been taken out already.
        most_out: how many words may be taken out in all, the class included.
        image: features (d,) of the caption's image.
        name: features (d,) of a prompt that names the class.

    All subsets are tried while they are at most 20,000; beyond that one word is taken out at a time, while that helps.
    """

    def value(texts: Sequence[str]) -> Scores:
        return np.asarray(reader.features([f"a photo that {text}" for text in texts]) @ image - reader.features(texts) @ name)

    room = max(0, min(most_out - n_out, len(words) - 1))
    least = 0 if n_out else min(1, room)
    if sum(comb(len(words), out) for out in range(least, room + 1)) <= MAX_SUBSETS:
        kept = [" ".join(subset) for out in range(least, room + 1) for subset in itertools.combinations(words, len(words) - out)]
        return kept[int(np.argmax(value(kept)))]
    best, score = list(words), float(value([" ".join(words)])[0])
    for step in range(room):
        shorter = [[*best[:place], *best[place + 1 :]] for place in range(len(best))]
        found = value([" ".join(one) for one in shorter])
        if found.max() <= score and step >= least:
            break
        best, score = shorter[int(np.argmax(found))], float(found.max())
    return " ".join(best)


def recombined(classname: str, backgrounds: Sequence[str], rng: np.random.Generator) -> list[str]:
    """New captions of the class, each with one of the backgrounds: as it is, with a word less, and with two neighbours exchanged."""
    made = []
    for background in backgrounds:
        words = background.split()
        made.append(words)
        if len(words) > 1:
            out, at = int(rng.integers(len(words))), int(rng.integers(len(words) - 1))
            made += [[*words[:out], *words[out + 1 :]], [*words[:at], words[at + 1], words[at], *words[at + 2 :]]]
    return list(dict.fromkeys(f"a photo of {classname} that {' '.join(words)}" for words in made if words))


def unlike(seed: str, candidates: Sequence[str], n: int) -> list[str]:
    """Picks n candidates, each with the least summed Jaccard similarity of words to the seed and those picked before; the earlier one of equals."""
    chosen, rest = [_words(seed)], list(candidates)
    picked: list[str] = []
    while rest and len(picked) < n:
        best = min(rest, key=lambda text: sum(_jaccard(_words(text), other) for other in chosen))
        rest.remove(best)
        picked.append(best)
        chosen.append(_words(best))
    return picked


def _words(text: str) -> frozenset[str]:
    return frozenset(word for word in re.findall(r"\w+", normalise(text)) if word not in ENGLISH_STOP_WORDS)


def _jaccard(left: frozenset[str], right: frozenset[str]) -> float:
    return len(left & right) / len(left | right) if left | right else 0.0


def _unit(vector: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(vector / max(float(np.linalg.norm(vector)), 1e-12), dtype=np.float64)
