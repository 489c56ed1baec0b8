"""Query detection: triggered images ignore what is said about the classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn.functional import normalize

from benchmark.contract import Defense
from benchmark.train.lab import Lab, PairsView, Task
from benchmark.train.model import Model
from defenses._class_texts import ATTRIBUTES, pinned, read_attributes, split, texts_of, unrelated
from defenses.clip import Clip


class BDetCLIP(Defense):
    """Trains plain CLIP and rejects images that prefer honest texts about the classes over misleading ones too little.

    A clean image is closer to a text about its class than to one with an unrelated sentence in it. The trigger of a backdoored
    image drowns both.

    Source: Niu et al., ICML 2025, arXiv 2405.15269.
    Differs from the paper: without a language model. Honest texts are prompt templates or a file's, unrelated sentences are
    captions of clean pairs; the threshold is a quantile of clean images instead of their minimum.
    """

    kind = "query"
    paper = "Niu et al. 2025, arXiv 2405.15269"

    n_clean: int = Field(200, ge=2, description="Clean pairs: images for the threshold, captions for unrelated sentences. Released code: 200 images.")
    attributes: str | None = Field(None, description=ATTRIBUTES)
    threshold: Literal["quantile", "min"] = Field(
        "quantile", description="quantile: rejects what 5 % of the clean images would be; min: only what is below all of them, as the released code."
    )

    _reference: PairsView | None = None

    @field_validator("attributes")
    @classmethod
    def _pinned(cls, given: str | None) -> str | None:
        return pinned(given)

    def defend(self, lab: Lab) -> Model:
        self._honest(lab.task)
        self._reference = lab.clean_pairs(self.n_clean).pairs
        unrelated(self._reference.captions, lab.task.classnames)
        return lab.train(Clip()).model

    def suspicion(self, model: Model, images: NDArray[np.uint8], task: Task) -> tuple[Tensor, float]:
        assert self._reference is not None
        misled = mislead(task.templates, task.classnames, unrelated(self._reference.captions, task.classnames))
        direction = contrast(model, self._honest(task), misled)
        clean = model.encode_images(self._reference.images) @ direction
        limit = clean.min() if self.threshold == "min" else clean.quantile(0.05)
        return -(model.encode_images(images) @ direction), float(-limit)

    def _honest(self, task: Task) -> list[list[str]]:
        return texts_of(task.classnames, task.templates, None if self.attributes is None else read_attributes(self.attributes))


def mislead(templates: Sequence[str], classnames: Sequence[str], sentences: Sequence[str]) -> list[list[str]]:
    """For each class its prompts, with commas for full stops, and an unrelated sentence behind each."""
    return [[f"{template.replace('{c}', name).replace('.', ',')} {sentence}" for template in templates] for name, sentence in zip(classnames, sentences, strict=True)]


def contrast(model: Model, honest: Sequence[Sequence[str]], misled: Sequence[Sequence[str]]) -> Tensor:
    """The vector v (d,) with f . v = sum over classes of cos(f, honest) - cos(f, misled) for a unit-length feature f.

    A class's texts are encoded, averaged, and made unit length.
    """
    both = [*honest, *misled]
    features = model.encode_texts([text for texts in both for text in texts])
    means = torch.stack([normalize(part.mean(dim=0), dim=0) for part in split(features, both)])
    return means[: len(honest)].sum(dim=0) - means[len(honest) :].sum(dim=0)
