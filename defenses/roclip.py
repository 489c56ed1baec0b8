"""RoCLIP: match images with captions out of a pool."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from benchmark.contract import Batch, Defense, Pass
from benchmark.errors import BenchError
from benchmark.train.lab import Lab
from benchmark.train.loop import Now
from benchmark.train.loss import contrastive
from benchmark.train.model import Model
from defenses._pool import enqueue, nearest, nearest_without_repeats


class RoCLIP(Defense):
    """Every few epochs, pairs each image with the most similar caption of a pool instead of its own.

    A poisoned image then meets captions that fit what it shows, because the adversarial ones are seldom in the pool.
    `roclip` is the pool alone; the published method is `roclip+aug`.

    Source: Yang, Gao, Mirzasoleiman, NeurIPS 2023, arXiv 2303.06854v2; the released code for what the text leaves open.
    Differs from the paper: the pool starts empty and is saved with each epoch; `preset=official` starts it from noise.
    """

    paper = "Yang et al. 2023, arXiv 2303.06854"
    presets: ClassVar = {
        "default": {},
        "official": {"pool_size": 21845, "pool_fraction": None, "pool_init": "noise_raw", "pool_wrap": "drop", "match_while_filling": True, "normalise_match": False},
    }

    preset: Literal["default", "official"] = Field("default", description="official: the released code and its pinned libraries.")
    every: int = Field(2, ge=1, description="K: every K-th epoch is matched. Released code: 2.")
    first_matched_epoch: int | None = Field(None, ge=1, description="First epoch that may be matched; None is K. A model that has learned nothing yet collapses when matched.")
    pool_fraction: float | None = Field(0.02, gt=0, le=1, description="Pool size as a share of the pairs, at least one batch. Released code: 21,845 of 1,000,000.")
    pool_size: int | None = Field(None, ge=1, description="Pool size in captions; replaces the share.")
    pool_init: Literal["empty", "noise_unit", "noise_raw"] = Field("empty", description="What the pool holds at first.")
    pool_wrap: Literal["ring", "drop"] = Field("ring", description="drop: the rest of a batch that reaches the end of the pool is lost.")
    pool_update: Literal["matched", "all"] = Field("matched", description="all: CLIP epochs fill the pool too; not RoCLIP as published.")
    match_while_filling: bool = Field(False, description="Match before the pool is full.")
    exclude_own: bool = Field(False, description="Never match an image with its own caption.")
    dedupe: bool = Field(False, description="Images that pick one entry take their next best free one.")
    normalise_match: bool = Field(True, description="Scale the matched entry to unit length; matters for noise alone.")
    train_text_on_match: bool = Field(False, description="Encode the matched captions again, with gradient; not RoCLIP as published.")

    @model_validator(mode="after")
    def _one_pool_size(self) -> RoCLIP:
        if self.pool_size is None and self.pool_fraction is None:
            raise ValueError("one of pool_fraction and pool_size is needed")
        if self.match_while_filling and self.pool_init == "empty":
            raise ValueError("an empty pool cannot be matched while it fills; use pool_init=noise_unit")
        return self

    def defend(self, lab: Lab) -> Model:
        trained = lab.train(self)
        state = trained.state
        if "rank_sum" in state:
            lab.scores("own_caption_rank", state["rank_sum"] / state["rank_n"].clamp(min=1))
        return trained.model

    def is_matched(self, epoch: int) -> bool:
        """Whether an epoch (from 1) is matched."""
        return epoch % self.every == 0 and epoch >= (self.first_matched_epoch or self.every)

    def plan(self, epoch: int, now: Now) -> list[Pass]:
        if epoch == 1:
            self._check(now)
        if self.is_matched(epoch):
            return [Pass(loss=self.matched_loss, phase="match")]
        return [Pass(loss=self.filling_loss if self.pool_update == "all" else None)]

    def filling_loss(self, model: Model, batch: Batch, now: Now) -> Tensor:
        """The CLIP loss; the batch's captions go into the pool."""
        image, text = now.gather(model.image(batch.images)), now.gather(model.text(batch.tokens[0]))
        self._enqueue(text.detach(), batch, now)
        return contrastive(image, text, model.scale)

    def matched_loss(self, model: Model, batch: Batch, now: Now) -> Tensor:
        """The CLIP loss with each caption replaced by the pool's nearest to the image; the pool is searched, then filled.

        The pool is detached, so the text tower gets no gradient here.
        """
        self._open_pool(model, now)
        if not self._searchable():
            now.tally("fill_steps")
            if now.counts["fill_steps"] > now.steps_per_epoch / 2:
                now.phase = "fill"
            return self.filling_loss(model, batch, now)
        now.tally("match_steps")
        image = now.gather(model.image(batch.images))
        with torch.no_grad():
            text = now.gather(model.text(batch.tokens[0]))
            chosen = self._search(image.detach(), batch, now)
            self._observe(image.detach(), text, chosen, batch, now)
        matched = self._entries(chosen, model)
        self._enqueue(text, batch, now)
        return contrastive(image, matched, model.scale)

    def _check(self, now: Now) -> None:
        size = self._size(now)
        per_epoch = now.steps_per_epoch * now.batch_size
        n_matched = sum(self.is_matched(epoch) for epoch in range(1, now.epochs + 1))
        if not self.match_while_filling and n_matched and size > per_epoch:
            raise BenchError(f"a pool of {size} captions cannot fill up within one epoch of {per_epoch} pairs; lower defense.pool_size or defense.pool_fraction")
        if not self.match_while_filling and size > per_epoch / 2:
            now.warn(f"the caption pool ({size}) takes more than half of the first matched epoch ({per_epoch} pairs) to fill")
        if self.pool_init != "empty" and now.n_rows < 5 * size:
            now.warn(f"with {now.n_rows} pairs and a pool of {size}, noise takes part in more than a fifth of the first matched epoch")
        if n_matched < 3:
            now.warn(f"{n_matched} matched epochs of {now.epochs}; a reported row wants at least 3")

    def _size(self, now: Now) -> int:
        if self.pool_size is not None:
            return self.pool_size
        assert self.pool_fraction is not None
        return max(now.batch_size, round(self.pool_fraction * now.n_rows))

    def _open_pool(self, model: Model, now: Now) -> None:
        if "pool" in self.state:
            return
        size, width, device = self._size(now), model.width, model.device
        pool = torch.zeros(size, width)
        if self.pool_init != "empty":
            pool = torch.randn(size, width, generator=now.generator("pool"))
        if self.pool_init == "noise_unit":
            pool = torch.nn.functional.normalize(pool, dim=-1)
        self.state.update(pool=pool.to(device), pointer=0, count=0, pool_rows=torch.full((size,), -1, dtype=torch.int64, device=device))
        self.state.update(rank_sum=torch.zeros(now.n_rows, device=device), rank_n=torch.zeros(now.n_rows, device=device))
        if self.train_text_on_match:
            self.state["pool_tokens"] = torch.zeros(size, model.tokenizer.context_length, dtype=torch.int64, device=device)

    def _searchable(self) -> bool:
        return self.match_while_filling or self.state["count"] >= len(self.state["pool"])

    def _search(self, image: Tensor, batch: Batch, now: Now) -> Tensor:
        pool: Tensor = self.state["pool"]
        own = self.state["pool_rows"][None, :] == now.gather(batch.rows)[:, None] if self.exclude_own else None
        return (nearest_without_repeats if self.dedupe else nearest)(image, pool, own)

    def _entries(self, chosen: Tensor, model: Model) -> Tensor:
        if self.train_text_on_match:
            return model.text(self.state["pool_tokens"][chosen])
        entries: Tensor = self.state["pool"][chosen]
        return torch.nn.functional.normalize(entries, dim=-1) if self.normalise_match else entries

    def _enqueue(self, text: Tensor, batch: Batch, now: Now) -> None:
        if "pool" not in self.state:
            self._open_pool(now.model, now)
        pointer, wrap = self.state["pointer"], self.pool_wrap
        enqueue(self.state["pool_rows"], pointer, now.gather(batch.rows), wrap)
        if self.train_text_on_match:
            tokens = torch.nn.functional.pad(batch.tokens[0], (0, self.state["pool_tokens"].shape[1] - batch.tokens.shape[-1]))
            enqueue(self.state["pool_tokens"], pointer, now.gather(tokens), wrap)
        self.state["pointer"] = enqueue(self.state["pool"], pointer, text, wrap)
        self.state["count"] = min(self.state["count"] + len(text), len(self.state["pool"]))

    def _observe(self, image: Tensor, text: Tensor, chosen: Tensor, batch: Batch, now: Now) -> None:
        pool: Tensor = torch.nn.functional.normalize(self.state["pool"], dim=-1)
        rows, entry_rows = now.gather(batch.rows), self.state["pool_rows"][chosen]
        own = (image * text).sum(dim=1)
        rank = (image @ pool.T > own[:, None]).float().mean(dim=1)
        self.state["rank_sum"][rows] += rank
        self.state["rank_n"][rows] += 1
        now.log("match_cos_mean", (image * pool[chosen]).sum(dim=1).mean())
        now.log("own_cos_mean", own.mean())
        now.log("match_unique_frac", len(torch.unique(chosen)) / len(chosen))
        now.log("match_own_frac", (entry_rows == rows).float().mean())
        now.log("match_noise_frac", (entry_rows < 0).float().mean())
