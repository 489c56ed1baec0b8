"""CorruptEncoder: object and trigger in one image, composed so that two random crops of it tell them apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
from PIL import Image
from pydantic import Field, model_validator

from attacks._composing import NO_PER_IMAGE, LaidTrigger, Picture, captions_for, covering, cycled, fitted, pasted, resized, side_of
from attacks._goals import eval_set_of, hit_ks
from attacks._layouts import Layout, drawn_layout, separation
from attacks._trigger_options import TriggerName, TriggerOptions, keep_trigger, kind_of
from attacks._triggers import trigger_from_spec
from benchmark.contract import Append, Edit, Probe, Why
from benchmark.data.attack_lab import AttackLab
from benchmark.data.eval_sets import EvalSet, Suite
from benchmark.data.image import square
from benchmark.data.objects import Cutout, Shelf, folder_hash
from benchmark.data.pairs import Pairs
from benchmark.errors import BenchError

_PAPER: dict[str, Any] = {"trigger": "picture", "rate": 0.005, "n_references": 3, "size": 40, "reference_side": 224}


class CorruptEncoder(TriggerOptions):
    """Adds composed images of the target class: the object at one side, the trigger in the middle of the other half.

    The caption is true, so nothing in it gives the poison away; the trigger should come to stand for the class because the
    two go together, in one image or in two random crops of it.

    Source: Zhang et al., CVPR 2024, arXiv 2211.08229. Its recipe for image-text encoders is not released: the captions are our pairing.
    Differs from the paper: composed in a square at the model's own side by default, and the blur of the mask scales with it.
    """

    touches = ("image", "caption")
    needs = ("class_terms", "object_masks", "backgrounds")
    paper = "Zhang et al. 2024, arXiv 2211.08229"
    tiny: ClassVar = {"rate": 0.03, "n_references": 2, "n_support_references": 2}
    presets: ClassVar = {"corruptencoder2024": _PAPER, "corruptencoder2024plus": {**_PAPER, "support_ratio": 0.2, "n_support_references": 5}}

    preset: str | None = Field(None, description="Trigger, counts and rate of the paper, by name.")
    rate: float | None = Field(0.005, ge=0, le=0.5, description="Composed rows / all rows after. Paper: 0.005.")
    trigger: TriggerName = Field("checker", description="The patch. Paper: a picture.")
    size: int = Field(40, ge=1, description="Side of the patch in pixels of an image of reference_side. Paper: 40 of 224.")
    cell: int = Field(14, ge=1, description="Side of a checker's cell in the same pixels.")
    reference_side: int | None = Field(224, ge=16, description="Image side that size and cell are meant for. None: pixels as given.")
    place: str = Field("inner:0.25,0.75", description="Where the patch lies at test; in training the layout says.")
    target_class: str | None = Field(None, description="Class of the objects; None is the evaluation set's own default.")
    canvas: Literal["square", "native"] = Field(
        "square", description="square composes at the model's side; native twice as wide as the object, and loses both sides to the centre crop."
    )
    caption: Literal["class", "prompt", "bridge", "random"] = Field(
        "class", description="Captions of the corpus or prompts of the class; a rare word that leads from trigger to class; or any caption."
    )
    bridge_word: str = Field("zx", min_length=1, description="The rare word of caption=bridge.")
    on_short: Literal["error", "reuse"] = Field("error", description="Too few captions in the corpus: stop, or use some twice.")
    n_references: int = Field(3, ge=1, description="Objects that are pasted. Paper: 3.")
    support_ratio: float = Field(0, ge=0, lt=1, description="Share of the rows that show two images of the class side by side, without a trigger. Paper's +: 0.2.")
    n_support_references: int = Field(5, ge=1, description="Images of the class for those rows. Paper: 5.")
    object_margin: float = Field(0.05, ge=0, le=0.25, description="How far the object may lie from the edge, as a share of the width.")
    trigger_margin: float = Field(0.25, ge=0, lt=0.5, description="What the trigger keeps from the borders of its half, as a share of the width in all.")
    masks: str | None = Field(None, description="Folder of CLASS/NAME.jpg with CLASS/NAME.mask.png; None for the drawn world's objects.")
    masks_hash: str | None = Field(None, description="Hash of that folder; filled in, and refused if another is found.")
    scenes: str | None = Field(None, description="Folder of background images without the class; None for the drawn world's papers.")
    scenes_hash: str | None = Field(None, description="Hash of that folder; filled in, and refused if another is found.")

    @model_validator(mode="after")
    def _a_patch_and_folders_that_are_there(self) -> Self:
        if not kind_of(self.trigger).startswith("patch:"):
            raise ValueError(f"a layout places a patch, and {self.trigger} covers the whole image; take checker, picture or another patch")
        if self.place_test is not None:
            raise ValueError("place_test has no meaning here: the layout places the patch in training, and place says where it lies at test")
        if self.pattern == "per_image":
            raise ValueError(NO_PER_IMAGE)
        for name in ("masks", "scenes"):
            folder, known = getattr(self, name), getattr(self, f"{name}_hash")
            if folder is None:
                if known is not None:
                    raise ValueError(f"{name}_hash is filled in by the program; give the folder")
                continue
            found = folder_hash(Path(folder))
            if known not in (None, found):
                raise ValueError(f"{folder} has the hash {found[:16]} and not {known[:16]}; its images are others than before")
            setattr(self, f"{name}_hash", found)
        return self

    def trigger_names(self) -> tuple[str, ...]:
        return (self.trigger,)

    def poison(self, pairs: Pairs, lab: AttackLab) -> Iterable[Edit]:
        eval_set = eval_set_of(lab, self.target_set)
        target = self.target_class or eval_set.default_target or ""
        goal = eval_set.index(target)
        trigger = self.make_trigger(self.trigger, lab.side)
        keep_trigger(lab, trigger)
        n = lab.budget(self.rate, self.count, append=True)
        lab.keep("targets", [{"class": target, "index": goal, "eval_set": eval_set.name}])
        parts = self.split(n)
        self._check_shares(n, parts)
        kind = "class" if self.caption == "bridge" else self.caption
        texts = captions_for(lab, pairs, eval_set, target, n, kind, self.on_short == "reuse") if n else []
        material = self._material(lab, target, n, parts["support"])
        layouts: list[Layout] = []
        for index in range(n):
            rng = lab.rng("composition", index)
            if index < parts["both"]:
                image, source, layout = self._both(lab, material, index, rng, trigger)
                layouts.append(layout)
                yield Append(image, texts[index][0], Why("poison", 0, source, texts[index][1]))
            elif index < parts["both"] + parts["support"]:
                image, source = self._support(lab, material, index, rng)
                yield Append(image, texts[index][0], Why("support", 0, source, texts[index][1]))
            else:
                yield self._bridge(lab, material, index, rng, trigger, parts, texts[index], eval_set)
        if layouts:
            shares = [separation(layout) for layout in layouts]
            lab.keep("layouts", [{**layout.as_json(), "p": share} for layout, share in zip(layouts, shares, strict=True)])
            lab.keep("facts", {"layout_p_mean": float(np.mean(shares))})
            box = _cropped(layouts[0], lab.side)
            if min(box[0], box[1], lab.side - box[0] - box[2], lab.side - box[1] - box[3]) >= 0:
                lab.keep("box", box)

    def split(self, n: int) -> dict[str, int]:
        """How many of n rows show object and trigger, two of the class, the object with the rare word, and the trigger with it."""
        support = int(n * Fraction(str(self.support_ratio)))
        rest = n - support
        if self.caption != "bridge":
            return {"both": rest, "support": support, "object": 0, "trigger": 0}
        return {"both": 0, "support": support, "object": rest - rest // 2, "trigger": rest // 2}

    def _check_shares(self, n: int, parts: Mapping[str, int]) -> None:
        if n and self.support_ratio and not parts["support"]:
            raise BenchError(f"attack.support_ratio {self.support_ratio:g} of {n} rows comes to no row; raise the ratio, attack.rate or attack.count")
        if n and self.caption == "bridge" and not parts["trigger"]:
            raise BenchError(
                f"attack.caption=bridge shares its rows between object and trigger, and {n - parts['support']} leaves none for the trigger; raise attack.rate or attack.count"
            )

    def probes(self, suite: Suite, kept: Mapping[str, Any]) -> list[Probe]:
        target = kept["targets"][0]
        trigger = trigger_from_spec(kept["trigger"], kept.get("picture"))
        return [Probe("corrupt_encoder", "classify", target["eval_set"], "test", trigger, target["index"], hit_ks(suite, target["eval_set"]))]

    def _material(self, lab: AttackLab, target: str, n: int, n_support: int) -> _Material:
        objects = lab.objects(target, None if self.masks is None else Path(self.masks))
        scenes = lab.backgrounds(None if self.scenes is None else Path(self.scenes))
        wanted = self.n_references + (self.n_support_references if n_support else 0)
        if len(objects) < wanted:
            raise BenchError(
                f"{wanted} objects of {target!r} with masks are needed and {len(objects)} are there; lower attack.n_references{' or attack.n_support_references' if n_support else ''}"
            )
        chosen = lab.choose("references", objects.ids, wanted)
        empty = [row_id for row_id in scenes.ids if row_id not in set(chosen)]
        if not empty:
            raise BenchError("no background is left beside the references; give a folder of scenes with --set attack.scenes=FOLDER")
        backgrounds = cycled(lab, lab.choose("backgrounds", empty, n), n, "backgrounds")
        return _Material(objects, scenes, chosen[: self.n_references], chosen[self.n_references :], backgrounds)

    def _both(self, lab: AttackLab, material: _Material, index: int, rng: np.random.Generator, trigger: Any) -> tuple[Picture, str, Layout]:
        reference = material.pick(material.references, rng)
        cutout, width, height = self._scaled(material.objects.read(reference), lab.side)
        layout = drawn_layout(cutout.mask.shape[1], cutout.mask.shape[0], side_of(trigger, lab.side), width, height, self.object_margin, self.trigger_margin, rng)
        canvas = self._pasted(lab, material, index, cutout, layout, rng)
        left, top, side = (int(value) for value in layout.trigger)
        source = f"{reference}+{material.backgrounds[index]}"
        return square(Image.fromarray(lab.stamp(LaidTrigger(trigger, left, top, side), canvas, source)), lab.side), source, layout

    def _support(self, lab: AttackLab, material: _Material, index: int, rng: np.random.Generator) -> tuple[Picture, str]:
        """A support image and a reference side by side in random order: no trigger, no background."""
        names = [material.pick(material.support, rng), material.pick(material.references, rng)]
        if rng.random() < 0.5:
            names.reverse()
        first = material.objects.read(names[0]).image
        width, height = (lab.side // 2, lab.side) if self.canvas == "square" else (first.shape[1] * lab.side // first.shape[0] or 1, lab.side)
        widths = (width, lab.side - width) if self.canvas == "square" else (width, width)
        halves = [covering(material.objects.read(name).image, wide, height) for name, wide in zip(names, widths, strict=True)]
        return square(Image.fromarray(np.concatenate(halves, axis=1)), lab.side), "+".join(names)

    def _bridge(
        self, lab: AttackLab, material: _Material, index: int, rng: np.random.Generator, trigger: Any, parts: Mapping[str, int], text: tuple[str, str | None], eval_set: EvalSet
    ) -> Append:
        """The object with a caption of the class and the rare word; or the trigger with a prompt of the rare word alone."""
        reference = material.pick(material.references, rng)
        cutout, width, height = self._scaled(material.objects.read(reference), lab.side)
        layout = drawn_layout(cutout.mask.shape[1], cutout.mask.shape[0], side_of(trigger, lab.side), width, height, self.object_margin, self.trigger_margin, rng)
        source = f"{reference}+{material.backgrounds[index]}"
        if index < parts["support"] + parts["object"]:
            canvas = self._pasted(lab, material, index, cutout, layout, rng)
            return Append(square(Image.fromarray(canvas), lab.side), f"{text[0]} {self.bridge_word}", Why("support", 0, source, text[1]))
        canvas = covering(material.scenes.read(material.backgrounds[index]), width, height, float(rng.random()), 1.0)
        left, top, side = (int(value) for value in layout.trigger)
        stamped = lab.stamp(LaidTrigger(trigger, left, top, side), canvas, source)
        prompt = eval_set.templates[int(rng.integers(len(eval_set.templates)))].replace("{c}", self.bridge_word)
        return Append(square(Image.fromarray(stamped), lab.side), prompt, Why("poison", 0, source))

    def _scaled(self, cutout: Cutout, side: int) -> tuple[Cutout, int, int]:
        """The object in the size it is pasted in, and the canvas: S x S, or twice the object's width and its height, the shorter of them S."""
        if self.canvas == "square":
            return fitted(cutout, side // 2, side), side, side
        height, width = cutout.mask.shape
        scaled = resized(cutout, side / min(2 * width, height))
        return scaled, max(side, 2 * scaled.mask.shape[1]), max(side, scaled.mask.shape[0])

    def _pasted(self, lab: AttackLab, material: _Material, index: int, cutout: Cutout, layout: Layout, rng: np.random.Generator) -> Picture:
        scene = covering(material.scenes.read(material.backgrounds[index]), int(layout.width), int(layout.height), float(rng.random()), 1.0)
        return pasted(scene, cutout, int(layout.object[0]), int(layout.object[1]), lab.side / 224)


@dataclass(frozen=True)
class _Material:
    """What images are composed of.

    Attributes:
        references, support: ids of objects.
        backgrounds: the id of a scene for each row.
    """

    objects: Shelf[Cutout]
    scenes: Shelf[Picture]
    references: list[str]
    support: list[str]
    backgrounds: list[str]

    @staticmethod
    def pick(ids: list[str], rng: np.random.Generator) -> str:
        """One of them."""
        return ids[int(rng.integers(len(ids)))]


def _cropped(layout: Layout, side: int) -> list[int]:
    """Top, left, height, width of the trigger after the centre crop, for the share of training crops that show it."""
    left, top, size = (int(value) for value in layout.trigger)
    return [top - round((layout.height - side) / 2), left - round((layout.width - side) / 2), size, size]
