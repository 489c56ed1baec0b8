"""Query detection: triggered images lie outside the subspace of the texts about their class."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn.functional import normalize

from benchmark.contract import Defense
from benchmark.data.images import Images
from benchmark.errors import BenchError
from benchmark.train.lab import Lab, PairsView, Task
from benchmark.train.model import Model
from defenses._class_texts import ATTRIBUTES, naming, pinned, read_attributes, split, texts_of
from defenses.clip import Clip

_TRIALS = 128
_VARIANTS = 9


class Subspace(Defense):
    """Trains plain CLIP and rejects images that are far from the span of the texts about the class they are taken for.

    An honest image is taken for a class because it lies near the texts about it. A triggered one was moved onto the class by
    training alone and need not lie where the texts do.

    Source: "Test-Time Poisoned Sample Detection by Exploiting Shallow Malicious Matching in Backdoored CLIP", ICLR 2026.
    Differs from the paper: without a language model. Variants of a class's text are captions of clean pairs that name it, prompt
    templates or a file's; the threshold is a quantile of clean images instead of their maximum.
    """

    kind = "query"
    paper = "Test-Time Poisoned Sample Detection (Subspace Detection), ICLR 2026"

    n_clean: int = Field(200, ge=2, description="Clean pairs: images for the threshold, captions for variants. Released code: 200 images.")
    variants: Literal["captions", "templates"] = Field(
        "captions", description="Variants of a class's text: up to nine clean captions that name it (prompts where fewer than two do), or prompts."
    )
    attributes: str | None = Field(None, description=ATTRIBUTES)
    threshold: Literal["quantile", "max"] = Field(
        "quantile", description="quantile: rejects what 5 % of the clean images would be; max: only what is above all of them, as the released code."
    )
    spellings: bool = Field(False, description="Also the name in bold and italic letters of Unicode, as the paper; for models that have read such text.")
    variance: float = Field(0.95, gt=0, le=1, description="Share of the texts' variance that the subspace keeps.")
    components: int = Field(3, ge=1, description="Gaussian components of each class.")
    extra: int = Field(90, ge=0, description="Points drawn around the variants for each component, shared among them.")
    samples: int = Field(15, ge=1, description="Detection samples of each class.")
    spread: float = Field(1e-3, ge=0, description="Width of a sample around its component, in deviations.")

    _reference: PairsView | None = None
    _seed: int = 0

    @field_validator("attributes")
    @classmethod
    def _pinned(cls, given: str | None) -> str | None:
        return pinned(given)

    def defend(self, lab: Lab) -> Model:
        self._reference = lab.clean_pairs(self.n_clean).pairs
        self._texts(lab.task)
        self._seed = int(lab.rng("subspace").integers(2**31))
        return lab.train(Clip()).model

    def suspicion(self, model: Model, images: NDArray[np.uint8], task: Task) -> tuple[Tensor, float]:
        assert self._reference is not None
        texts = self._texts(task)
        features = model.encode_texts([text for of_class in texts for text in of_class]).double()
        rng = torch.Generator().manual_seed(self._seed)
        points = torch.stack([detection_samples(one, self.components, self.extra, self.samples, self.spread, self.variance, rng) for one in split(features, texts)])
        prompts = model.encode_texts([prompt for of_class in texts_of(task.classnames, task.templates, None) for prompt in of_class]).double()
        prototypes = normalize(prompts.view(len(task.classnames), -1, prompts.shape[1]).mean(dim=1), dim=1)

        def far(some: Images) -> Tensor:
            return distance_to_own(model.encode_images(some).double(), prototypes, points)

        clean = far(self._reference.images)
        return far(images), float(clean.max() if self.threshold == "max" else clean.quantile(0.95))

    def _texts(self, task: Task) -> list[list[str]]:
        """For each class its name, then variants, with Unicode spellings of the name if asked for."""
        assert self._reference is not None
        others = texts_of(task.classnames, task.templates, None if self.attributes is None else read_attributes(self.attributes))
        if self.attributes is None and self.variants == "captions":
            captions = naming(self._reference.captions, task.classnames, _VARIANTS)
            others = [own if len(set(own) - {name}) >= 2 else prompts for name, own, prompts in zip(task.classnames, captions, others, strict=True)]
        found = []
        for name, texts in zip(task.classnames, others, strict=True):
            variants = [text for text in dict.fromkeys(texts) if text != name]
            found.append([name, *variants, *([spelled(name, "bold"), spelled(name, "italic")] if self.spellings else [])])
            if not variants:
                raise BenchError(f"class {name!r} has no text beside its name; give more prompts with --templates, or defense.attributes")
        return found


def spelled(text: str, style: Literal["bold", "italic"]) -> str:
    """The text in mathematical bold or sans-serif italic letters of Unicode; other characters stay."""
    upper, lower = {"bold": (0x1D400, 0x1D41A), "italic": (0x1D608, 0x1D622)}[style]
    return "".join(chr(upper + ord(letter) - ord("A")) if "A" <= letter <= "Z" else chr(lower + ord(letter) - ord("a")) if "a" <= letter <= "z" else letter for letter in text)


def detection_samples(features: Tensor, components: int, extra: int, samples: int, spread: float, variance: float, rng: torch.Generator) -> Tensor:
    """Points (samples, d) near the texts of one class, in the principal subspace of their unit-length features (1 + V, d).

    The first feature is the original, the others its variants. Each component is a Gaussian around the variants and points
    drawn away from the original through each of them, accepted if they stay about as close to the original as the variant.
    """
    mean = features.mean(dim=0)
    basis = principal(features - mean, variance)
    projected = (features - mean) @ basis.T
    original, variants = projected[0], projected[1:]
    centres, deviations = [], []
    for _ in range(components):
        drawn = [grown(one, original, text, features[0], mean, basis, extra // len(variants), rng) for one, text in zip(variants, features[1:], strict=True)]
        points = torch.cat([variants, *drawn])
        centres.append(points.mean(dim=0))
        deviations.append(points - centres[-1])
    found = []
    for _ in range(samples):
        chosen = int(torch.randint(components, (1,), generator=rng))
        noise = torch.randn(len(deviations[chosen]), generator=rng, dtype=features.dtype)
        found.append(mean + (centres[chosen] + spread * deviations[chosen].T @ noise) @ basis)
    return torch.stack(found)


def principal(centred: Tensor, variance: float) -> Tensor:
    """The fewest orthonormal directions (p, d) that keep this share of the variance of centred rows; none if all rows are equal."""
    strengths: Tensor
    directions: Tensor
    _, strengths, directions = torch.linalg.svd(centred, full_matrices=False)
    power = strengths.square()
    if float(power.sum()) < 1e-20:
        return directions[:0]
    kept = int((power.cumsum(dim=0) / power.sum() < variance - 1e-12).sum()) + 1
    return directions[:kept]


def grown(variant: Tensor, original: Tensor, text: Tensor, original_text: Tensor, mean: Tensor, basis: Tensor, n: int, rng: torch.Generator) -> Tensor:
    """Points (n, p) beyond a variant, away from the original; the last of 128 draws where none is accepted."""
    steps = torch.rand(n, _TRIALS, generator=rng, dtype=variant.dtype)
    candidates = variant + steps[:, :, None] * (variant - original)
    restored = normalize(mean + candidates @ basis, dim=-1)
    ratio = restored @ original_text / (text @ original_text)
    accepted = (ratio > 0.85) & (ratio < 1)
    first = torch.where(accepted.any(dim=1), accepted.to(torch.int64).argmax(dim=1), _TRIALS - 1)
    return candidates[torch.arange(n), first]


def distance_to_own(features: Tensor, prototypes: Tensor, points: Tensor) -> Tensor:
    """Mean squared distance (n,) of each feature to the samples (C, samples, d) of the class it is taken for."""
    own = points[(features @ prototypes.T).argmax(dim=1)]
    return (features[:, None] - own).square().sum(dim=2).mean(dim=1)
