"""How images are composed: scenes, objects pasted through their masks, halves side by side, and a trigger where a layout puts it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from attacks._captions import corpus_rows, from_templates
from attacks._placing import Stamp
from benchmark.data.attack_lab import AttackLab
from benchmark.data.eval_sets import EvalSet
from benchmark.data.objects import Cutout
from benchmark.data.pairs import Pairs
from benchmark.errors import BenchError

NO_PER_IMAGE = "pattern per_image draws a patch around the mean colour of its image, and a composition stamps it before there is one; take pattern=fixed"
Picture = NDArray[np.uint8]
Caption = Literal["class", "prompt", "random"]


@dataclass(frozen=True)
class LaidTrigger:
    """A trigger at the place that a layout drew. It is named as the trigger that the test stamps: places are drawn, and no part of a name.

    Attributes:
        trigger: the trigger at test.
        left, top, side: the square of the canvas that is stamped.
    """

    trigger: Stamp
    left: int
    top: int
    side: int

    def image(self, image: Picture, key: str, at_test: bool = False) -> Picture:
        """The stamped copy of a uint8 canvas (h, w, 3)."""
        out = image.copy()
        box = slice(self.top, self.top + self.side), slice(self.left, self.left + self.side)
        out[box] = _at_origin(self.trigger).image(np.ascontiguousarray(image[box]), key)
        return out

    def text(self, text: str, key: str) -> str:
        """The text itself."""
        return text

    def spec(self) -> dict[str, Any]:
        """The specification of the trigger at test."""
        return self.trigger.spec()


def _at_origin(trigger: Stamp) -> Stamp:
    """A patch whose square is the whole image; a trigger of the whole image as it is."""
    if getattr(trigger, "kind", "").startswith("patch:") and dataclasses.is_dataclass(trigger):
        return dataclasses.replace(trigger, place="at:0,0", place_test="")  # type: ignore[arg-type, return-value]
    return trigger


def covering(picture: Picture, width: int, height: int, across: float = 0.5, down: float = 0.5) -> Picture:
    """A window uint8 (height, width, 3) of a picture that is scaled until it just covers it.

    Args:
        across, down: where the window lies in what is left over, from 0 (left, top) to 1.
    """
    scale = max(width / picture.shape[1], height / picture.shape[0])
    size = max(width, round(picture.shape[1] * scale)), max(height, round(picture.shape[0] * scale))
    scaled = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS), dtype=np.uint8)
    left, top = (min(int(share * (room + 1)), room) for share, room in ((across, size[0] - width), (down, size[1] - height)))
    return scaled[top : top + height, left : left + width].copy()


def fitted(cutout: Cutout, width: int, height: int) -> Cutout:
    """The object as large as it fits into width x height, its aspect kept."""
    return resized(cutout, min(width / cutout.mask.shape[1], height / cutout.mask.shape[0]))


def resized(cutout: Cutout, scale: float) -> Cutout:
    """The object in another size, at least a pixel wide and high."""
    size = max(1, round(cutout.mask.shape[1] * scale)), max(1, round(cutout.mask.shape[0] * scale))
    image, mask = (np.asarray(Image.fromarray(plane).resize(size, Image.Resampling.LANCZOS), dtype=np.uint8) for plane in (cutout.image, cutout.mask))
    return Cutout(image, mask)


def pasted(canvas: Picture, cutout: Cutout, left: int, top: int, softness: float) -> Picture:
    """The canvas with an object laid over it through its mask, blurred by `softness` pixels."""
    height, width = cutout.mask.shape
    mask = np.zeros(canvas.shape[:2], dtype=np.uint8)
    mask[top : top + height, left : left + width] = cutout.mask
    soft = np.asarray(Image.fromarray(mask).filter(ImageFilter.GaussianBlur(softness)), dtype=np.float32)[..., None] / np.float32(255)
    # Beyond the object's box, where the blur reaches, its nearest pixels are continued.
    rows, columns = np.clip(np.arange(canvas.shape[0]) - top, 0, height - 1), np.clip(np.arange(canvas.shape[1]) - left, 0, width - 1)
    over = cutout.image[rows][:, columns].astype(np.float32)
    return np.asarray(np.floor(canvas + soft * (over - canvas) + np.float32(0.5)), dtype=np.uint8)


def captions_for(lab: AttackLab, pairs: Pairs, eval_set: EvalSet, target: str, n: int, kind: Caption, reuse: bool) -> list[tuple[str, str | None]]:
    """Captions of n rows, each with the id of the row it was taken from: of the target class, its prompts, or any that does not mention it.

    Raises:
        BenchError: too few captions mention the class and none may be used twice.
    """
    if kind == "prompt":
        return [(from_templates(eval_set, target, lab.rng("caption", index)), None) for index in range(n)]
    if kind == "class":
        rows = corpus_rows(lab, pairs, eval_set, target, (), n, "word", reuse)
        return [(pairs.captions[row], pairs.ids[row]) for row in rows]
    shown = lab.mentions(eval_set.terms(target), "word_plural", pairs)
    by_id = {row_id: row for row, row_id in enumerate(pairs.ids) if not shown[row]}
    chosen = lab.choose("captions", by_id, n)
    if not chosen:
        raise BenchError(f"every caption mentions {target!r}, and attack.caption=random wants others")
    return [(pairs.captions[by_id[row_id]], row_id) for row_id in _cycled(chosen, n)]


def cycled(lab: AttackLab, ids: list[str], n: int, what: str) -> list[str]:
    """The first n ids, over and over where they are fewer, which the run record then says."""
    if n > len(ids):
        lab.warnings.append(f"{n} composed images share {len(ids)} {what}")
    return _cycled(ids, n)


def _cycled(ids: list[str], n: int) -> list[str]:
    return [ids[index % len(ids)] for index in range(n)]


def side_of(trigger: Stamp, side: int) -> int:
    """How many pixels a trigger is wide on images of this side."""
    return trigger.box(side, "", True)[3]
