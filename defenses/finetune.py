"""Control of repair methods: fine-tuning on clean pairs."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from benchmark.contract import Defense, Pass
from benchmark.train.lab import Lab
from benchmark.train.loop import Now
from benchmark.train.model import Model
from defenses._repair import cosine, fine_tune, sweeps


class Finetune(Defense):
    """Continues the poisoned model on granted clean pairs with the CLIP loss.

    What forgetting alone does; the row that repair methods are compared with. `finetune+aug` augments the clean pairs.

    Source: the control of CleanCLIP, Bansal et al., ICCV 2023, arXiv 2303.03323.
    Differs from the paper: steps and rate are those of `cleanclip` here.
    """

    kind = "repair"
    clean_pairs_needed = 2000
    paper = "Bansal et al. 2023, arXiv 2303.03323"
    tiny: ClassVar = {"n_clean": 48, "epochs": 3, "min_steps": 1, "batch_size": 16}

    n_clean: int = Field(2000, ge=2, description="Clean pairs asked for.")
    lr: float = Field(1e-5, gt=0, description="Peak learning rate. CleanCLIP's code: 1e-5.")
    epochs: int = Field(10, ge=1, description="Sweeps over the clean pairs. CleanCLIP's code: 10.")
    min_steps: int = Field(500, ge=1, description="Fewest steps; few clean pairs are swept more often.")
    batch_size: int = Field(64, ge=2, description="Pairs in a step. CleanCLIP's code: 64.")
    warmup_steps: int = Field(50, ge=1, description="Warm-up in steps, at most 5 % of all. CleanCLIP's code: 50.")

    def defend(self, lab: Lab) -> Model:
        clean = lab.clean_pairs(self.n_clean)
        return fine_tune(lab, self, clean, sweeps(len(clean), self.batch_size, self.epochs, self.min_steps), self.batch_size).model

    def plan(self, epoch: int, now: Now) -> list[Pass]:
        return [Pass(lr=cosine(self.lr, self.warmup_steps, epoch, now), phase="repair")]
