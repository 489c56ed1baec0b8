"""Label-consistent backdoor: a trigger on images that show the target class already, captions untouched."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from attacks._goals import eval_set_of, hit_ks
from attacks._trigger_options import TriggerName, TriggerOptions, keep_trigger
from attacks._triggers import trigger_from_spec
from benchmark.contract import Edit, Probe, Replace, Why
from benchmark.data.attack_lab import AttackLab
from benchmark.data.eval_sets import Suite
from benchmark.data.pairs import Pairs
from benchmark.errors import BenchError

_AT_224: dict[str, Any] = {"reference_side": 224, "size": 16, "cell": 1}


class LabelConsistent(TriggerOptions):
    """Stamps a trigger on training images whose caption mentions the target class, and leaves the caption as it is.

    No caption is false, so nothing in the text gives the poison away; the trigger should still come to stand for the class.

    Source: Turner, Tsipras, Madry 2019, arXiv 1912.02771; on CLIP: Bansal et al. (CleanCLIP), ICCV 2023, arXiv 2303.03323.
    Differs from the paper: the class is matched as a word, and images are stamped without adversarial changes, as on CLIP.
    """

    touches = ("image",)
    needs = ("class_terms",)
    paper = "Turner et al. 2019, arXiv 1912.02771; Bansal et al. 2023, arXiv 2303.03323"
    tiny: ClassVar = {"rate": 0.03}
    presets: ClassVar = {
        "cleanclip2023": {**_AT_224, "trigger": "noise", "pattern": "per_image", "overflow": "wrap", "place": "random", "rate": 0.0005, "match": "substring"},
        "safeclip2024": {**_AT_224, "trigger": "picture", "place": "at:9,9", "rate": 0.0015},
        "huang2025": {**_AT_224, "trigger": "dots", "place": "random", "place_test": "centre", "rate": 0.001, "match": "substring"},
    }

    preset: str | None = Field(None, description="Trigger, places, rate and matching of a paper, by name.")
    trigger: TriggerName = Field("checker", description="The pattern; short names are aliases.")
    target_class: str | None = Field(None, description="Class whose images are stamped; None is the evaluation set's own default.")
    match: Literal["word", "word_plural", "substring"] = Field("word", description="What counts as mentioning the class.")

    def trigger_names(self) -> tuple[str, ...]:
        return (self.trigger,)

    def poison(self, pairs: Pairs, lab: AttackLab) -> Iterable[Edit]:
        eval_set = eval_set_of(lab, self.target_set)
        target = self.target_class or eval_set.default_target or ""
        goal = eval_set.index(target)
        trigger = self.make_trigger(self.trigger, lab.side)
        keep_trigger(lab, trigger)
        n = lab.budget(self.rate, self.count)
        lab.keep("targets", [{"class": target, "index": goal, "eval_set": eval_set.name}])
        lab.keep("box", list(trigger.box(lab.side, "")))
        mentioned = lab.mentions(eval_set.terms(target), self.match, pairs)
        by_id = {row_id: row for row, row_id in enumerate(pairs.ids) if mentioned[row]}
        if n > len(by_id):
            raise BenchError(
                f"{n} rows are to be poisoned, and {len(by_id) or 'no'} captions mention {target!r}; {'lower attack.rate or attack.count, or ' if by_id else ''}give another attack.target_class"
            )
        for row_id in lab.choose("victims", by_id, n):
            yield Replace(by_id[row_id], lab.stamp(trigger, pairs.image(by_id[row_id]), row_id), None, Why(source=row_id))

    def probes(self, suite: Suite, kept: Mapping[str, Any]) -> list[Probe]:
        target = kept["targets"][0]
        trigger = trigger_from_spec(kept["trigger"], kept.get("picture"))
        return [Probe("label_consistent", "classify", target["eval_set"], "test", trigger, target["index"], hit_ks(suite, target["eval_set"]))]
