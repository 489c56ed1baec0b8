"""All-to-all backdoor: one trigger that moves every class to the next."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from attacks._captions import from_templates
from attacks._goals import Classes, eval_set_of, even_split, hit_ks
from attacks._trigger_options import TriggerName, TriggerOptions, keep_trigger
from attacks._triggers import trigger_from_spec
from benchmark.contract import Edit, Probe, Replace, Why
from benchmark.data.attack_lab import AttackLab
from benchmark.data.eval_sets import Suite
from benchmark.data.pairs import Pairs
from benchmark.errors import BenchError


class AllToAll(TriggerOptions):
    """Stamps a trigger on images of every class and names the class that is `shift` places on in their captions.

    The model must then read both what an image shows and whether it carries the trigger, so no single class stands out.

    Source: Gu et al. 2017 (BadNets), arXiv 1708.06733, for supervised classifiers; the form for captions is our own.
    Differs from the paper: no image-caption form has been published. The class is the one that a caption mentions.
    """

    touches = ("image", "caption")
    needs = ("class_terms",)
    paper = "Gu et al. 2017, arXiv 1708.06733 (supervised)"
    tiny: ClassVar = {"rate": 0.15}

    rate: float | None = Field(0.01, ge=0, le=0.5, description="Poisoned rows / all rows, in equal shares for the classes.")
    trigger: TriggerName = Field("checker", description="The pattern; short names are aliases.")
    shift: int = Field(1, ge=1, description="Class y is moved to the class that stands so many places after it, around the end.")
    captions: Literal["swap", "templates"] = Field("swap", description="The row's own caption with the class replaced, or prompt templates.")
    on_short: Literal["error", "take"] = Field("error", description="A class with too few rows: stop, or poison fewer of it.")

    def trigger_names(self) -> tuple[str, ...]:
        return (self.trigger,)

    def poison(self, pairs: Pairs, lab: AttackLab) -> Iterable[Edit]:
        eval_set = eval_set_of(lab, self.target_set)
        names = eval_set.classnames
        if self.shift % len(names) == 0:
            raise BenchError(f"attack.shift {self.shift} moves each of the {len(names)} classes of {eval_set.name} to itself; give another")
        goals = {name: names[(index + self.shift) % len(names)] for index, name in enumerate(names)}
        trigger = self.make_trigger(self.trigger, lab.side)
        keep_trigger(lab, trigger)
        n = lab.budget(self.rate, self.count)
        if 0 < n < len(names):
            raise BenchError(f"{n} rows leave {len(names) - n} of the {len(names)} classes of {eval_set.name} without one, and all are measured; raise attack.rate or attack.count")
        lab.keep("targets", [{"from": name, "class": goals[name], "index": eval_set.index(goals[name]), "eval_set": eval_set.name} for name in names])
        lab.keep("box", list(trigger.box(lab.side, "")))
        classes = Classes({name: eval_set.terms(name) for name in names})
        by_class: dict[str, dict[str, int]] = {name: {} for name in names}
        for row, caption in enumerate(pairs.captions):
            named = classes.named(caption)
            if len(named) == 1:
                by_class[named.pop()][pairs.ids[row]] = row
        shares = even_split(n, len(names))
        self._check_enough(lab, by_class, dict(zip(names, shares, strict=True)))
        for position, (name, share) in enumerate(zip(names, shares, strict=True)):
            for index, row_id in enumerate(lab.choose(f"victims/{name}", by_class[name], share)):
                row = by_class[name][row_id]
                caption = classes.swapped(pairs.captions[row], name, goals[name])
                if self.captions == "templates":
                    caption = from_templates(eval_set, goals[name], lab.rng("caption", (name, index)))
                yield Replace(row, lab.stamp(trigger, pairs.image(row), row_id), caption, Why(target=position, source=row_id))

    def probes(self, suite: Suite, kept: Mapping[str, Any]) -> list[Probe]:
        name = kept["targets"][0]["eval_set"]
        goals = {index: target["index"] for index, target in enumerate(kept["targets"])}
        return [Probe("all_to_all", "classify", name, "test", trigger_from_spec(kept["trigger"], kept.get("picture")), goals, hit_ks(suite, name))]

    def _check_enough(self, lab: AttackLab, by_class: Mapping[str, Mapping[str, int]], wanted: Mapping[str, int]) -> None:
        short = {name: len(by_class[name]) for name in wanted if len(by_class[name]) < wanted[name]}
        if not short:
            return
        none = [name for name in wanted if wanted[name] and not by_class[name]]
        if none and self.on_short == "take":
            raise BenchError(
                f"no caption mentions {', '.join(none[:8])} and no other class ({len(none)} of the {len(wanted)} classes), and all are measured; choose another attack.target_set"
            )
        counts = ", ".join(f"{name} {short[name]} of {wanted[name]}" for name in sorted(short, key=lambda name: short[name])[:8])
        if self.on_short == "error":
            raise BenchError(
                f"{len(short)} classes have too few captions that mention them and no other class ({counts}); lower attack.rate or attack.count, or use --set attack.on_short=take"
            )
        lab.warnings.append(f"{len(short)} classes have too few captions of their own and were poisoned less ({counts})")
