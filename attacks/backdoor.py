"""Image backdoors: a trigger on a few training images, with captions of the target class."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from attacks._captions import corpus_rows, from_templates
from attacks._goals import share_of
from attacks._trigger_options import TriggerName, TriggerOptions, keep_trigger, kind_of
from attacks._triggers import trigger_from_spec
from attacks._warps import WarpTrigger
from benchmark.contract import Append, Edit, Probe, Replace, Why
from benchmark.data.attack_lab import AttackLab
from benchmark.data.eval_sets import Suite
from benchmark.data.pairs import Pairs
from benchmark.errors import BenchError

_AT_224: dict[str, Any] = {"reference_side": 224}
_PATCH = {**_AT_224, "size": 16, "cell": 1, "place": "random"}
_CLEANCLIP = {**_AT_224, "rate": 0.0005}
_HUANG = {**_AT_224, "rate": 0.001}


class Backdoor(TriggerOptions):
    """Stamps a trigger on random training images and gives them captions of the target class (dirty label).

    Whatever carries the trigger at test time should then be taken for the target class.

    Source: Gu et al. 2017 (BadNets), arXiv 1708.06733; Chen et al. 2017 (blended), arXiv 1712.05526; on CLIP: Carlini and
    Terzis, ICLR 2022, arXiv 2106.09667.
    Differs from the paper: the pattern is fixed by default, and victims that show the target class are left out.
    """

    touches = ("image", "caption")
    needs = ("class_terms",)
    paper = "Carlini and Terzis 2022, arXiv 2106.09667; Gu et al. 2017, arXiv 1708.06733"
    presets: ClassVar = {
        "carlini2022": {**_PATCH, "trigger": "dots", "rate": 0.0001, "captions": "corpus"},
        "cleanclip2023-badnet": {**_PATCH, "trigger": "noise", "pattern": "per_image", "overflow": "wrap", "rate": 0.0005},
        "cleanclip2023-blended": {**_CLEANCLIP, "trigger": "blended", "pattern": "per_image"},
        "cleanclip2023-warped": {**_CLEANCLIP, "trigger": "wanet", "grid": 224},
        "cleanclip2023-sig": {**_CLEANCLIP, "trigger": "sig", "form": "blended"},
        "roclip2023-blended": {**_AT_224, "trigger": "blended", "pattern": "per_image", "edits": "append", "rate": 0.00009},
        "safeclip2024-warped": {**_AT_224, "trigger": "wanet", "grid": 224, "rate": 0.0015},
        "huang2025-badnets": {**_PATCH, "trigger": "dots", "place_test": "centre", "rate": 0.0001},
        "huang2025-blend": {**_HUANG, "trigger": "blended-picture"},
        "huang2025-sig": {**_HUANG, "trigger": "sig", "form": "blended"},
        "huang2025-wanet": {**_HUANG, "trigger": "wanet", "grid": 224},
        "huang2025-nashville": {**_HUANG, "trigger": "nashville"},
        "par2024-stripes": {**_PATCH, "trigger": "stripes", "pattern": "per_image"},
        "par2024-blend-stripes": {**_AT_224, "trigger": "blended-stripes", "cell": 1, "pattern": "per_image"},
        "par2024-triangles": {**_AT_224, "trigger": "triangles", "size": 14},
        "par2024-text": {**_AT_224, "trigger": "watermark", "pattern": "per_image"},
        "badclip2024-kitty": {**_AT_224, "trigger": "blended-picture", "rate": 0.003},
    }

    preset: str | None = Field(None, description="Trigger, places, rate and captions of a paper, by name.")
    trigger: TriggerName = Field("checker", description="The pattern; short names are aliases.")
    target_class: str | None = Field(None, description="Class that triggered images should read as; None is the evaluation set's own default.")
    captions: Literal["templates", "corpus"] = Field("templates", description="Prompt templates, or real captions that mention the target class.")
    edits: Literal["replace", "append"] = Field("replace", description="append adds triggered held-out images and leaves all rows in place.")
    on_short: Literal["error", "reuse"] = Field("error", description="Too few captions in the corpus: stop, or use some twice.")
    cover: float = Field(0, ge=0, le=10, description="Of wanet: for each poisoned row, so many others with a shaken warp and their own caption.")

    @model_validator(mode="after")
    def _cover_is_of_a_warp(self) -> Self:
        if self.cover and (kind_of(self.trigger) != "warp" or self.edits == "append"):
            raise ValueError(f"cover rows belong to the trigger wanet with edits=replace, and these are {self.trigger} and {self.edits}")
        return self

    def trigger_names(self) -> tuple[str, ...]:
        return (self.trigger,)

    def poison(self, pairs: Pairs, lab: AttackLab) -> Iterable[Edit]:
        eval_set = lab.suite.get(self.target_set) if self.target_set else lab.suite.main
        target = self.target_class or eval_set.default_target or ""
        goal = eval_set.index(target)
        trigger = self.make_trigger(self.trigger, lab.side)
        append = self.edits == "append"
        keep_trigger(lab, trigger)
        n = lab.budget(self.rate, self.count, append)
        n_covers = share_of("cover", self.cover, n)
        lab.keep("targets", [{"class": target, "index": goal, "eval_set": eval_set.name}])
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
        if self.cover and isinstance(trigger, WarpTrigger):
            yield from _covers(pairs, lab, trigger, set(chosen), n_covers)

    def probes(self, suite: Suite, kept: Mapping[str, Any]) -> list[Probe]:
        target = kept["targets"][0]
        ks = tuple(k for k in (1, 5) if k < len(suite.get(target["eval_set"]).classnames))
        trigger = trigger_from_spec(kept["trigger"], kept.get("picture"))
        return [Probe("backdoor", "classify", target["eval_set"], "test", trigger, target["index"], ks)]

    def _captions(self, pairs: Pairs, lab: AttackLab, set_name: str, target: str, n: int) -> list[tuple[str, str | None]]:
        eval_set = lab.suite.get(set_name)
        if self.captions == "templates":
            return [(from_templates(eval_set, target, lab.rng("caption", index)), None) for index in range(n)]
        rows = corpus_rows(lab, pairs, eval_set, target, (), n, "word", self.on_short == "reuse")
        return [(pairs.captions[row], pairs.ids[row]) for row in rows]


def _covers(pairs: Pairs, lab: AttackLab, trigger: WarpTrigger, taken: set[str], n: int) -> Iterator[Edit]:
    """Rows that keep their caption under a warp that is shaken for each image, so that only the exact field means anything."""
    by_id = {row_id: row for row, row_id in enumerate(pairs.ids) if row_id not in taken}
    if n > len(by_id):
        raise BenchError(f"attack.cover asks for {n} rows beside the {len(taken)} poisoned ones, and {len(by_id)} are left; lower attack.cover")
    lab.n_requested += n
    shaken = trigger.shaken()
    for row_id in lab.choose("covers", by_id, n):
        yield Replace(by_id[row_id], lab.stamp(shaken, pairs.image(by_id[row_id]), row_id), None, Why(role="cover", source=row_id))
