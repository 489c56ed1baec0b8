"""What an attack and a defense may fill in, and where each hook sits in the loop.

An attack is edits plus probes. It is run once, on a clean manifest; its edits make the poisoned manifest, and its
probes say what success is:

    for edit in attack.poison(pairs, lab):         # Append(image, caption, why) | Replace(row, image=, caption=, why)
        apply it, write it down in the sealed record
    ...
    for probe in attack.probes(suite, kept):       # kept: what the attack handed to lab.keep
        the evaluator measures it

A defense is one method with hooks for the one training loop. Overriding none of them is plain CLIP:

    models = defense.defend(lab)                   # default: lab.train(self).model
        lab.train(defense):
            tokens = tokenize(defense.captions(text, rng, rewrite) for every row)
            for epoch in 1..epochs:
                for part in defense.plan(epoch, now):              # default: one pass over all rows
                    for rows in shuffled batches of part.rows:
                        batch = images, tokens, rows               # augmented if the run says `+aug`
                        batch = defense.views(batch, rng)
                        loss = (part.loss or defense.loss)(model, batch, now)
                        loss.backward(); optimizer.step()
                save weights, optimizer, defense.state             # nothing else survives a restart
    for what a defense overrides, after training and on the same instance:
        defense.suspicion(model, images, task)         # which queries look triggered
        defense.certify(views, labels, n_classes)      # which predictions provably stay
        defense.audit(model, images)                   # whether the model looks poisoned

Options are the plugin's own typed fields, so the command line, the record and the documentation read one declaration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from benchmark.data.attack_lab import AttackLab
    from benchmark.data.eval_sets import Suite
    from benchmark.data.pairs import Pairs
    from benchmark.train.lab import Lab
    from benchmark.train.lab import Task as Asked
    from benchmark.train.loop import Now
    from benchmark.train.model import Model

__all__ = ["Append", "Attack", "Audit", "Batch", "Certificates", "Defense", "Edit", "Field", "Images", "Pass", "Probe", "Replace", "Texts", "Trigger", "View", "Why"]

Role = Literal["poison", "support", "cover", "negative", "sham"]
Task = Literal["classify", "text_to_image", "image_to_text"]


class Options(BaseModel):
    """A plugin's options: typed fields with a default and a description, and nothing beside them."""

    model_config = ConfigDict(extra="forbid", validate_default=True, arbitrary_types_allowed=True)

    default: ClassVar[bool] = True
    """Whether `--attack all` or `--defense all` includes the plugin."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Named option sets; a plugin with presets declares a field `preset` as well."""

    tiny: ClassVar[Mapping[str, Any]] = {}
    """Options that fit the 192 pairs of `bench check`, where the defaults do not."""


@dataclass(frozen=True)
class Why:
    """What the sealed record needs to know of an edit.

    Attributes:
        role: `poison`, or what else the attack adds beside it.
        target: index into the targets that the attack handed to `lab.keep("targets", ...)`.
        source: id of the held-out image that an appended row shows.
        caption_source: id of the row the caption was taken from, or None for a made one.
    """

    role: Role = "poison"
    target: int = 0
    source: str | None = None
    caption_source: str | None = None


@dataclass(frozen=True)
class Append:
    """One new row: a uint8 image (S, S, 3) after the geometry, and its caption."""

    image: NDArray[np.uint8]
    caption: str
    why: Why = Why()


@dataclass(frozen=True)
class Replace:
    """A new image, a new caption or both for the row at this position of the source pairs."""

    row: int
    image: NDArray[np.uint8] | None = None
    caption: str | None = None
    why: Why = Why()


Edit = Append | Replace


class Trigger(Protocol):
    """A frozen value that stamps images and texts, the same in training and at test."""

    def image(self, image: NDArray[np.uint8], key: str, at_test: bool = False) -> NDArray[np.uint8]:
        """The stamped copy of a uint8 image (S, S, 3); `key` selects what is drawn per image."""
        ...

    def text(self, text: str, key: str) -> str:
        """The stamped copy of a text; the text itself where the trigger has no text part."""
        ...

    def spec(self) -> dict[str, Any]:
        """Canonical JSON that rebuilds the trigger."""
        ...


@dataclass(frozen=True)
class Images:
    """Queries that an attack brings along: uint8 (n, S, S, 3), their ids, and true class indices (-1: not known)."""

    ids: tuple[str, ...]
    images: NDArray[np.uint8]
    true: tuple[int, ...]


@dataclass(frozen=True)
class Texts:
    """Text queries, or the texts of a gallery, and their ids.

    Attributes:
        of: id of the image that each text describes; empty where they describe none.
    """

    ids: tuple[str, ...]
    texts: tuple[str, ...]
    of: tuple[str, ...] = ()


@dataclass(frozen=True)
class Probe:
    """What success is. The evaluator owns exclusions, controls and intervals.

    `classify` ranks the goal class among the classes of `eval_set`. `text_to_image` ranks the images of `gallery` for each
    text query, `image_to_text` its texts for each image; the goal is then the places in the gallery of the items that
    should come first.

    Attributes:
        name: names the predictions file; unique within an attack.
        eval_set: name of the evaluation set that owns class names and templates.
        queries: `test` for the set's test images, or images or texts of the attack's own.
        trigger: stamped on the queries; where it has a text part and the task is `classify`, on every prompt as well. None for
            the queries as they are.
        goal: one class, one per query, or a map from true class to goal; places in the gallery for retrieval.
        ks: success at k is a rank of at most k; the first must be 1.
        sources: only queries of these true classes count; None for all but the goal's.
        gallery: what retrieval ranks.
        shows: class that the goal items show; queries, and those of the floor, that mention or show it do not count.
        floor: queries of a retrieval without a trigger that should not reach the goal. With a trigger, the floor is the same
            queries without it.
        per_target: how many images of the attack's own, one after the other, belong to one target. They are asked one by one and are
            no independent units.
        control: the metric that the share of successes is reported as, for a probe that is a control of another
            (`asr_key_image`, `asr_cross`); such a probe adds to no `asr`.
    """

    name: str
    task: Task
    eval_set: str
    queries: Literal["test"] | Images | Texts
    trigger: Trigger | None
    goal: int | tuple[int, ...] | Mapping[int, int]
    ks: tuple[int, ...] = (1, 5)
    sources: tuple[int, ...] | None = None
    gallery: Images | Texts | None = None
    shows: int | None = None
    floor: Images | Texts | None = None
    control: str | None = None
    per_target: int = 1


class Attack(Options):
    """Poisons a dataset manifest and says what success is.

    A subclass declares its options as fields, and these facts as class attributes.
    """

    access: ClassVar[Literal["none", "features", "gradients"]] = "none"
    touches: ClassVar[tuple[Literal["image", "caption"], ...]] = ()
    budget_unit: ClassVar[Literal["none", "rows", "rows_per_target"]] = "rows"
    needs: ClassVar[tuple[str, ...]] = ()
    paper: ClassVar[str] = ""

    def poison(self, pairs: Pairs, lab: AttackLab) -> Iterable[Edit]:
        """Edits of the clean pairs; every random choice is drawn from `lab.rng`."""
        return ()

    def probes(self, suite: Suite, kept: Mapping[str, Any]) -> list[Probe]:
        """What the evaluator measures. `kept` holds what `poison` handed to `lab.keep`, perhaps in another process."""
        return []


@dataclass
class Batch:
    """What one step sees, on the training device.

    Attributes:
        images: float32 (b, 3, S, S) in [0, 1], augmented when the run says so.
        raw: the same rows without augmentation.
        tokens: int64 (views, b, L), L the longest text in the batch.
        rows: int64 (b,), handles of the rows; handles say nothing about what was done to a row.
        extra: room for what `views` makes.
    """

    images: Tensor
    raw: Tensor
    tokens: Tensor
    rows: Tensor
    extra: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)


Rewrite = Callable[[str, np.random.Generator], str]
Loss = Callable[["Model", Batch, "Now"], "Tensor"]


@dataclass(frozen=True)
class Pass:
    """One sweep over rows within an epoch.

    Attributes:
        rows: handles to sweep; None for all.
        loss: replaces `Defense.loss` for this sweep.
        lr: peak learning rate of this sweep, scaled by the run's schedule; or a function of (step within the sweep, its number
            of steps) whose value is used as it is; None for the run's peak.
        phase: stands in the curve beside the epoch (`clip`, `match`, ...).
    """

    rows: Sequence[int] | NDArray[np.int64] | None = None
    loss: Loss | None = None
    lr: float | Callable[[int, int], float] | None = None
    phase: str = "clip"


@dataclass(frozen=True)
class View:
    """What one model makes of the images that predictions are certified for.

    Attributes:
        support: unit-length features (n, d) of labelled images; none of them where the evaluation set has no training images.
        queries: unit-length features (m, d).
        predicted: zero-shot classes (m,), int64.
    """

    support: Tensor
    queries: Tensor
    predicted: Tensor


@dataclass(frozen=True)
class Certificates:
    """Predictions that provably stay.

    Attributes:
        name: what the attacker may do, in a word: `insert`, `modify`; names the certificate's rows in tables.
        predicted: classes (m,).
        radius: largest attack (m,) in `unit` that provably leaves the prediction; -1 where there is none to certify.
        unit: what an attack of size 1 is, as `support images added`. Radii of different units are never compared.
        trusts: what the proof takes for granted.
        says: what the proof covers, in a sentence.
        largest: end of the curve; no radius of this kind can be larger.
        parameter: what the proof was made with: the number of neighbours, the radius of a ball, of images or of partitions.
        joint: for proofs over all queries at once: of the queries that are predicted correctly, bool (m,), how many one attack
            of this size can turn at most.
    """

    name: str
    predicted: NDArray[np.int64]
    radius: NDArray[np.int64]
    unit: str
    trusts: Literal["encoder", "none"]
    says: str
    largest: int
    parameter: float
    joint: Callable[[NDArray[np.bool_], int], int] | None = None

    def __post_init__(self) -> None:
        if not (self.name and self.unit and self.says) or self.trusts not in ("encoder", "none"):
            raise ValueError("a certificate names its attack, its unit, what it trusts (encoder or none) and what it covers")
        radii = np.asarray(self.radius)
        if radii.shape != np.shape(self.predicted) or not np.issubdtype(radii.dtype, np.integer) or (radii < -1).any() or (radii > self.largest).any():
            raise ValueError(f"certificate {self.name!r}: radii are whole numbers from -1 to {self.largest}, one for each prediction")


class Audit(NamedTuple):
    """What an audit says of a model.

    Attributes:
        score: higher is more suspicious.
        says: what was found, in a sentence; empty where a score is all there is.
    """

    score: float
    says: str = ""

    @classmethod
    def of(cls, answer: float | Audit) -> Audit:
        """What `Defense.audit` returned, with its score as a plain number."""
        return Audit(float(answer.score), answer.says) if isinstance(answer, Audit) else Audit(float(answer))


class Defense(Options):
    """Trains on pairs that may be poisoned. Overriding nothing is plain CLIP."""

    kind: ClassVar[Literal["pre-training", "repair", "filter", "query", "audit", "certificate", "control"]] = "pre-training"
    clean_pairs_needed: ClassVar[int] = 0
    """How many clean pairs it asks for; an option `n_clean` stands in its place where there is one."""
    trusts: ClassVar[str] = ""
    """What it takes for granted beside the training code, in a few words; clean pairs are named by themselves."""
    needs_support: ClassVar[bool] = False
    """Whether `certify` cannot do without labelled images."""
    told: ClassVar[Literal["nothing", "count", "record"]] = "nothing"
    """Controls alone are told something; every table marks them."""
    paper: ClassVar[str] = ""

    _state: dict[str, Any] = PrivateAttr(default_factory=dict)

    @property
    def state(self) -> dict[str, Any]:
        """Tensors, numbers and strings that are saved with each epoch and restored; nothing else survives."""
        return self._state

    def defend(self, lab: Lab) -> Model | list[Model]:
        """The defended model; a list of models votes."""
        return lab.train(self).model

    def captions(self, text: str, rng: np.random.Generator, rewrite: Rewrite) -> list[str]:
        """Text views of one caption, before tokenising; each row gets a generator of its own.

        `rewrite(text, rng)` is the run's text augmentation: one EDA variant under `+aug`, the text itself otherwise.
        """
        return [rewrite(text, rng)]

    def plan(self, epoch: int, now: Now) -> list[Pass]:
        """The sweeps of an epoch (counted from 1)."""
        return [Pass()]

    def views(self, batch: Batch, rng: torch.Generator) -> Batch:
        """Views of a batch, on the device."""
        return batch

    def loss(self, model: Model, batch: Batch, now: Now) -> Tensor:
        """The CLIP loss of a batch: symmetric cross-entropy of scaled cosines (Radford et al., 2021)."""
        from benchmark.train.loss import contrastive

        image, text = model.image(batch.images), model.text(batch.tokens[0])
        return contrastive(now.gather(image), now.gather(text), model.scale)

    @classmethod
    def overrides(cls, hook: Literal["suspicion", "certify", "audit"]) -> bool:
        """Whether the defense fills in a hook that the evaluator calls after training, on the instance on which `defend` ran."""
        return getattr(cls, hook) is not getattr(Defense, hook)

    def clean_wanted(self) -> int:
        """How many clean pairs it asks for: its option `n_clean`, else `clean_pairs_needed`."""
        return int(getattr(self, "n_clean", self.clean_pairs_needed))

    def suspicion(self, model: Model, images: NDArray[np.uint8], task: Asked) -> tuple[Tensor, float]:
        """Scores (n,) of query images uint8 (n, S, S, 3), higher = more suspicious, and the threshold above which it rejects.

        A query's score does not depend on the other queries. The threshold comes from what the defense may know.
        """
        raise NotImplementedError

    def certify(self, views: Sequence[View], labels: Tensor, n_classes: int) -> list[Certificates]:
        """Certificates for the queries, one for each kind of attack; a view for each model that `defend` returned.

        `labels`, int64 (n,), are the classes of the support images. Ties of votes go to the smaller class.
        """
        raise NotImplementedError

    def audit(self, model: Model, images: NDArray[np.uint8]) -> float | Audit:
        """One suspicion score of a whole model, from `clean_wanted` clean images uint8 (n, S, S, 3); a number alone is a score without words."""
        raise NotImplementedError
