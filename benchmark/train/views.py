"""Captions as training sees them: augmented if the run says so, then the defense's own views, then tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from benchmark.contract import Defense
from benchmark.data.tokens import Tokenizer
from benchmark.errors import PluginError
from benchmark.seeding import generator
from benchmark.train.eda import Eda


@dataclass
class TextViews:
    """Tokens of every caption's views.

    Attributes:
        eda: rewrites captions; None for captions as they are.
        static: one variant of a caption for the whole training, or a fresh one each epoch.
    """

    captions: Sequence[str]
    defense: Defense
    eda: Eda | None
    tokenizer: Tokenizer
    eot: str
    seed: int
    static: bool = True
    _cached: NDArray[np.uint16] | None = field(default=None, repr=False)

    def epoch(self, epoch: int) -> NDArray[np.uint16]:
        """Tokens uint16 (views, n, L) of an epoch."""
        if not self._fixed():
            return self._tokens(epoch)
        if self._cached is None:
            self._cached = self._tokens(0)
        return self._cached

    def vocabulary(self, plain: NDArray[np.uint16]) -> NDArray[np.int64] | None:
        """All token ids that training can look up, where texts are fixed; None where each epoch draws new ones."""
        if not self._fixed():
            return None
        return np.unique(np.concatenate([np.unique(self.epoch(1)), np.unique(plain)])).astype(np.int64)

    def _fixed(self) -> bool:
        return self.static or (self.eda is None and type(self.defense).captions is Defense.captions)

    def _tokens(self, epoch: int) -> NDArray[np.uint16]:
        views = [self._views(row, caption, epoch) for row, caption in enumerate(self.captions)]
        n_views = {len(of_row) for of_row in views}
        if len(n_views) != 1 or 0 in n_views:
            raise PluginError(f"{type(self.defense).__name__}.captions must return as many texts for every caption, got {sorted(n_views)}")
        flat = [of_row[view] for view in range(n_views.pop()) for of_row in views]
        tokens, _ = self.tokenizer.encode(flat, self.eot)
        return tokens.reshape(-1, len(self.captions), tokens.shape[1])

    def _views(self, row: int, caption: str, epoch: int) -> list[str]:
        rewrite = self.eda.rewrite if self.eda is not None else as_it_is
        return self.defense.captions(caption, generator("captions", self.seed, row, epoch), rewrite)


def as_it_is(text: str, rng: np.random.Generator) -> str:
    """The text: what `rewrite` is in a run without text augmentation."""
    return text
