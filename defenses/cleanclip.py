"""CleanCLIP: fine-tune on clean pairs, across the modalities and within each."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from benchmark.contract import Batch, Defense, Pass, Rewrite
from benchmark.train.lab import Lab
from benchmark.train.loop import Now
from benchmark.train.loss import contrastive
from benchmark.train.model import Model
from defenses._autoaugment import autoaugment
from defenses._crops import two_views
from defenses._repair import cosine, fine_tune, sweeps
from defenses._statistics import still
from defenses._unimodal import against, text_views


class CleanCLIP(Defense):
    """Repairs the poisoned model on granted clean pairs with the CLIP loss and a self-supervised loss within each modality.

    A backdoor lives in the joint space; each encoder that also has to tell its own views apart re-organises without it.

    Source: Bansal et al., ICCV 2023, arXiv 2303.03323; the released code for what the text leaves open.
    Differs from the paper: the optimizer starts fresh, the schedule counts from step 0, few clean pairs are swept more often,
    BatchNorm's running statistics do not follow the second image view.
    """

    kind = "repair"
    clean_pairs_needed = 2000
    paper = "Bansal et al. 2023, arXiv 2303.03323"
    presets: ClassVar = {"default": {}, "official": {"lr": 1e-5, "epochs": 10, "min_steps": 1, "schedule": "official", "image_aug": "autoaugment", "statistics": "views"}}
    tiny: ClassVar = {"n_clean": 48, "epochs": 3, "min_steps": 1, "batch_size": 16}

    preset: Literal["default", "official"] = Field("default", description="official: the released code's rate, epochs and schedule.")
    n_clean: int = Field(2000, ge=2, description="Clean pairs asked for.")
    lr: float = Field(1e-5, gt=0, description="Peak learning rate. Released code: 1e-5.")
    epochs: int = Field(10, ge=1, description="Sweeps over the clean pairs. Released code: 10.")
    min_steps: int = Field(500, ge=1, description="Fewest steps; few clean pairs are swept more often.")
    batch_size: int = Field(64, ge=2, description="Pairs in a step. Released code: 64.")
    warmup_steps: int = Field(50, ge=1, description="Warm-up in steps, at most 5 % of all. Released code: 50.")
    schedule: Literal["fixed", "official"] = Field("fixed", description="official: the released step count, one epoch late.")
    clip_weight: float = Field(1.0, ge=0, description="Weight of the CLIP loss. Released code: 1.")
    in_weight: float = Field(1.0, ge=0, description="Weight of the loss within each modality; 0 is fine-tuning. Released code: 1.")
    in_symmetric: bool = Field(False, description="Average both directions of the losses within a modality; not CleanCLIP as published.")
    image_aug: Literal["autoaugment", "scale", "localized"] = Field(
        "autoaugment", description="How the second image view is made; scale: as `+aug` does, localized: the same with crops near each other. Released code: autoaugment."
    )
    statistics: Literal["plain", "views"] = Field("plain", description="views: BatchNorm's running statistics follow the second image view too. Released code: views.")
    crop_delta: float = Field(0.2, ge=0, description="By how much a localized crop's surroundings are longer than the crop.")

    def defend(self, lab: Lab) -> Model:
        clean = lab.clean_pairs(self.n_clean)
        return fine_tune(lab, self, clean, sweeps(len(clean), self.batch_size, self.epochs, self.min_steps), self.batch_size).model

    def captions(self, text: str, rng: np.random.Generator, rewrite: Rewrite) -> list[str]:
        return text_views(text, rng, rewrite)[:2] if self.in_weight else [rewrite(text, rng)]

    def plan(self, epoch: int, now: Now) -> list[Pass]:
        return [Pass(lr=cosine(self.lr, self.warmup_steps, epoch, now, late=self.schedule == "official"), phase="repair")]

    def loss(self, model: Model, batch: Batch, now: Now) -> Tensor:
        """Weighted sum of the CLIP loss and the mean of one-directional losses of each pair against its augmented views."""
        shown, view = batch.images, None
        if self.in_weight and self.image_aug == "localized":
            shown, view = two_views(now, batch.raw, self.crop_delta)
        image, text = now.gather(model.image(shown)), now.gather(model.text(batch.tokens[0]))
        loss = self.clip_weight * contrastive(image, text, model.scale)
        if self.in_weight:
            if view is None:
                view = autoaugment(batch.raw, now.rng) if self.image_aug == "autoaugment" else now.augment(batch.raw)
            with still(model, self.statistics == "plain"):
                image_view = now.gather(model.image(view))
            text_view = now.gather(model.text(batch.tokens[1]))
            within = against(image, image_view, model.scale, self.in_symmetric) + against(text, text_view, model.scale, self.in_symmetric)
            now.log("loss_within", within / 2)
            loss = loss + self.in_weight * within / 2
        return loss
