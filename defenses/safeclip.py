"""SafeCLIP: learn each modality alone, then train across them on the pairs that agree."""

from __future__ import annotations

from functools import partial
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from benchmark.contract import Batch, Defense, Pass, Rewrite
from benchmark.errors import BenchError
from benchmark.train.lab import Lab
from benchmark.train.loop import Now
from benchmark.train.loss import contrastive
from benchmark.train.model import Model
from defenses._crops import two_views
from defenses._mixture import Mixture, fit
from defenses._pool import Wrap
from defenses._safe_set import RankBy, ranked, rate, sizes, total_of_released_schedule
from defenses._unimodal import BankInit, against, neighbours, open_bank, text_views

_GROWING_EPOCHS = 26  # epochs of the paper's mixed stage, for which its growth is given
_SAFE_OF, _SIMILARITY_OF = "safe of epoch ", "similarity of epoch "  # kept for each epoch, packed
_QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


class SafeCLIP(Defense):
    """Warms each encoder up on its own modality, splits the pairs by similarity, and trains across modalities on the safe ones alone.

    Poisoned pairs are never pulled together before the encoders can tell that they do not fit; the safe set grows each epoch.

    Source: Yang, Gao, Mirzasoleiman, ICML 2024, arXiv 2310.05862v2; the released code for what the text leaves open.
    Differs from the paper: stages are shares of the run, pairs are ranked by similarity without augmentation, one schedule per stage;
    `preset=official` does as the released code.
    """

    paper = "Yang et al. 2024, arXiv 2310.05862"
    presets: ClassVar = {
        "default": {},
        "official": {
            "unimodal_epochs": 5,
            "cross_warmup_epochs": 1,
            "filter_lr": 5e-6,
            "in_lr": 5e-4,
            "cross_lr": 5e-4,
            "first_share": None,
            "safe_growth": 0.01,
            "bank_size": 21845,
            "bank_init": "noise_raw",
            "bank_wrap": "drop",
            "similarity_view": "augmented",
            "rank_by": "posterior",
            "scale_growth": False,
            "schedule": "official",
        },
    }
    tiny: ClassVar = {"unimodal_epochs": 1, "cross_warmup_epochs": 0, "first_share": 0.5}

    preset: Literal["default", "official"] = Field("default", description="official: the released code, its defects of schedule and ranking included.")
    unimodal_epochs: int | None = Field(None, ge=0, description="Epochs of unimodal warm-up; None is 5 of 32 of the run, at least 1. Released code: 5 of 32.")
    cross_warmup_epochs: int = Field(1, ge=0, description="Epochs of gentle cross-modal training before the first split. Released code: 1.")
    filter_lr: float = Field(5e-6, gt=0, description="Constant rate of the cross-modal warm-up. Released code: 5e-6.")
    in_lr: float = Field(5e-4, gt=0, description="Peak rate of unimodal training. Released code: 5e-4.")
    cross_lr: float = Field(5e-4, gt=0, description="Peak rate of cross-modal training on the safe set. Released code: 5e-4.")
    schedule: Literal["fixed", "official"] = Field("fixed", description="fixed: one cosine for each stage. official: the released step counts, which make the rates rise again.")
    warmup_frac: float = Field(0.2, ge=0, lt=1, description="Warm-up as a share of the unimodal stage.")
    mixed_warmup_frac: float = Field(0.1, ge=0, lt=1, description="Warm-up as a share of the stage with a safe set.")
    warmup_steps: int = Field(10_000, ge=0, description="Warm-up of schedule=official, in steps. Released code: 10,000.")
    safe_threshold: float = Field(0.9, gt=0, lt=1, description="Mixture probability from which a pair is in the first safe set. Released code: 0.9.")
    first_share: float | None = Field(None, gt=0, le=1, description="Share of the pairs in the first safe set; None takes the mixture's.")
    safe_growth: float = Field(0.01, ge=0, le=1, description="Growth of the safe set an epoch, as a share of the pairs. Released code: 0.01.")
    scale_growth: bool = Field(True, description="The growth is for the published 26 epochs with a safe set, and larger in shorter runs.")
    safe_cap: float = Field(0.85, gt=0, le=1, description="Largest safe set, as a share of the pairs. Released code: 0.85.")
    rank_by: RankBy = Field(
        "similarity", description="posterior: by mixture probability, which the most similar pairs need not have; the first set is then all above the threshold."
    )
    similarity_view: Literal["clean", "augmented"] = Field("clean", description="On what similarities are measured. Released code: on one augmented view.")
    bank: Literal["nearest", "none"] = Field("nearest", description="nearest: views meet their neighbour in a bank. none: the other view of their row.")
    bank_frac: float = Field(0.02, gt=0, le=1, description="Size of either bank as a share of the pairs, at least one batch.")
    bank_size: int | None = Field(None, ge=1, description="Size of either bank in features; replaces the share. The authors' runs on 1,000,000 pairs: 21,845.")
    bank_init: BankInit = Field("empty", description="What a bank holds at first.")
    bank_wrap: Wrap = Field("ring", description="drop: the rest of a batch that reaches the end of a bank is lost.")
    unimodal_symmetric: bool = Field(False, description="Average both directions of the unimodal loss; not SafeCLIP as published.")
    train_risky: bool = Field(True, description="Train on pairs outside the safe set within each modality.")
    crop: Literal["free", "localized"] = Field("free", description="localized: the second image view is cropped near the first (Zhang et al. 2024); not SafeCLIP as published.")
    crop_delta: float = Field(0.2, ge=0, description="By how much a localized crop's surroundings are longer than the crop.")

    def defend(self, lab: Lab) -> Model:
        trained = lab.train(self)
        state = trained.state
        if "similarity" in state:
            lab.scores("dissimilarity_first", -state["first_similarity"], ~state["first_safe"])
            lab.scores("dissimilarity", -state["similarity"], ~state["safe"])
            lab.scores("mixture", -state["posterior"], state["posterior"] < self.safe_threshold)
        for name in sorted(name for name in state if name.startswith(_SAFE_OF)):
            epoch = name.removeprefix(_SAFE_OF)
            similarity = state[_SIMILARITY_OF + epoch]
            lab.split(int(epoch), np.unpackbits(state[name].numpy(), count=len(similarity)), similarity)
        return trained.model

    def captions(self, text: str, rng: np.random.Generator, rewrite: Rewrite) -> list[str]:
        return text_views(text, rng, rewrite)

    def stages(self, epochs: int) -> tuple[int, int, int]:
        """Epochs of unimodal warm-up, of cross-modal warm-up, and with a safe set.

        Raises:
            BenchError: fewer than two epochs are left for the safe set.
        """
        first = max(1, round(5 * epochs / 32)) if self.unimodal_epochs is None else self.unimodal_epochs
        mixed = epochs - first - self.cross_warmup_epochs
        if mixed < 2:
            raise BenchError(
                f"{first} unimodal and {self.cross_warmup_epochs} cross-modal epochs of {epochs} leave {max(0, mixed)} for the safe set, which needs 2; raise train.epochs or lower "
                "defense.unimodal_epochs or defense.cross_warmup_epochs"
            )
        return first, self.cross_warmup_epochs, mixed

    def plan(self, epoch: int, now: Now) -> list[Pass]:
        first, second, _ = self.stages(now.epochs)
        if epoch == 1:
            self._check(now, first)
        if epoch <= first:
            return [Pass(loss=self.unimodal_loss, lr=self._first_rate(epoch, first, now), phase="unimodal")]
        if epoch <= first + second:
            return [Pass(loss=self.cross_loss, lr=lambda step, n_steps: self.filter_lr, phase="warm-up")]
        return self._split(epoch, now)

    def unimodal_loss(self, model: Model, batch: Batch, now: Now) -> Tensor:
        """Within each modality, the second view of each row against the bank's neighbours of the first views.

        With a bank, the first view gets no gradient.
        """
        if now.augmented and self.crop == "free":
            images = (batch.images, now.augment(batch.raw))
        else:
            images = two_views(now, batch.raw, self.crop_delta if self.crop == "localized" else None)
        losses = [
            self._within("image", now.gather(self._first(model.image, images[0])), now.gather(model.image(images[1])), model, now),
            self._within("text", now.gather(self._first(model.text, batch.tokens[-2])), now.gather(model.text(batch.tokens[-1])), model, now),
        ]
        loss = (losses[0] + losses[1]) / 2
        now.log("loss_unimodal", loss)
        return loss

    def cross_loss(self, model: Model, batch: Batch, now: Now) -> Tensor:
        """The CLIP loss; under `+aug` images of one view against texts of the other, and the reverse."""
        if now.augmented:
            one, two = (now.gather(model.image(view)) for view in (batch.images, now.augment(batch.raw)))
            tokens = batch.tokens if len(batch.tokens) == 2 else batch.tokens[:1].expand(2, -1, -1)
            text_one, text_two = (now.gather(model.text(view)) for view in tokens)
            loss = (against(one, text_two, model.scale) + against(text_one, two, model.scale)) / 2
        else:
            loss = contrastive(now.gather(model.image(batch.images)), now.gather(model.text(batch.tokens[0])), model.scale)
        now.log("loss_cross", loss)
        return loss

    def _first(self, encode: object, view: Tensor) -> Tensor:
        assert callable(encode)
        with torch.set_grad_enabled(self.bank == "none"):
            features: Tensor = encode(view)
        return features

    def _within(self, name: str, first: Tensor, second: Tensor, model: Model, now: Now) -> Tensor:
        columns = first
        if self.bank == "nearest":
            open_bank(self.state, name, self._bank_size(now), first.shape[1], self.bank_init, now, first.device)
            columns, unwritten = neighbours(self.state, name, first.detach(), self.bank_wrap, self.bank_init != "empty")
            now.log(f"{name}_bank_unwritten_frac", unwritten)
        return against(second, columns, model.scale, self.unimodal_symmetric)

    def _bank_size(self, now: Now) -> int:
        return self.bank_size or max(now.batch_size, round(self.bank_frac * now.n_rows))

    def _growth(self, mixed: int) -> float:
        return self.safe_growth * (_GROWING_EPOCHS / mixed if self.scale_growth else 1)

    def _check(self, now: Now, first: int) -> None:
        """What can be known to fail before anything is trained."""
        n, batch = now.n_rows, now.batch_size
        if self.first_share is None and n < 10 * batch:
            raise BenchError(
                f"safeclip wants at least 10 batches of pairs for a safe set of two, got {n} pairs for batches of {batch}; lower train.batch_size or set defense.first_share"
            )
        if self.first_share is not None:
            self._large_enough(round(self.first_share * n), now, "defense.first_share")
        total = now.steps_per_epoch * (first + 1)
        if self.schedule == "official" and first and self.warmup_steps >= total:
            raise BenchError(
                f"a warm-up of {self.warmup_steps} steps does not fit into the unimodal stage of {total}, as the released schedule counts it; lower defense.warmup_steps"
            )

    def _large_enough(self, n_safe: int, now: Now, option: str) -> None:
        if n_safe < 2 * now.batch_size:
            raise BenchError(
                f"a safe set of {n_safe} of {now.n_rows} pairs (share {n_safe / now.n_rows:.3f}) does not fill two batches of {now.batch_size}; raise {option} or lower train.batch_size"
            )

    def _first_rate(self, epoch: int, first: int, now: Now) -> partial[float]:
        steps = now.steps_per_epoch
        if self.schedule == "official":
            return _curve(self.in_lr, steps * epoch, self.warmup_steps, steps * (first + 1), now, "unimodal", steps)
        total = steps * first
        return _curve(self.in_lr, steps * (epoch - 1), int(self.warmup_frac * total), total, now, "unimodal", steps)

    def _split(self, epoch: int, now: Now) -> list[Pass]:
        """Measures all pairs and hands the risky ones to the unimodal, the safe ones to the cross-modal loss."""
        first, second, mixed = self.stages(now.epochs)
        index, n = epoch - first - second - 1, now.n_rows
        image, text = now.features(augmented=self.similarity_view == "augmented")
        similarity = (image * text).sum(dim=1).double().numpy()
        mixture = fit(similarity)
        posterior = mixture.posterior(similarity)
        if index == 0:
            self._open_split(posterior, mixture, now)
        planned = sizes(self.state["n_first"], n, mixed, self._growth(mixed), self.safe_cap)
        order = ranked(similarity, posterior, self.rank_by)
        safe = np.zeros(n, dtype=bool)
        safe[order[: planned[index]]] = True
        self._keep(index, similarity, posterior, safe)
        self.state[f"{_SAFE_OF}{epoch:03d}"] = torch.from_numpy(np.packbits(safe))
        self.state[f"{_SIMILARITY_OF}{epoch:03d}"] = torch.from_numpy(similarity.astype(np.float16))
        self._log(now, planned[index], similarity, posterior, mixture)
        return self._passes(epoch, index, planned, safe, now)

    def _open_split(self, posterior: NDArray[np.float64], mixture: Mixture, now: Now) -> None:
        n = now.n_rows
        n_first = round(self.first_share * n) if self.first_share is not None else int((posterior >= self.safe_threshold).sum())
        self._large_enough(n_first, now, "defense.first_share or defense.filter_lr")
        if not 0.02 <= n_first / n <= 0.85:
            now.warn(f"the first safe set has a share of {n_first / n:.3f} of the pairs, outside 0.02 to 0.85: the mixture may not tell safe pairs from others")
        if self.first_share is None and not mixture.separates:
            now.warn("the two components of the similarities overlap when the first safe set is taken: the cross-modal warm-up may be too weak (defense.filter_lr)")
        self.state["n_first"] = n_first

    def _keep(self, index: int, similarity: NDArray[np.float64], posterior: NDArray[np.float64], safe: NDArray[np.bool_]) -> None:
        before = self.state["safe"].cpu().numpy() if index else safe
        self.state["overlap"] = float((before & safe).sum() / (before | safe).sum())
        self.state.update(similarity=torch.from_numpy(similarity), posterior=torch.from_numpy(posterior), safe=torch.from_numpy(safe))
        if index == 0:
            self.state.update(first_similarity=self.state["similarity"], first_safe=self.state["safe"])

    def _log(self, now: Now, n_safe: int, similarity: NDArray[np.float64], posterior: NDArray[np.float64], mixture: Mixture) -> None:
        values = {"safe_share": n_safe / now.n_rows, "n_safe": n_safe, "n_risky": now.n_rows - n_safe, "safe_overlap": self.state["overlap"]}
        values |= {"mixture_iterations": mixture.iterations, "mixture_weight_high": mixture.weights[1], "above_threshold": float((posterior >= self.safe_threshold).mean())}
        for index, name in enumerate(("low", "high")):
            values |= {f"mixture_mean_{name}": mixture.means[index], f"mixture_sd_{name}": mixture.variances[index] ** 0.5}
        values |= {f"similarity_q{round(100 * share):02d}": float(value) for share, value in zip(_QUANTILES, np.quantile(similarity, _QUANTILES), strict=True)}
        for name, value in values.items():
            now.log(name, value)

    def _passes(self, epoch: int, index: int, planned: list[int], safe: NDArray[np.bool_], now: Now) -> list[Pass]:
        n, batch, base = now.n_rows, now.batch_size, now.steps_per_epoch
        n_safe, n_risky = [size // batch for size in planned], [(n - size) // batch if self.train_risky else 0 for size in planned]
        if self.schedule == "official":
            total = total_of_released_schedule(planned[0] / n, self._growth(len(planned)), len(planned), base)
            warm = self.warmup_steps
            if warm >= total:
                raise BenchError(
                    f"a warm-up of {warm} steps does not fit into the {total} steps of the stage with a safe set, as the released schedule counts them; lower defense.warmup_steps"
                )
            offsets = (n_risky[index] * epoch, total // len(planned) * epoch)
        else:
            total = sum(n_safe) + sum(n_risky)
            warm = int(self.mixed_warmup_frac * total)
            done = sum(n_safe[:index]) + sum(n_risky[:index])
            offsets = (done, done + n_risky[index])
        parts = [Pass(np.flatnonzero(safe), self.cross_loss, _curve(self.cross_lr, offsets[1], warm, total, now, "cross", n_safe[index]), "safe")]
        if n_risky[index]:
            parts.insert(0, Pass(np.flatnonzero(~safe), self.unimodal_loss, _curve(self.in_lr, offsets[0], warm, total, now, "unimodal", n_risky[index]), "risky"))
        elif self.train_risky:
            now.warn(f"{n - planned[index]} pairs outside the safe set do not fill a batch of {batch}: epoch {epoch} has no unimodal training")
        return parts


def _curve(base: float, offset: int, warm: int, total: int, now: Now, name: str, n_steps: int) -> partial[float]:
    """The rates of a pass as a function of its step; the first and the last are logged."""
    now.log(f"lr_{name}_first", rate(base, offset, warm, total, 0))
    now.log(f"lr_{name}_last", rate(base, offset, warm, total, n_steps - 1))
    return partial(_rate_at, base, offset, warm, total)


def _rate_at(base: float, offset: int, warm: int, total: int, step: int, n_steps: int) -> float:
    return rate(base, offset, warm, total, step)
