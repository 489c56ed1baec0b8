"""What a run is: scales, resolved settings, canonical JSON, run ids."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

SCHEMA = 1


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSettings(_Settings):
    """Which pairs. `seed` is the drawn world's and stays 0 whatever the run's seed."""

    n_pairs: int = Field(10_000, ge=64, description="Rows of the drawn world; other data bring their own.")
    side: int = Field(32, ge=16, le=1024, description="Image side in pixels after the geometry.")
    seed: int = Field(0, ge=0, description="Seed of the drawn world.")
    n_held_out: int = Field(2000, ge=32, description="Held-out images of the drawn world, for targets.")
    n_clean: int = Field(2000, ge=32, description="Clean pairs of the drawn world, for defenses that ask for some.")
    n_test: int = Field(1000, ge=100, description="Test images of each drawn evaluation set.")
    n_probe: int = Field(2000, ge=200, description="Labelled images on which the linear probe is trained, a quarter of them for validation.")


class PackSettings(_Settings):
    """How images are kept on disk. Both ways give the same pixels, so this is no part of a run."""

    codec: Literal["pixels", "bytes"] = Field("pixels", description="bytes: files as they are, decoded for every batch; for sets too large to keep as pixels.")


class TrainSettings(_Settings):
    """One budget for every defense of a scale."""

    epochs: int = Field(10, ge=1, description="Sweeps over the pairs.")
    batch_size: int = Field(128, ge=2, description="Pairs in a step; the last incomplete batch is dropped.")
    lr: float = Field(2e-3, gt=0, description="Peak learning rate of AdamW.")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first moment.")
    beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's second moment.")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    weight_decay: float = Field(0.1, ge=0, description="Decoupled decay of matrices; biases, norms and the temperature have none.")
    warmup_frac: float = Field(0.2, ge=0, lt=1, description="Warm-up as a share of all steps.")
    warmup_steps: int | None = Field(None, ge=0, description="Warm-up in steps; replaces the share.")
    schedule: Literal["fixed", "official"] = Field("fixed", description="official: RoCLIP's released index, one epoch late.")
    eot: Literal["fixed", "official"] = Field("fixed", description="official: over-long captions lose their end token.")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="Arithmetic of the towers.")
    threads: int = Field(1, ge=1, description="CPU threads of one training.")
    snapshots: Literal["all", "sparse"] = Field("all", description="sparse: the last four and every fourth.")
    towers: Literal["plain", "recomputed", "compiled"] = Field(
        "plain", description="recomputed: residual blocks keep their input alone, less memory for more arithmetic. compiled: the image tower through torch.compile."
    )

    @model_serializer(mode="wrap")
    def _without_plain_towers(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """The option came later: it is left out where it does nothing, so that ids and keys of earlier runs stay."""
        return {name: value for name, value in plain(self).items() if (name, value) != ("towers", "plain")}


class AugmentSettings(_Settings):
    """What `+aug` switches on; one value for all defenses of a scale."""

    crop_min: float = Field(0.75, gt=0, le=1, description="Smallest share of the area in a random resized crop.")
    crop_max: float = Field(1.0, gt=0, le=1, description="Largest share of the area.")
    flip: float = Field(0.5, ge=0, le=1, description="Probability of a horizontal flip.")
    jitter: float = Field(0.8, ge=0, le=1, description="Probability that colours are jittered at all.")
    brightness: float = Field(0.25, ge=0, description="Factor drawn from 1 -+ this.")
    contrast: float = Field(0.25, ge=0, description="Factor drawn from 1 -+ this.")
    saturation: float = Field(0.0, ge=0, description="Factor drawn from 1 -+ this.")
    hue: float = Field(0.0, ge=0, le=0.5, description="Turn of the hue, as a share of the circle.")
    grayscale: float = Field(0.0, ge=0, le=1, description="Probability of grey.")
    blur: float = Field(0.0, ge=0, le=1, description="Probability of a Gaussian blur, sigma in [0.1, 2] at 224 px and scaled with the side.")
    text: Literal["eda", "none"] = Field("eda", description="eda: one of four word operations on every caption (Wei and Zou, 2019).")
    text_aug: Literal["static", "per_epoch"] = Field("static", description="static: one variant of a caption for the whole training.")
    synonyms: str = Field("auto", description="auto, wordnet, table:FILE or none.")
    eda_ri: Literal["uniform", "first"] = Field("uniform", description="Which synonym a random insertion takes.")

    @model_validator(mode="after")
    def _crops_in_order(self) -> AugmentSettings:
        if self.crop_min > self.crop_max:
            raise ValueError(f"crop_min {self.crop_min} is above crop_max {self.crop_max}")
        return self


class ModelSettings(_Settings):
    """The architecture: an open_clip model name, or the project's own small one."""

    name: str = Field("bench-small", description="bench-small, or any architecture name of open_clip.")
    context_length: int | None = Field(None, ge=8, le=77, description="Longest text in tokens; None is the architecture's.")


class EvaluationSettings(_Settings):
    """How models are measured."""

    linear_probe: Literal["lbfgs", "none"] = Field("lbfgs", description="lbfgs: logistic regression with a validated L2.")
    curve: bool = Field(True, description="Evaluate every snapshot and not the last alone.")


class Scale(_Settings):
    """A named, frozen budget."""

    name: str
    summary: str
    data: DataSettings = DataSettings()
    train: TrainSettings = TrainSettings()
    augment: AugmentSettings = AugmentSettings()
    model: ModelSettings = ModelSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    options: dict[str, dict[str, Any]] = Field(default_factory=dict, description="Options that the scale sets, by plugin name.")


_PAPER_AUGMENT = AugmentSettings(crop_min=0.08, brightness=0.5, contrast=0.5, saturation=0.5, hue=0.1, grayscale=0.2, blur=1.0)

# An epoch of the drawn scales is short and their rates are high (docs/decisions/008).
_SAFECLIP = {"unimodal_epochs": 1, "cross_warmup_epochs": 3, "filter_lr": 1e-3, "in_lr": 5e-4, "cross_lr": 2e-3, "first_share": 0.5, "safe_growth": 0.02}

# One rate for each repair method (docs/decisions/008); AutoAugment's ImageNet policy inverts colours, which the drawn captions name.
_REPAIR: dict[str, dict[str, Any]] = {"cleanclip": {"lr": 2e-3, "image_aug": "scale"}, "finetune": {"lr": 2e-3}, "par": {"lr_scale": 1.0}, "abl": {"constraint_lr": 3e-3}}

# Captions of the drawn world name colours and papers, so only prompts are true of a composed image. A true caption takes many
# rows (docs/methods/corrupt_encoder.md says what was tried), and patches of 8 and 14 px.
_COMPOSED: dict[str, dict[str, Any]] = {
    "corrupt_encoder": {"rate": 0.05, "size": 56, "caption": "prompt"},
    "noisy_alignment": {"rate": 0.1, "size": 98, "caption": "prompt"},
}

SCALES: dict[str, Scale] = {
    "smoke": Scale(
        name="smoke",
        summary="a cell in seconds, for tests of behaviour; its numbers mean nothing",
        data=DataSettings(n_pairs=1024, n_held_out=128, n_clean=128, n_test=200, n_probe=400),
        train=TrainSettings(epochs=3, batch_size=64),
        options={
            "targeted": {"n_targets": 4, "captions_per_target": 4},
            "toxic_text": {"n_targets": 4, "captions_per_target": 4, "n_images": 3, "count": 40},
            "roclip": {"pool_fraction": 0.08},
            "safeclip": {**_SAFECLIP, "cross_warmup_epochs": 0},
            **{key: {"n_clean": 64} for key in ("bdetclip", "subspace", "rnn_certified")},
            "decree": {"n_clean": 64, "epochs": 20},
            "trigger_scan": {"n_clean": 64},
            **{key: {"n_clean": 128, "epochs": 3, "min_steps": 1} for key in ("cleanclip", "finetune", "par")},
            "abl": {"epochs": 1},
            "dpa": {"parts": 3},
            **{key: {"reference_size": 100, "k": 16} for key in ("kdist", "slof", "dao", "lid")},
            "cognitive_distillation": {"steps": 2},
            **{key: {"rate": 0.02} for key in ("backdoor", "label_consistent", "dual_key", "all_to_all", "multi_backdoor")},
            **_COMPOSED,
            "corrupt_encoder": {**_COMPOSED["corrupt_encoder"], "n_references": 2, "n_support_references": 2},
            "badclip": {"rate": 0.02, "n_images": 256, "epochs": 2, "lr": 0.05},
        },
    ),
    "small": Scale(
        name="small",
        summary="10,000 drawn pairs at 32 px on one CPU core, two to four minutes a training",
        train=TrainSettings(epochs=16),
        options={
            "toxic_text": {"captions_per_target": 5},
            # What was tried stands in docs/methods: a true caption, twenty goals and three triggers each take far more rows than one lie.
            "label_consistent": {"rate": 0.045, "size": 16},
            "all_to_all": {"rate": 0.2},
            "dual_key": {"rate": 0.005},
            "multi_backdoor": {"rate": 0.015, "triggers": ["checker", "blended", "white"]},
            "roclip": {"first_matched_epoch": 4, "pool_fraction": 0.08},
            "safeclip": _SAFECLIP,
            **_REPAIR,
            # At the published roughness no mask of 32 px moves within these steps, and the score is the draw of the colours.
            "cognitive_distillation": {"steps": 30, "beta": 1.0},
            **_COMPOSED,
            "badclip": {"n_images": 2000, "epochs": 10, "lr": 0.03},
        },
    ),
    "medium": Scale(
        name="medium",
        summary="100,000 drawn pairs at 64 px on one GPU",
        data=DataSettings(n_pairs=100_000, side=64, n_test=2000),
        train=TrainSettings(epochs=16, batch_size=512, precision="bf16", threads=8),
        options={"safeclip": _SAFECLIP, **_REPAIR, **_COMPOSED, "badclip": {"size": 16, "epochs": 10, "lr": 0.01}},
    ),
    "paper": Scale(
        name="paper",
        summary="RN50 at 224 px, 24 epochs, batch 512: the budget of RoCLIP's released code; bring 1,000,000 pairs",
        data=DataSettings(n_pairs=1_000_000, side=224, n_held_out=10_000, n_clean=100_000, n_test=10_000),
        train=TrainSettings(epochs=24, batch_size=512, lr=5e-5, warmup_steps=10_000, precision="bf16", threads=8, snapshots="sparse"),
        augment=_PAPER_AUGMENT,
        model=ModelSettings(name="RN50-quickgelu"),
        options={
            "targeted": {"captions_per_target": 30},
            "backdoor": {"rate": 0.0005, "size": 16, "cell": 1},
            "badclip": {"size": 16},
            **{key: {"size": 16, "cell": 1} for key in ("label_consistent", "dual_key", "all_to_all", "multi_backdoor")},
        },
    ),
}


class PluginSettings(_Settings):
    """One plugin with every option filled in; `source` is the hash of its file and of the `_` modules it imports."""

    name: str
    options: dict[str, Any]
    source: str
    file: bool = Field(False, description="Whether it was given by path.")


class RunSettings(_Settings):
    """A resolved run: everything that its result depends on."""

    schema_: int = Field(SCHEMA, alias="schema")
    attack: PluginSettings
    defense: PluginSettings
    augmented: bool
    scale: str
    seed: int = Field(ge=0)
    dataset: str
    data_hash: str
    suite_hash: str
    data: DataSettings
    train: TrainSettings
    augment: AugmentSettings
    model: ModelSettings
    evaluation: EvaluationSettings
    device: str
    sham: bool = False
    clean_model: bool = Field(
        False, description="Trained on the pairs as they were before the attack, and measured as if it had been attacked; left out of the record where it is not so."
    )
    processes: int = Field(1, ge=1, description="Processes that train one batch together; left out of the record where there is one.")

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    def as_json(self) -> dict[str, Any]:
        """Plain values, as the record keeps them."""
        return self.model_dump(mode="json", by_alias=True, exclude={name for name, usual in (("processes", 1), ("clean_model", False)) if getattr(self, name) == usual})

    @property
    def run_id(self) -> str:
        """The first 12 hex digits of the SHA-256 of the canonical settings."""
        return digest(self.as_json())[:12]


def canonical(value: Any) -> str:
    """JSON with sorted keys and no NaN: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """SHA-256 of the canonical JSON, in hex."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()
