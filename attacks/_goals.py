"""Which rows a backdoor takes, and what its probes ask: parts that several image backdoors share."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from benchmark.data.attack_lab import AttackLab
from benchmark.data.eval_sets import EvalSet, Suite
from benchmark.data.mentions import matcher, normalise, plurals
from benchmark.data.pairs import Pairs
from benchmark.errors import BenchError


def eval_set_of(lab: AttackLab, name: str | None) -> EvalSet:
    """The evaluation set of this name, or the main one."""
    return lab.suite.get(name) if name else lab.suite.main


def random_victims(lab: AttackLab, pairs: Pairs, purpose: str, n: int, barred: Iterable[str], taken: set[str]) -> list[int]:
    """Draws n rows whose captions mention none of the barred terms and that are not taken.

    Raises:
        BenchError: fewer than n such rows.
    """
    terms = list(barred)
    unusable = lab.mentions(terms, "word_plural", pairs) if terms else [False] * len(pairs)
    by_id = {row_id: row for row, row_id in enumerate(pairs.ids) if not unusable[row] and row_id not in taken}
    if n > len(by_id):
        raise BenchError(f"{n} more rows are to be drawn, and {len(by_id)} are left whose captions mention no target; lower attack.rate or attack.count")
    return [by_id[row_id] for row_id in lab.choose(purpose, by_id, n)]


def even_split(n: int, parts: int) -> list[int]:
    """A number in almost equal parts, the larger ones first."""
    return [n // parts + (index < n % parts) for index in range(parts)]


def share_of(option: str, ratio: float, n: int) -> int:
    """How many rows go with n poisoned ones: ratio x n, rounded.

    Raises:
        BenchError: a ratio above 0 that comes to no row.
    """
    share = int(ratio * n + 0.5)
    if ratio and n and not share:
        raise BenchError(f"attack.{option} {ratio:g} of {n} poisoned rows comes to no row; raise it, attack.rate or attack.count")
    return share


def hit_ks(suite: Suite, name: str) -> tuple[int, ...]:
    """The k of top-1 and top-5 success that the set has classes for."""
    return tuple(k for k in (1, 5) if k < len(suite.get(name).classnames))


@dataclass(frozen=True)
class Classes:
    """The classes of an evaluation set as words in captions.

    Attributes:
        terms: for each class name, the name and its synonyms.
    """

    terms: Mapping[str, Sequence[str]]

    @cached_property
    def _owners(self) -> dict[str, set[str]]:
        owners: dict[str, set[str]] = {}
        for classname, terms in self.terms.items():
            for word in {form for term in map(normalise, terms) for form in (term, *plurals(term))}:
                owners.setdefault(word, set()).add(classname)
        return owners

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return matcher([term for terms in self.terms.values() for term in terms], "word_plural")

    def named(self, caption: str) -> set[str]:
        """The classes that a caption mentions; within one place, the longest term counts alone."""
        return {owner for found in self._pattern.finditer(normalise(caption)) for owner in self._owners[found.group()]}

    def swapped(self, caption: str, classname: str, goal: str) -> str:
        """The caption with every term of a class replaced by another class's name.

        Case and hyphens of the rest stay, unless the term is spelt in a way that only normalising finds.
        """
        words = {form for term in map(normalise, self.terms[classname]) for form in (term, *plurals(term))}
        alternatives = "|".join(r"[\s_-]+".join(map(re.escape, word.split())) for word in sorted(words, key=lambda word: (-len(word), word)))
        pattern = re.compile(rf"(?<!\w)(?:{alternatives})(?!\w)", re.IGNORECASE)
        if pattern.search(caption):
            return pattern.sub(lambda _: goal, caption)
        return pattern.sub(lambda _: goal, normalise(caption))
