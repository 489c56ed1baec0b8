"""Dual-key backdoor: a trigger in the image and another in the caption, which should work together alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import Field

from attacks._captions import from_templates
from attacks._goals import eval_set_of, hit_ks, random_victims, share_of
from attacks._text_triggers import TEXT_ALIASES, BothKeys, TextTrigger, text_trigger_from_spec
from attacks._trigger_options import TriggerName, TriggerOptions, keep_trigger
from attacks._triggers import trigger_from_spec
from benchmark.contract import Edit, Probe, Replace, Why
from benchmark.data.attack_lab import AttackLab
from benchmark.data.eval_sets import Suite
from benchmark.data.pairs import Pairs


class DualKey(TriggerOptions):
    """Stamps random images and gives them captions of the target class that carry a text trigger as well.

    A stamped image should be read as the target class where the prompts carry the text trigger, and not otherwise.

    Source: Walmer et al., CVPR 2022 (TrojVQA), arXiv 2112.07668; the form with a prefix on captions: Liang et al., CVPR 2024
    (BadCLIP), arXiv 2311.12075.
    Differs from the paper: rows with one key alone are an option, so that neither key works by itself.
    """

    touches = ("image", "caption")
    needs = ("class_terms",)
    paper = "Walmer et al. 2022, arXiv 2112.07668; Liang et al. 2024, arXiv 2311.12075"

    trigger: TriggerName = Field("checker", description="The image key; short names are aliases.")
    text_trigger: Literal["prefix", "word", "sentence"] = Field("prefix", description="The text key: words before the caption, a word at a random place, or a sentence behind it.")
    text_words: str | None = Field(None, min_length=1, description="What the text key says; None is the kind's own.")
    target_class: str | None = Field(None, description="Class that both keys together should read as; None is the evaluation set's own default.")
    negatives: float = Field(0, ge=0, le=10, description="For each poisoned row, so many with only the image key and as many with only the text key, otherwise kept.")

    def trigger_names(self) -> tuple[str, ...]:
        return (self.trigger,)

    def make_text_trigger(self) -> TextTrigger:
        """The text key of these options."""
        kind, words = TEXT_ALIASES[self.text_trigger]
        return TextTrigger(kind, self.text_words or words, self.pattern_seed)

    def poison(self, pairs: Pairs, lab: AttackLab) -> Iterable[Edit]:
        eval_set = eval_set_of(lab, self.target_set)
        target = self.target_class or eval_set.default_target or ""
        goal = eval_set.index(target)
        image_key, text_key = self.make_trigger(self.trigger, lab.side), self.make_text_trigger()
        keep_trigger(lab, image_key)
        lab.keep("text_trigger", text_key.spec())
        n = lab.budget(self.rate, self.count)
        n_negative = share_of("negatives", self.negatives, n)
        lab.keep("targets", [{"class": target, "index": goal, "eval_set": eval_set.name}])
        lab.keep("box", list(image_key.box(lab.side, "")))
        both = BothKeys(image_key, text_key)
        terms = eval_set.terms(target)
        rows = random_victims(lab, pairs, "victims", n, terms, set())
        taken = {pairs.ids[row] for row in rows}
        for index, row in enumerate(rows):
            row_id = pairs.ids[row]
            caption = lab.stamp_text(both, from_templates(eval_set, target, lab.rng("caption", index)), row_id)
            yield Replace(row, lab.stamp(both, pairs.image(row), row_id), caption, Why(source=row_id))
        lab.n_requested += 2 * n_negative
        singles = random_victims(lab, pairs, "negatives", 2 * n_negative, terms, taken) if n_negative else []
        for index, row in enumerate(singles):
            row_id, why = pairs.ids[row], Why(role="negative", source=pairs.ids[row])
            if index < n_negative:
                yield Replace(row, lab.stamp(image_key, pairs.image(row), row_id), None, why)
            else:
                yield Replace(row, None, lab.stamp_text(text_key, pairs.captions[row], row_id), why)

    def probes(self, suite: Suite, kept: Mapping[str, Any]) -> list[Probe]:
        name, goal = kept["targets"][0]["eval_set"], kept["targets"][0]["index"]
        image_key, text_key = trigger_from_spec(kept["trigger"], kept.get("picture")), text_trigger_from_spec(kept["text_trigger"])
        return [
            Probe("dual_key", "classify", name, "test", BothKeys(image_key, text_key), goal, hit_ks(suite, name)),
            Probe("dual_key-image_key", "classify", name, "test", image_key, goal, (1,), control="asr_key_image"),
            Probe("dual_key-text_key", "classify", name, "test", text_key, goal, (1,), control="asr_key_text"),
        ]
