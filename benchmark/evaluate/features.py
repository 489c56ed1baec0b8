"""Encodes each evaluation set once per model, and turns features into class scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from benchmark.contract import Trigger
from benchmark.data.eval_sets import EvalSet
from benchmark.errors import BenchError
from benchmark.settings import digest
from benchmark.train.model import Model

COLLAPSE = 0.999


class Encoder:
    """One model, or several that vote, with what they encoded so far."""

    def __init__(self, models: Sequence[Model]) -> None:
        self.models = list(models)
        self._images: dict[str, list[Tensor]] = {}
        self._texts: dict[tuple[str, ...], list[Tensor]] = {}
        self._prototypes: dict[tuple[str, str], list[Tensor]] = {}

    def images(self, name: str, images: NDArray[np.uint8]) -> list[Tensor]:
        """Unit-length features (n, d) of each model; `name` stands for these very images."""
        if name not in self._images:
            self._images[name] = [_finite(model.encode_images(images), name) for model in self.models]
        return self._images[name]

    def texts(self, texts: tuple[str, ...]) -> list[Tensor]:
        """Unit-length features (n, d) of each model."""
        if texts not in self._texts:
            self._texts[texts] = [_finite(model.encode_texts(texts), "the queries", "text") for model in self.models]
        return self._texts[texts]

    def prototypes(self, eval_set: EvalSet, trigger: Trigger | None = None) -> list[Tensor]:
        """Zero-shot weights (C, d) of each model: per template unit length, mean, unit length again.

        A trigger with a text part is on the prompts of all classes alike.
        """
        prompts = [template.replace("{c}", name) for name in eval_set.classnames for template in eval_set.templates]
        if trigger is not None and on_prompts(trigger):
            prompts = [trigger.text(prompt, f"prompt/{index}") for index, prompt in enumerate(prompts)]
        key = (eval_set.name, digest(prompts))
        if key not in self._prototypes:
            self._prototypes[key] = [prototypes(_finite(model.encode_texts(prompts), f"the prompts of {eval_set.name}", "text"), len(eval_set.templates)) for model in self.models]
        return self._prototypes[key]

    def scores(self, name: str, images: NDArray[np.uint8], eval_set: EvalSet, trigger: Trigger | None = None) -> Tensor:
        """Class scores float32 (n, C): cosines of one model, or the share of votes of several; `trigger` is for the prompts.

        Of classes with as many votes the first is ahead, by less than a vote: that is the prediction which is certified. Classes
        without a vote stay tied.
        """
        cosines = [features @ weights.T for features, weights in zip(self.images(name, images), self.prototypes(eval_set, trigger), strict=True)]
        if len(cosines) == 1:
            return cosines[0]
        n_classes = len(eval_set.classnames)
        votes = torch.stack([functional.one_hot(one.argmax(dim=1), n_classes).float() for one in cosines]).mean(dim=0)
        return votes - (votes > 0) * (0.5 / len(cosines) * torch.arange(n_classes, device=votes.device) / n_classes)

    def collapsed(self, name: str, images: NDArray[np.uint8]) -> bool:
        """Whether 256 clean images all look the same to a model (mean pairwise cosine above 0.999)."""
        for features in self.images(name, images):
            some = features[:256]
            total = (some @ some.T).sum() - len(some)
            if len(some) > 1 and float(total / (len(some) * (len(some) - 1))) > COLLAPSE:
                return True
        return False


def prototypes(prompt_features: Tensor, n_templates: int) -> Tensor:
    """Class weights (C, d) from prompt features (C * n_templates, d) in class-major order."""
    grouped = prompt_features.view(-1, n_templates, prompt_features.shape[1])
    return functional.normalize(grouped.mean(dim=1), dim=-1)


def on_prompts(trigger: Trigger) -> bool:
    """Whether a trigger has a text part."""
    return trigger.text("a photo", "prompt/0") != "a photo"


def ranks(scores: Tensor, classes: Tensor) -> Tensor:
    """Pessimistic rank (n,) of one class a row: 1 + the number of other classes that score as high or higher."""
    own = scores.gather(1, classes.view(-1, 1))
    return (scores >= own).sum(dim=1)


def tied(scores: Tensor, classes: Tensor) -> Tensor:
    """Whether (n,) another class has exactly the class's score."""
    own = scores.gather(1, classes.view(-1, 1))
    return (scores == own).sum(dim=1) > 1


def _finite(features: Tensor, name: str, what: str = "image") -> Tensor:
    bad = (~torch.isfinite(features).all(dim=1)).nonzero()
    if len(bad):
        raise BenchError(f"{what} {int(bad[0])} of {name} has a feature that is not finite; the model is broken")
    return features
