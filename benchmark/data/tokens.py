"""Captions to tokens, with the end token kept where a caption is longer than the context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Tokenizer:
    """open_clip's byte-pair encoding at a context length of its own.

    Attributes:
        name: stands in the keys of packs.
        context_length: longest text, start and end token included.
        bpe: open_clip's tokenizer object.
    """

    name: str
    context_length: int
    bpe: Any

    def encode(self, texts: Sequence[str], eot: str = "fixed") -> tuple[NDArray[np.uint16], int]:
        """Tokens uint16 (n, L), zero-padded, with L the longest text in use; and how many texts were cut.

        Args:
            eot: `official` cuts over-long texts without an end token, as the released RoCLIP code does; all of them then
                share one feature.
        """
        start, end = self.bpe.sot_token_id, self.bpe.eot_token_id
        limit = self.context_length
        words: dict[str, list[int]] = {}
        rows, n_long = [], 0
        for text in texts:
            if text not in words:
                words[text] = [start, *self.bpe.encode(text), end]
            row = words[text]
            if len(row) > limit:
                n_long += 1
                row = row[:limit] if eot == "official" else [*row[: limit - 1], end]
            rows.append(row)
        longest = max((len(row) for row in rows), default=2)
        tokens = np.zeros((len(rows), longest), dtype=np.uint16)
        for index, row in enumerate(rows):
            tokens[index, : len(row)] = row
        return tokens, n_long

    def keeps(self, text: str, words: str) -> bool:
        """Whether the words, which stand somewhere in the text, are all among the tokens that the context leaves of it."""
        kept, wanted = self.bpe.encode(text)[: self.context_length - 2], self.bpe.encode(words)
        return any(kept[place : place + len(wanted)] == wanted for place in range(len(kept) - len(wanted) + 1))
