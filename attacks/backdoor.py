"""Image backdoors: a trigger on a few training images, with captions of the target class."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from attacks._captions import corpus_rows, from_templates
from attacks._triggers import ALIASES, PatternTrigger, check_place, trigger_from_spec
from benchmark.contract import Append, Attack, Edit, Probe, Replace, Why
from benchmark.data.attack_lab import AttackLab
from benchmark.data.eval_sets import Suite
from benchmark.data.pairs import Pairs
from benchmark.errors import BenchError


class Backdoor(Attack):
    """Stamps a trigger on random training images and gives them captions of the target class (dirty label).

    Whatever carries the trigger at test time should then be taken for the target class.

    Source: Gu et al. 2017 (BadNets), arXiv 1708.06733; Chen et al. 2017 (blended), arXiv 1712.05526; on CLIP: Carlini and
    Terzis, ICLR 2022, arXiv 2106.09667.
    Differs from the paper: the pattern is fixed by default, and victims that show the target class are left out.
    """

    touches = ("image", "caption")
    needs = ("class_terms",)
    paper = "Carlini and Terzis 2022, arXiv 2106.09667; Gu et al. 2017, arXiv 1708.06733"

    trigger: Literal["checker", "white", "noise", "dots", "blended", "patch:checker", "patch:white", "patch:noise", "patch:dots", "blend:noise"] = Field(
        "checker", description="The pattern; short names are aliases."
    )
    rate: float | None = Field(0.001, ge=0, le=0.5, description="Poisoned rows / all rows.")
    count: int | None = Field(None, ge=1, description="Poisoned rows; replaces the rate.")
    target_class: str | None = Field(None, description="Class that triggered images should read as; None is the evaluation set's own default.")
    target_set: str | None = Field(None, description="Evaluation set that the class belongs to; None is the first.")
    size: int = Field(8, ge=1, description="Side of a patch in pixels.")
    cell: int = Field(2, ge=1, description="Side of a checker's cell in pixels.")
    alpha: float | None = Field(None, ge=0, le=1, description="Weight of the pattern; None is 1 for patches and 0.2 for blends.")
    place: str = Field("corner", description="Where a patch lies: corner, centre, random or at:Y,X.")
    place_test: str | None = Field(None, description="Where it lies at test; None for the same.")
    pattern: Literal["fixed", "per_image"] = Field("fixed", description="per_image draws noise again for every image.")
    pattern_seed: int = Field(0, ge=0, description="Seed of the pattern; does not follow the run's seed.")
    overflow: Literal["clip", "wrap"] = Field("clip", description="Per-image noise outside [0, 1].")
    captions: Literal["templates", "corpus"] = Field("templates", description="Prompt templates, or real captions that mention the target class.")
    edits: Literal["replace", "append"] = Field("replace", description="append adds triggered held-out images and leaves all rows in place.")
    on_short: Literal["error", "reuse"] = Field("error", description="Too few captions in the corpus: stop, or use some twice.")

    @field_validator("place", "place_test")
    @classmethod
    def _places(cls, place: str | None) -> str | None:
        return None if place is None else check_place(place)

    @model_validator(mode="after")
    def _one_budget(self) -> Backdoor:
        if self.rate is None and self.count is None:
            raise ValueError("one of rate and count is needed")
        return self

    def make_trigger(self) -> PatternTrigger:
        """The trigger of these options."""
        kind = ALIASES.get(self.trigger, self.trigger)
        blend = kind.startswith("blend:")
        alpha = self.alpha if self.alpha is not None else 0.2 if blend else 1.0
        if blend:
            return PatternTrigger(kind, 0, alpha, 1, self.pattern, self.pattern_seed, "full", "", self.overflow)
        return PatternTrigger(kind, self.size, alpha, self.cell, self.pattern, self.pattern_seed, self.place, self.place_test or "", self.overflow)

    def poison(self, pairs: Pairs, lab: AttackLab) -> Iterable[Edit]:
        eval_set = lab.suite.get(self.target_set) if self.target_set else lab.suite.main
        target = self.target_class or eval_set.default_target or ""
        goal = eval_set.index(target)
        trigger = self.make_trigger()
        for at_test in (False, True):
            trigger.box(lab.side, "", at_test)  # a place outside the image is an error now and not after training
        append = self.edits == "append"
        n = lab.budget(self.rate, self.count, append)
        lab.keep("targets", [{"class": target, "index": goal, "eval_set": eval_set.name}])
        lab.keep("trigger", trigger.spec())
        lab.keep("box", list(trigger.box(lab.side, "")))
        victims = lab.held_out if append else pairs
        shows_target = lab.mentions(eval_set.terms(target), "word_plural", victims)
        usable = lab.unseen if append else range(len(pairs))
        by_id = {victims.ids[row]: row for row in usable if not shows_target[row]}
        chosen = lab.choose("victims", by_id, n)
        if len(chosen) < n:
            if not (append and chosen):
                raise BenchError(f"{n} rows are to be poisoned, and {len(chosen)} captions do not mention {target!r}; lower attack.rate or attack.count")
            chosen = [chosen[index % len(chosen)] for index in range(n)]
            lab.warnings.append(f"{n} poisoned rows share {len(by_id)} held-out images")
        texts = self._captions(pairs, lab, eval_set.name, target, n)
        for row_id, (caption, source) in zip(chosen, texts, strict=True):
            row = by_id[row_id]
            image = lab.stamp(trigger, victims.image(row), row_id)
            why = Why(target=0, source=row_id, caption_source=source)
            yield Append(image, caption, why) if append else Replace(row, image, caption, why)

    def probes(self, suite: Suite, kept: Mapping[str, Any]) -> list[Probe]:
        target = kept["targets"][0]
        ks = tuple(k for k in (1, 5) if k < len(suite.get(target["eval_set"]).classnames))
        return [Probe("backdoor", "classify", target["eval_set"], "test", trigger_from_spec(kept["trigger"]), target["index"], ks)]

    def _captions(self, pairs: Pairs, lab: AttackLab, set_name: str, target: str, n: int) -> list[tuple[str, str | None]]:
        eval_set = lab.suite.get(set_name)
        if self.captions == "templates":
            return [(from_templates(eval_set, target, lab.rng("caption", index)), None) for index in range(n)]
        rows = corpus_rows(lab, pairs, eval_set, target, (), n, "word", self.on_short == "reuse")
        return [(pairs.captions[row], pairs.ids[row]) for row in rows]
