"""Texts about classes, from a file of attributes or from prompt templates alone."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from benchmark.errors import BenchError

_LIMIT = 1 << 20
ATTRIBUTES = "File of texts about each class, in place of what the defense finds itself: lines `class: text`, several a class. The option is kept as FILE@HASH, so that another content is another run."


def pinned(given: str | None) -> str | None:
    """`FILE@HASH` of a file's content; a hash that is given must be the content's.

    Raises:
        ValueError: no such file, or one whose content has changed.
    """
    if given is None:
        return None
    name, at, said = given.rpartition("@")
    if not at or not re.fullmatch(r"[0-9a-f]{12}", said):
        name, said = given, ""
    path = Path(name)
    if not path.is_file() or path.stat().st_size > _LIMIT:
        raise ValueError(f"no file of attributes at {name!r} (at most {_LIMIT} bytes)")
    found = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    if said and said != found:
        raise ValueError(f"the content of {name!r} has changed: it is {found} and not {said}")
    return f"{name}@{found}"


def read_attributes(given: str) -> dict[str, list[str]]:
    """Texts by class of a `FILE@HASH`.

    Raises:
        BenchError: a line without a class, a file that is not UTF-8.
    """
    path = Path(given.rpartition("@")[0])
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise BenchError(f"{path} is not UTF-8; save the file as UTF-8") from None
    found: dict[str, list[str]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, colon, text = line.partition(":")
        if not (colon and name.strip() and text.strip()):
            raise BenchError(f"{path} line {number}: expected `class: text`, got {line[:60]!r}")
        found.setdefault(name.strip(), []).append(text.strip())
    return found


def texts_of(classnames: Sequence[str], templates: Sequence[str], attributes: Mapping[str, list[str]] | None) -> list[list[str]]:
    """Texts of each class: its attributes, or its name in every template.

    Raises:
        BenchError: attributes that leave a class out.
    """
    if attributes is None:
        return [[template.replace("{c}", name) for template in templates] for name in classnames]
    missing = [name for name in classnames if name not in attributes]
    if missing:
        raise BenchError(f"the file of attributes says nothing of {len(missing)} classes, such as {missing[0]!r}; it needs a line `{missing[0]}: text`")
    return [attributes[name] for name in classnames]


def split(features: Tensor, texts: Sequence[Sequence[str]]) -> list[Tensor]:
    """Features (n, d) of texts end to end, as one tensor for each class."""
    ends = list(itertools.accumulate(map(len, texts)))
    return [features[end - len(of_class) : end] for of_class, end in zip(texts, ends, strict=True)]


SENTENCES = (
    "the committee will meet again on thursday afternoon",
    "please remember to water the plants before you leave",
    "interest rates rose for the third time this year",
    "he forgot where he had parked and walked home",
    "the recipe calls for two spoons of flour",
    "our train was late because of the snow",
    "she read the letter twice and said nothing",
    "the match ended without a goal",
)
"""Unrelated to what pictures show; written for this project."""


def naming(captions: Sequence[str], classnames: Sequence[str], most: int) -> list[list[str]]:
    """For each class the first captions, `most` of them, that name it; none where no caption does."""
    words = [_words(caption) for caption in captions]
    return [[caption for caption, held in zip(captions, words, strict=True) if _words(name) <= held][:most] for name in classnames]


def unrelated(captions: Sequence[str], classnames: Sequence[str]) -> list[str]:
    """For each class a caption that does not name it, in lower case; different classes start to look at different places.

    Raises:
        BenchError: every caption names the class.
    """
    words = [_words(caption) for caption in captions]
    found = []
    for index, name in enumerate(classnames):
        own = _words(name)
        place = next((at % len(captions) for at in range(index, index + len(captions)) if not own <= words[at % len(captions)] and words[at % len(captions)]), None)
        if place is None:
            raise BenchError(f"all {len(captions)} clean captions name the class {name!r}, so none is unrelated to it; grant more with defense.n_clean")
        found.append(captions[place].lower())
    return found


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))
