"""BadCLIP (dual embedding): a dirty-label backdoor whose patch is optimised against a surrogate first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self

import numpy as np
from pydantic import Field, model_validator

from attacks._captions import rows_that_mention
from attacks._goals import eval_set_of, hit_ks, random_victims
from attacks._pictures import PictureTrigger, picture_hash
from attacks._surrogates import SurrogateOptions
from attacks._triggers import trigger_from_spec
from benchmark.contract import Edit, Probe, Replace, Why
from benchmark.data.attack_lab import AttackLab
from benchmark.data.eval_sets import EvalSet, Suite
from benchmark.data.images import pick
from benchmark.data.pairs import Pairs
from benchmark.errors import BenchError
from benchmark.seeding import stream_key

_PAPER: dict[str, Any] = {"rate": 0.003, "size": 16, "reference_side": 224, "n_images": 10_000, "epochs": 50, "batch_size": 64, "lr": 0.001, "n_captions": 128}
_N_CHECKED = 1000


class BadClip(SurrogateOptions):
    """Optimises a patch until a model of the attacker's own reads it as the target class, then stamps it on random training images.

    Poisoned pairs then hardly disagree with what the model believes already, so training does not have to bend much to learn
    the trigger, and fine-tuning on clean pairs does not undo it.

    Source: Liang et al., CVPR 2024, arXiv 2311.12075 (the dual-embedding attack, not the prompt-learning one of the same name).
    Differs from the paper: the surrogate is a clean model of our own; images are not augmented while the patch is optimised;
    the patch is kept without loss, where the release saves a JPEG with red and blue exchanged.
    """

    access = "gradients"
    touches = ("image", "caption")
    needs = ("class_terms", "clean_model")
    paper = "Liang et al. 2024, arXiv 2311.12075"
    tiny: ClassVar = {"rate": 0.03, "n_images": 64, "epochs": 1, "batch_size": 32}
    presets: ClassVar = {"badclip2024": _PAPER, "badclip2024-text": {**_PAPER, "w_pos": 0.0, "w_neg": 0.0}}

    preset: str | None = Field(None, description="Patch, search and rate of the paper, by name.")
    rate: float | None = Field(0.003, ge=0, le=0.5, description="Poisoned rows / all rows. Paper: 0.003.")
    count: int | None = Field(None, ge=1, description="Poisoned rows; replaces the rate.")
    target_class: str | None = Field(None, description="Class that patched images should read as; None is the evaluation set's own default.")
    target_set: str | None = Field(None, description="Evaluation set that the class belongs to; None is the first.")
    size: int = Field(8, ge=1, description="Side of the patch in pixels. Paper: 16 of 224.")
    reference_side: int | None = Field(None, ge=16, description="Image side that the size is meant for; it scales with the run's. None: pixels as given.")
    n_captions: int = Field(128, ge=1, description="Captions of the class that the poisoned rows draw from, at most. Paper: 128.")
    w_text: float = Field(1.0, ge=0, description="Weight of the contrastive loss between patched images and captions of the class. Paper: 1.")
    w_pos: float = Field(500.0, ge=0, description="Weight of the distance to images of the class. Paper: 500.")
    w_neg: float = Field(500.0, ge=0, description="Weight of the distance to images without the patch. Paper: 500.")
    margin: float = Field(1.0, ge=0, description="Margin between the two distances. Paper: 1.")
    n_images: int = Field(10_000, ge=1, description="Images that the patch is optimised on, at most. Paper: 10,000.")
    epochs: int = Field(50, ge=1, description="Sweeps over them. Paper: 50.")
    batch_size: int = Field(64, ge=2, description="Images in a step. Paper: 64.")
    lr: float = Field(0.001, gt=0, description="Learning rate of Adam. Paper: 0.001.")
    pattern_seed: int = Field(0, ge=0, description="Seed of the search; does not follow the run's seed.")

    @model_validator(mode="after")
    def _something_to_optimise(self) -> Self:
        if self.rate is None and self.count is None:
            raise ValueError("one of rate and count is needed")
        if not (self.w_text or self.w_pos or self.w_neg):
            raise ValueError("w_text, w_pos and w_neg are all 0, so there is nothing to optimise")
        return self

    def poison(self, pairs: Pairs, lab: AttackLab) -> Iterable[Edit]:
        eval_set = eval_set_of(lab, self.target_set)
        target = self.target_class or eval_set.default_target or ""
        goal = eval_set.index(target)
        size = self.size if self.reference_side is None else max(3, round(self.size * lab.side / self.reference_side))
        if size > lab.side:
            raise BenchError(f"a patch of {size} px does not fit an image of {lab.side} px; lower attack.size")
        n = lab.budget(self.rate, self.count)
        victims = random_victims(lab, pairs, "victims", n, eval_set.terms(target), set())
        about = rows_that_mention(lab, pairs, eval_set, target, (), "word")
        if not about:
            raise BenchError(f"no caption mentions {target!r}, and the patch is optimised towards captions of its class; give another attack.target_class")
        patch = self._patch(pairs, lab, eval_set, target, about, size)
        trigger = PictureTrigger("patch:image", picture_hash(patch), size, 1.0, self.pattern_seed, "centre", "", patch)
        lab.keep("trigger", trigger.spec())
        lab.keep("picture", patch)
        lab.keep("box", list(trigger.box(lab.side, "")))
        lab.keep("targets", [{"class": target, "index": goal, "eval_set": eval_set.name}])
        by_id = {pairs.ids[row]: row for row in about}
        captions = lab.choose("captions", by_id, self.n_captions)
        for index, row in enumerate(victims):
            row_id = pairs.ids[row]
            source = captions[int(lab.rng("caption", index).integers(len(captions)))]
            yield Replace(row, lab.stamp(trigger, pairs.image(row), row_id), pairs.captions[by_id[source]], Why(source=row_id, caption_source=source))

    def probes(self, suite: Suite, kept: Mapping[str, Any]) -> list[Probe]:
        target = kept["targets"][0]
        trigger = trigger_from_spec(kept["trigger"], kept["picture"])
        return [Probe("badclip", "classify", target["eval_set"], "test", trigger, target["index"], hit_ks(suite, target["eval_set"]))]

    def _patch(self, pairs: Pairs, lab: AttackLab, eval_set: EvalSet, target: str, about: list[int], size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The optimised patch uint8 (s, s, 3); and for the record, how often the surrogate reads it as the target class.

        All draws follow `pattern_seed`, so that the seeds of a cell share the patch.
        """
        # Imported here, so that naming the attack loads no torch.
        from attacks._patch_search import Search, optimised_patch, share_read_as

        search = Search(size, self.epochs, self.batch_size, self.lr, self.w_text, self.w_pos, self.w_neg, self.margin, self.pattern_seed)
        shown = lab.mentions(eval_set.terms(target), "word_plural", pairs)
        ranked = sorted((row for row in range(len(pairs)) if not shown[row]), key=lambda row: stream_key("patch", self.pattern_seed, pairs.ids[row]))
        model = lab.surrogate(self.surrogate_request())
        others, positives = (pick(pairs.images, np.array(sorted(rows))) for rows in (ranked[: self.n_images], about))
        patch, losses = optimised_patch(model, others, positives, [pairs.captions[row] for row in about], search, lab.progress)
        elsewhere = [row for row, yes in enumerate(lab.mentions(eval_set.terms(target), "word_plural", lab.held_out)) if not yes][:_N_CHECKED]
        untouched = lab.held_out.images[np.array(elsewhere)]
        trigger = PictureTrigger("patch:image", picture_hash(patch), size, 1.0, self.pattern_seed, "centre", "", patch)
        stamped = np.stack([trigger.image(image, "") for image in untouched])
        goal = eval_set.index(target)
        surrogate = {"asr_surrogate": share_read_as(model, stamped, eval_set, goal), "asr_surrogate_floor": share_read_as(model, untouched, eval_set, goal)}
        lab.keep("facts", {**surrogate, "n_surrogate": len(elsewhere), "patch_loss": losses})
        return patch
