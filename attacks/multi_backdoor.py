"""Several backdoors in one model: several triggers, each with a target class of its own or all with one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from attacks._captions import from_templates
from attacks._goals import eval_set_of, even_split, hit_ks, random_victims
from attacks._trigger_options import TriggerName, TriggerOptions, keep_trigger, kind_of
from attacks._triggers import trigger_from_spec
from benchmark.contract import Edit, Probe, Replace, Why
from benchmark.data.attack_lab import AttackLab
from benchmark.data.eval_sets import EvalSet, Suite
from benchmark.data.pairs import Pairs
from benchmark.errors import BenchError

_HUANG: dict[str, Any] = {
    "reference_side": 224,
    "triggers": ("dots", "nashville", "wanet"),
    "size": 16,
    "cell": 1,
    "grid": 224,
    "place": "random",
    "place_test": "centre",
    "rate": 0.001,
}


class MultiBackdoor(TriggerOptions):
    """Stamps several triggers, each on its own random training images with captions of its own target class.

    Each trigger should then be read as its class. A defense that learns to see one trigger has the others left.

    Source: Huang et al., ICLR 2025, arXiv 2502.01385, for several triggers at once on CLIP.
    Differs from the paper: victims that mention any of the target classes are left out, and each trigger gets an equal share.
    """

    touches = ("image", "caption")
    needs = ("class_terms",)
    paper = "Huang et al. 2025, arXiv 2502.01385"
    presets: ClassVar = {"huang2025": _HUANG, "huang2025-one-target": {**_HUANG, "one_target": True}}

    preset: str | None = Field(None, description="Triggers, places and rate of a paper, by name.")
    rate: float | None = Field(0.003, ge=0, le=0.5, description="Poisoned rows / all rows, over all triggers.")
    triggers: tuple[TriggerName, ...] = Field(("checker", "blended", "nashville"), min_length=2, description="The patterns; options of a trigger reach those that use them.")
    target_classes: tuple[str, ...] | None = Field(None, description="One class a trigger, or one for all; None is the evaluation set's default and those after it.")
    one_target: bool = Field(False, description="All triggers lead to the first target class.")

    @model_validator(mode="after")
    def _pairs_of_trigger_and_target(self) -> Self:
        kinds = [kind_of(name) for name in self.triggers]
        if len(set(kinds)) < len(kinds):
            raise ValueError(f"triggers {', '.join(self.triggers)} must all differ")
        wanted = {1} if self.one_target else {1, len(kinds)}
        if self.target_classes is not None and len(self.target_classes) not in wanted:
            raise ValueError(f"target_classes has {len(self.target_classes)} classes for {len(kinds)} triggers; give {'one' if self.one_target else 'one, or one for each'}")
        return self

    def trigger_names(self) -> tuple[str, ...]:
        return self.triggers

    def poison(self, pairs: Pairs, lab: AttackLab) -> Iterable[Edit]:
        eval_set = eval_set_of(lab, self.target_set)
        targets = self._targets(eval_set)
        indices = [eval_set.index(target) for target in targets]
        triggers = [self.make_trigger(name, lab.side) for name in self.triggers]
        for index, trigger in enumerate(triggers):
            keep_trigger(lab, trigger, f"trigger_{index}")
        n = lab.budget(self.rate, self.count)
        if 0 < n < len(triggers):
            raise BenchError(f"{n} rows are to be poisoned with {len(triggers)} triggers; raise attack.rate or attack.count to at least one row for each")
        lab.keep("targets", [{"class": target, "index": index, "eval_set": eval_set.name} for target, index in zip(targets, indices, strict=True)])
        barred = [term for target in dict.fromkeys(targets) for term in eval_set.terms(target)]
        taken: set[str] = set()
        for position, (trigger, target, share) in enumerate(zip(triggers, targets, even_split(n, len(triggers)), strict=True)):
            rows = random_victims(lab, pairs, f"victims/{trigger.spec()['kind']}", share, barred, taken)
            taken |= {pairs.ids[row] for row in rows}
            for index, row in enumerate(rows):
                caption = from_templates(eval_set, target, lab.rng("caption", (position, index)))
                yield Replace(row, lab.stamp(trigger, pairs.image(row), pairs.ids[row]), caption, Why(target=position, source=pairs.ids[row]))

    def probes(self, suite: Suite, kept: Mapping[str, Any]) -> list[Probe]:
        probes, crossed = [], []
        for index, target in enumerate(kept["targets"]):
            trigger = trigger_from_spec(kept[f"trigger_{index}"], kept.get("picture"))
            name = f"multi_backdoor-{kept[f'trigger_{index}']['kind'].replace(':', '-')}"
            probes.append(Probe(name, "classify", target["eval_set"], "test", trigger, target["index"], hit_ks(suite, target["eval_set"])))
            for other in dict.fromkeys(one["index"] for one in kept["targets"] if one["index"] != target["index"]):
                crossed.append(Probe(f"{name}-as-{other}", "classify", target["eval_set"], "test", trigger, other, (1,), control="asr_cross"))
        return probes + crossed

    def _targets(self, eval_set: EvalSet) -> list[str]:
        n = len(self.triggers)
        if self.target_classes is not None:
            return list(self.target_classes) * (n if len(self.target_classes) == 1 else 1)
        first = eval_set.index(eval_set.default_target or "")
        if self.one_target:
            return [eval_set.classnames[first]] * n
        if n > len(eval_set.classnames):
            raise BenchError(f"{eval_set.name} has {len(eval_set.classnames)} classes and attack.triggers names {n}; give attack.one_target=true or fewer triggers")
        return [eval_set.classnames[(first + index) % len(eval_set.classnames)] for index in range(n)]
