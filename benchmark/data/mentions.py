"""Which captions mention a word: Unicode-aware, on word boundaries, with plurals where exclusion asks for them."""

import re
import unicodedata
from collections.abc import Iterable
from typing import Literal

Match = Literal["word", "word_plural", "substring"]
_IRREGULAR = {
    "fish": ("fishes",),
    "mouse": ("mice",),
    "man": ("men",),
    "woman": ("women",),
    "child": ("children",),
    "person": ("people",),
    "foot": ("feet",),
    "tooth": ("teeth",),
    "goose": ("geese",),
    "leaf": ("leaves",),
    "wolf": ("wolves",),
    "knife": ("knives",),
    "sheep": ("sheep",),
}


def normalise(text: str) -> str:
    """NFKC, case-folded, `_` and `-` as spaces, runs of white space as one space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().replace("_", " ").replace("-", " ").split())


def matcher(terms: Iterable[str], match: Match = "word") -> re.Pattern[str]:
    """A pattern for normalised captions that mention one of the terms; `substring` wants captions as they are.

    `word` selects, `word_plural` (which also takes regular and a few irregular plurals) excludes.
    """
    if match == "substring":
        return re.compile("|".join(re.escape(term) for term in sorted(terms, key=len, reverse=True)))
    words = {normalise(term) for term in terms}
    if match == "word_plural":
        words |= {plural for word in set(words) for plural in plurals(word)}
    alternatives = "|".join(re.escape(word) for word in sorted(words, key=lambda word: (-len(word), word)))
    return re.compile(rf"(?<!\w)(?:{alternatives})(?!\w)")


def plurals(word: str) -> tuple[str, ...]:
    """Regular plurals of a term's last word, and the irregular ones that we know."""
    head, _, last = word.rpartition(" ")
    regular = [last + "s", last + "es"]
    if last.endswith("y"):
        regular.append(last[:-1] + "ies")
    found = (*regular, *_IRREGULAR.get(last, ()))
    return tuple(f"{head} {plural}".strip() for plural in found)


def mentions(captions: Iterable[str], terms: Iterable[str], match: Match = "word") -> list[bool]:
    """For each caption, whether it mentions one of the terms."""
    pattern = matcher(terms, match)
    return [bool(pattern.search(caption if match == "substring" else normalise(caption))) for caption in captions]
