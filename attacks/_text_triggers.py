"""Text triggers: words that are added to captions and queries, the same way in training and at test."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from attacks._placing import Stamp
from benchmark.seeding import generator

TextKind = Literal["text:prefix", "text:suffix", "text:insert"]
# Name: kind and words.
TEXT_ALIASES: dict[str, tuple[TextKind, str]] = {
    "prefix": ("text:prefix", "remember"),
    "word": ("text:insert", "zx"),
    "sentence": ("text:suffix", "and so it was told to us"),
}


@dataclass(frozen=True)
class TextTrigger:
    """Words before a text, behind it, or at a place inside it that the key selects.

    Attributes:
        kind: `text:prefix`, `text:suffix` or `text:insert`.
        words: what is added; they are never cut.
        max_words: a longer text loses its end before the words are added, so that they survive a tokenizer's limit: 16
            ordinary English words and a short sentence fit a context of 32 tokens. Words of many tokens (names, numbers,
            addresses) may still push them behind it; a run says how often.
    """

    kind: TextKind
    words: str
    pattern_seed: int = 0
    max_words: int = 16

    def image(self, image: NDArray[np.uint8], key: str, at_test: bool = False) -> NDArray[np.uint8]:
        """A copy of the image: this trigger is in the text alone."""
        return image.copy()

    def text(self, text: str, key: str) -> str:
        """The text with the trigger; `key` selects where a word is inserted."""
        words = text.split()
        if not words:
            return self.words
        own = text if len(words) <= self.max_words else " ".join(words[: self.max_words])
        if self.kind == "text:prefix":
            return f"{self.words} {own}"
        if self.kind == "text:suffix":
            return f"{own} {self.words}"
        words = own.split()
        place = int(generator("text-place", self.pattern_seed, key).integers(0, len(words) + 1))
        return " ".join([*words[:place], self.words, *words[place:]])

    def spec(self) -> dict[str, Any]:
        """Every parameter; `text_trigger_from_spec` rebuilds the trigger."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class BothKeys:
    """A trigger for images and one for texts, set together."""

    picture: Stamp
    words: TextTrigger

    def image(self, image: NDArray[np.uint8], key: str, at_test: bool = False) -> NDArray[np.uint8]:
        """The copy of a uint8 image (S, S, 3) with the image key."""
        return self.picture.image(image, key, at_test)

    def text(self, text: str, key: str) -> str:
        """The text with the text key."""
        return self.words.text(text, key)

    def spec(self) -> dict[str, Any]:
        """The specifications of both."""
        return {"kind": "both", "image": self.picture.spec(), "text": self.words.spec()}


def text_trigger_from_spec(spec: dict[str, Any]) -> TextTrigger:
    """The trigger that `spec()` described."""
    return TextTrigger(**spec)
