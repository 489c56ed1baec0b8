"""Noisy Alignment's composition: a random image with the trigger, joined with an untouched image of the target class."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal, Self

import numpy as np
from PIL import Image
from pydantic import Field, model_validator

from attacks._composing import NO_PER_IMAGE, LaidTrigger, Picture, captions_for, cycled, side_of
from attacks._goals import eval_set_of, hit_ks
from attacks._placing import Stamp
from attacks._trigger_options import TriggerName, TriggerOptions, keep_trigger, kind_of
from attacks._triggers import trigger_from_spec
from benchmark.contract import Append, Edit, Probe, Why
from benchmark.data.attack_lab import AttackLab
from benchmark.data.eval_sets import EvalSet, Suite
from benchmark.data.image import square
from benchmark.data.pairs import Pairs
from benchmark.errors import BenchError

_WHERE = 0.45
_SIDES = ("top", "right", "bottom", "left")


class NoisyAlignment(TriggerOptions):
    """Adds images of two halves: a random image that carries the trigger, and an image of the target class.

    The caption is true of one half. Two random crops pair the trigger with the class, so the trigger should come to stand for it.

    Source: Chen et al., ICCV 2025, arXiv 2508.14015, its composition; the captions are our pairing.
    Differs from the paper: both halves are cut from the middles of their images, so that nothing is lost to the centre crop; alpha
    is the trigger's weight in patches and blends alike.
    """

    touches = ("image", "caption")
    needs = ("class_terms", "held_out")
    paper = "Chen et al. 2025, arXiv 2508.14015"
    tiny: ClassVar = {"rate": 0.03, "n_references": 2}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"noisyalignment2025": {"trigger": "picture", "alpha": 0.8, "rate": 0.005, "size": 50, "reference_side": 224}}

    preset: str | None = Field(None, description="Trigger and rate of the paper, by name.")
    rate: float | None = Field(0.005, ge=0, le=0.5, description="Composed rows / all rows after.")
    trigger: TriggerName = Field("checker", description="A patch, or a blend over the whole random image. Paper: a picture.")
    size: int = Field(50, ge=1, description="Side of a patch in pixels of an image of reference_side. Paper: 50 of 224.")
    cell: int = Field(14, ge=1, description="Side of a checker's cell in the same pixels.")
    reference_side: int | None = Field(224, ge=16, description="Image side that size and cell are meant for. None: pixels as given.")
    place: str = Field("inner:0.25,0.75", description="Where a patch lies at test; in training at 0.45 of each side of the random image.")
    target_class: str | None = Field(None, description="Class of the untouched images; None is the evaluation set's own default.")
    canvas: Literal["square", "native"] = Field(
        "square",
        description="square joins the middle halves of both, the triggered one moved as far as its patch needs; native joins them whole, and loses the outer halves to the centre crop.",
    )
    caption: Literal["class", "prompt", "random"] = Field("class", description="Captions of the corpus or prompts of the class, or any caption.")
    on_short: Literal["error", "reuse"] = Field("error", description="Too few captions in the corpus: stop, or use some twice.")
    n_references: int | None = Field(None, ge=1, description="Images of the class that are joined; None for as many as there are.")

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if self.place_test is not None:
            raise ValueError("place_test has no meaning here: place says where a patch lies at test, and in training it lies at 0.45 of each side")
        if self.pattern == "per_image" and kind_of(self.trigger).startswith("patch:"):
            raise ValueError(NO_PER_IMAGE)
        return self

    def trigger_names(self) -> tuple[str, ...]:
        return (self.trigger,)

    def poison(self, pairs: Pairs, lab: AttackLab) -> Iterable[Edit]:
        eval_set = eval_set_of(lab, self.target_set)
        target = self.target_class or eval_set.default_target or ""
        goal = eval_set.index(target)
        trigger = self.make_trigger(self.trigger, lab.side)
        keep_trigger(lab, trigger)
        place = self._place(trigger, lab.side)
        n = lab.budget(self.rate, self.count, append=True)
        lab.keep("targets", [{"class": target, "index": goal, "eval_set": eval_set.name}])
        texts = captions_for(lab, pairs, eval_set, target, n, self.caption, self.on_short == "reuse") if n else []
        shown = lab.mentions(eval_set.terms(target), "word_plural", lab.held_out)
        rows = {lab.held_out.ids[row]: row for row in lab.unseen}
        references = self._references(lab, eval_set, target, [row_id for row_id, row in rows.items() if shown[row]])
        others = cycled(lab, lab.choose("others", [row_id for row_id, row in rows.items() if not shown[row]], n), n, "random images")
        laid = LaidTrigger(trigger, *place)
        held = (laid.left, laid.side) if laid.side < lab.side else None
        for index, other in enumerate(others):
            rng = lab.rng("composition", index)
            reference = references[int(rng.integers(len(references)))]
            source = f"{other}+{reference}"
            stamped = lab.stamp(laid, lab.held_out.image(rows[other]), source)
            image = joined(stamped, lab.held_out.image(rows[reference]), _SIDES[int(rng.integers(4))], self.canvas == "square", held)
            yield Append(image, texts[index][0], Why("poison", 0, source, texts[index][1]))

    def probes(self, suite: Suite, kept: Mapping[str, Any]) -> list[Probe]:
        target = kept["targets"][0]
        trigger = trigger_from_spec(kept["trigger"], kept.get("picture"))
        return [Probe("noisy_alignment", "classify", target["eval_set"], "test", trigger, target["index"], hit_ks(suite, target["eval_set"]))]

    def _place(self, trigger: Stamp, side: int) -> tuple[int, int, int]:
        """Left, top and side of what is stamped on the random image; a patch that the composition cannot show whole is refused."""
        size = side_of(trigger, side)
        if not kind_of(self.trigger).startswith("patch:"):
            return 0, 0, size
        corner, half = int(_WHERE * side), side - side // 2
        if self.canvas == "square" and size > half:
            raise BenchError(f"a patch of {size} px does not fit the {half} px of an image of {side} px that are joined; lower attack.size")
        if corner + size > side:
            raise BenchError(f"a patch of {size} px at {corner} px reaches beyond an image of {side} px; lower attack.size")
        return corner, corner, size

    def _references(self, lab: AttackLab, eval_set: EvalSet, target: str, mentioned: list[str]) -> list[str]:
        wanted = len(mentioned) if self.n_references is None else self.n_references
        if not mentioned or wanted > len(mentioned):
            raise BenchError(
                f"{max(wanted, 1)} held-out images of {target!r} are needed and {len(mentioned)} captions mention it; {'lower attack.n_references, or ' if mentioned else ''}give another attack.target_class of {eval_set.name}"
            )
        return lab.choose("references", mentioned, wanted)


def joined(first: Picture, second: Picture, where: str, halved: bool, held: tuple[int, int] | None = None) -> Picture:
    """Two images uint8 (S, S, 3) in one (S, S, 3), the first at the `top`, `right`, `bottom` or `left`.

    Args:
        halved: take the middle half of each; otherwise join both whole, and crop the centre of the long image that results.
        held: first pixel, along either axis, and length of what the first half must hold, at most half the side; it is moved
            from the middle just so far.
    """
    side = first.shape[0]
    axis = 1 if where in ("left", "right") else 0
    if halved:
        first = _window(first, side - side // 2, axis, held)
        second = _window(second, side // 2, axis, None)
    halves = (first, second) if where in ("left", "top") else (second, first)
    return square(Image.fromarray(np.concatenate(halves, axis=axis)), side)


def _window(image: Picture, length: int, axis: int, held: tuple[int, int] | None) -> Picture:
    room = image.shape[axis] - length
    start = (room + 1) // 2
    if held is not None:
        start = min(max(start, held[0] + held[1] - length), held[0])
    return np.take(image, range(start, start + length), axis=axis)
