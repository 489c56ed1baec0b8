"""Model audit: stamps the published triggers on clean images and looks whether one of them gathers the features."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from attacks._placing import Stamp, check_place
from attacks._triggers import ALIASES, PatternTrigger
from attacks.backdoor import Backdoor
from benchmark.contract import Audit, Defense
from benchmark.errors import BenchError
from benchmark.train.lab import Lab
from benchmark.train.model import Model
from defenses.clip import Clip
from defenses.decree import pairwise

Where = tuple[int, int, int, int]


class TriggerScan(Defense):
    """Trains plain CLIP and audits the image encoder: does a published trigger make clean images look alike, more than random patterns do.

    Every trigger that this program ships is stamped on the same images, patches at each of `places`. Poisoned pairs pull
    whatever shows the trigger to the target's captions, so that the mean pairwise cosine of the stamped images rises. Random
    patterns over the same pixels say how far it rises for any pattern. The score is the largest rise above the highest of
    theirs; below zero no trigger stands out.

    Source: this program's own; the cosine is that of Feng et al., CVPR 2023, arXiv 2303.15180.
    Differs from the paper: triggers are known instead of searched for, so that it sees none that it does not know.
    """

    kind = "audit"
    trusts = "the list of triggers"

    n_clean: int = Field(128, ge=4, description="Images that are stamped: clean pairs, without their captions.")
    size: int | None = Field(None, ge=1, description="Side of a patch in pixels. None: 8 for images up to 64 px, else 16.")
    places: tuple[str, ...] = Field(("corner", "centre"), min_length=1, description="Where patches are stamped, as in attack.place.")
    n_patterns: int = Field(16, ge=2, description="Random patterns over the same pixels, half noise and half stripes.")

    @field_validator("places")
    @classmethod
    def _fixed(cls, places: tuple[str, ...]) -> tuple[str, ...]:
        for place in places:
            if check_place(place).partition(":")[0] in ("random", "inner"):
                raise ValueError("random patterns are compared at one place: corner, corner:tl (tr, bl, br), centre or at:Y,X")
        return places

    def defend(self, lab: Lab) -> Model:
        lab.clean_pairs(self.n_clean)  # the audit's, asked for before anything is trained
        return lab.train(Clip()).model

    def audit(self, model: Model, images: NDArray[np.uint8]) -> Audit:
        rises = self.rises(model, images)
        name, (rise, usual) = max(rises.items(), key=lambda one: one[1][0] - one[1][1])
        return Audit(rise - usual, f"{name} stands out most: it raises the mean pairwise cosine by {rise:.3f}, random patterns there by up to {usual:.3f}")

    def rises(self, model: Model, images: NDArray[np.uint8]) -> dict[str, tuple[float, float]]:
        """For each trigger, the rise of the mean pairwise cosine of images (n, S, S, 3), and the largest of random patterns over its pixels.

        Raises:
            BenchError: a patch that does not fit the images.
        """
        side = images.shape[1]
        plain = _alike(model, images)
        usual: dict[Where, float] = {}
        found = {}
        for name, trigger in self._triggers(side).items():
            where = trigger.box(side, "", True)
            if where not in usual:
                usual[where] = max(_alike(model, _stamped(pattern, images)) for pattern in self._patterns(where, side)) - plain
            found[name] = (_alike(model, _stamped(trigger, images)) - plain, usual[where])
        return found

    def _triggers(self, side: int) -> dict[str, Stamp]:
        size = self.size or (8 if side <= 64 else 16)
        if size > side:
            raise BenchError(f"a patch of {size} px does not fit images of {side} px; lower defense.size")
        found: dict[str, Stamp] = {}
        for name, kind in ALIASES.items():
            if kind.startswith("patch:"):
                for place in self.places:
                    found[f"{name} ({place})"] = Backdoor(trigger=name, size=size, place=place).make_trigger(name, side)
            else:
                found[name] = Backdoor(trigger=name).make_trigger(name, side)
        return found

    def _patterns(self, where: Where, side: int) -> list[PatternTrigger]:
        top, left, height, width = where
        whole = (height, width) == (side, side)
        kinds = ("blend:noise", "blend:stripes") if whole else ("patch:noise", "patch:stripes")
        # Seeds far from those of the triggers, which start at 0.
        return [
            PatternTrigger(kinds[number % 2], height, 0.2 if whole else 1.0, 2, pattern_seed=1000 + number, place="full" if whole else f"at:{top},{left}")
            for number in range(self.n_patterns)
        ]


def _stamped(trigger: Stamp, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.stack([trigger.image(image, str(row), True) for row, image in enumerate(images)])


def _alike(model: Model, images: NDArray[np.uint8]) -> float:
    return float(pairwise(model.encode_images(images)))
