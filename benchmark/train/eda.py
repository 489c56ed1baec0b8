"""Easy data augmentation of captions: exactly one of four word operations on each (Wei and Zou, 2019, arXiv 1901.11196).

As RoCLIP's released code uses it (docs/methods/roclip.md), with generators of our own and sorted synonyms.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

Synonyms = Callable[[str], tuple[str, ...]]

_SHARE = 0.1
_FUNCTION_WORDS = """
    a about above after again all am an and any are as at be because been before being below between both but by
    can cannot could did do does doing down during each either else few for from further had has have having he her
    here hers herself him himself his how i if in into is it its itself just let me might more most must my myself
    neither no nor not now of off on once only or other our ours ourselves out over own per quite rather same shall
    she should since so some such than that the their theirs them themselves then there these they this those though
    through to too toward under until up upon us very was we were what when where whether which while who whom whose
    why will with within without would yet you your yours yourself yourselves
"""
STOP_WORDS = frozenset(_FUNCTION_WORDS.split()) | {""}


@dataclass(frozen=True)
class Eda:
    """Rewrites captions with one random operation each.

    Attributes:
        synonyms: sorted synonyms of a word; None leaves swap and deletion alone, half and half.
        insertion: `uniform` draws the inserted synonym, `first` takes the first.
    """

    synonyms: Synonyms | None
    insertion: Literal["uniform", "first"] = "uniform"

    @property
    def operations(self) -> str:
        """The operations in use, as the record names them."""
        return "sr,ri,rs,rd" if self.synonyms else "rs,rd"

    def rewrite(self, caption: str, rng: np.random.Generator) -> str:
        """The caption after one operation; a caption without a letter comes back as it is."""
        words = clean(caption).split()
        if not words:
            return caption
        operations = (_swap, _delete) if self.synonyms is None else (self._replace, self._insert, _swap, _delete)
        return clean(" ".join(operations[int(rng.integers(len(operations)))](words, rng)))

    def _replace(self, words: list[str], rng: np.random.Generator) -> list[str]:
        assert self.synonyms is not None
        candidates = sorted({word for word in words if word not in STOP_WORDS})
        left = _count(words)
        out = list(words)
        for index in rng.permutation(len(candidates)):
            found = self.synonyms(candidates[index])
            if found:
                chosen = found[int(rng.integers(len(found)))]
                out = [chosen if word == candidates[index] else word for word in out]
                left -= 1
            if left == 0:
                break
        return out

    def _insert(self, words: list[str], rng: np.random.Generator) -> list[str]:
        assert self.synonyms is not None
        out = list(words)
        for _ in range(_count(words)):
            for _attempt in range(10):
                found = self.synonyms(out[int(rng.integers(len(out)))])
                if found:
                    chosen = found[0] if self.insertion == "first" else found[int(rng.integers(len(found)))]
                    out.insert(int(rng.integers(len(out))), chosen)
                    break
        return out


def clean(caption: str) -> str:
    """Lower-case letters and single spaces; apostrophes vanish, everything else becomes a space."""
    text = caption.replace("’", "").replace("'", "").lower()
    return " ".join(re.sub(r"[^a-z ]", " ", text).split())


def _count(words: list[str]) -> int:
    return max(1, int(_SHARE * len(words)))


def _swap(words: list[str], rng: np.random.Generator) -> list[str]:
    out = list(words)
    for _ in range(_count(words)):
        first = int(rng.integers(len(out)))
        for _attempt in range(3):
            second = int(rng.integers(len(out)))
            if second != first:
                out[first], out[second] = out[second], out[first]
                break
    return out


def _delete(words: list[str], rng: np.random.Generator) -> list[str]:
    if len(words) == 1:
        return list(words)
    kept = [word for word, drawn in zip(words, rng.random(len(words)), strict=True) if drawn > _SHARE]
    return kept or [words[int(rng.integers(len(words)))]]
