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
from defenses._class_texts import ATTRIBUTES, SENTENCES, naming, pinned, read_attributes, split, texts_of, unrelated
from defenses.clip import Clip

_DESCRIPTIONS = 7


class BDetCLIP(Defense):
    """Trains plain CLIP and rejects images that prefer honest texts about the classes over misleading ones too little.

    A clean image is closer to a text about its class than to one with an unrelated sentence in it. The trigger of a backdoored
    image drowns both.

    Source: Niu et al., ICML 2025, arXiv 2405.15269.
    Differs from the paper: without a language model. Honest texts are captions of clean pairs that name the class, prompt templates
    or a file's; unrelated sentences are eight of ours; the threshold is a quantile of clean images instead of their minimum.
    """

    kind = "query"
    paper = "Niu et al. 2025, arXiv 2405.15269"

    n_clean: int = Field(200, ge=2, description="Clean pairs: images for the threshold, captions for texts. Released code: 200 images.")
    honest: Literal["captions", "templates"] = Field("captions", description="Honest texts: up to seven clean captions that name the class (prompts where none does), or prompts.")
    unrelated: Literal["sentences", "captions"] = Field("sentences", description="sentences: eight of this project, in turn; captions: clean captions that do not name the class.")
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
        self._reference = lab.clean_pairs(self.n_clean).pairs
        self._texts(lab.task)
        return lab.train(Clip()).model

    def suspicion(self, model: Model, images: NDArray[np.uint8], task: Task) -> tuple[Tensor, float]:
        assert self._reference is not None
        direction = contrast(model, *self._texts(task))
        clean = model.encode_images(self._reference.images) @ direction
        limit = clean.min() if self.threshold == "min" else clean.quantile(0.05)
        return -(model.encode_images(images) @ direction), float(-limit)

    def _texts(self, task: Task) -> tuple[list[list[str]], list[list[str]]]:
        """Honest and misleading texts of each class."""
        assert self._reference is not None
        captions, names = self._reference.captions, task.classnames
        honest = texts_of(names, task.templates, None if self.attributes is None else read_attributes(self.attributes))
        if self.attributes is None and self.honest == "captions":
            honest = [own or prompts for own, prompts in zip(naming(captions, names, _DESCRIPTIONS), honest, strict=True)]
        sentences = unrelated(captions, names) if self.unrelated == "captions" else [SENTENCES[index % len(SENTENCES)] for index in range(len(names))]
        return honest, mislead(task.templates, names, sentences)


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
