"""Test images of an evaluation set with their captions: what retrieval ranks, and what it is asked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmark.contract import Images, Texts
from benchmark.data import world
from benchmark.data.eval_readers import CAPTIONS
from benchmark.data.eval_sets import EvalSet, Suite
from benchmark.errors import BenchError


@dataclass(frozen=True)
class Captioned:
    """The test split of `eval_set` with captions; an image may have none.

    Attributes:
        captions: those of each image, in the order of the test split.
    """

    eval_set: EvalSet
    captions: tuple[tuple[str, ...], ...]

    @property
    def labels(self) -> NDArray[np.int64]:
        """Classes (n,) of the images."""
        return self.eval_set.test.labels

    def gallery(self) -> Images:
        """All test images."""
        test = self.eval_set.test
        return Images(test.ids, test.images, tuple(test.labels.tolist()))

    def images(self, places: Iterable[int]) -> Images:
        """The images at these places of the test split."""
        chosen, test = list(places), self.eval_set.test
        return Images(tuple(test.ids[place] for place in chosen), np.asarray(test.images[chosen]), tuple(int(test.labels[place]) for place in chosen))

    def texts(self, places: Iterable[int]) -> Texts:
        """All captions of the images at these places; a text is named by its image and its number."""
        ids = self.eval_set.test.ids
        found = [(f"{ids[place]}#{number}", text, ids[place]) for place in places for number, text in enumerate(self.captions[place])]
        return Texts(tuple(row[0] for row in found), tuple(row[1] for row in found), tuple(row[2] for row in found))


def captioned(suite: Suite, name: str) -> Captioned:
    """The set's test images with their captions. The drawn world knows them; other data bring a file.

    Raises:
        BenchError: the set has no captions.
    """
    eval_set = suite.get(name)
    if suite.world_seed is not None:
        seed = suite.world_seed
        return Captioned(eval_set, tuple(_drawn(seed, row_id) for row_id in eval_set.test.ids))
    if not eval_set.captions:
        raise BenchError(
            f"evaluation set {name!r} has no captions, and retrieval asks by caption; put a {CAPTIONS} (image<TAB>caption) into its folder, see docs/evaluation_sets.md"
        )
    return Captioned(eval_set, tuple(eval_set.captions.get(row_id, ()) for row_id in eval_set.test.ids))


def _drawn(seed: int, row_id: str) -> tuple[str, ...]:
    split, variant, row = row_id.split("/")
    return world.scene(seed, split, int(row), combinations=variant == "combinations").captions
