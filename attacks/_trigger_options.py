"""The options of attacks that stamp images: which trigger, where, how strong, and on how many rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from attacks._filters import NashvilleTrigger, SineTrigger
from attacks._pictures import PictureTrigger, WatermarkTrigger, picture_hash, read_picture
from attacks._placing import Stamp, check_place, scaled_place
from attacks._triggers import ALIASES, DRAWN_PER_IMAGE, PatternTrigger
from attacks._warps import WarpTrigger
from benchmark.contract import Attack
from benchmark.data.attack_lab import AttackLab

TriggerName = Literal[
    "checker",
    "white",
    "black",
    "yellow",
    "noise",
    "dots",
    "stripes",
    "picture",
    "blended",
    "blended-picture",
    "blended-stripes",
    "triangles",
    "watermark",
    "sig",
    "wanet",
    "nashville",
    "patch:checker",
    "patch:white",
    "patch:black",
    "patch:yellow",
    "patch:noise",
    "patch:dots",
    "patch:stripes",
    "patch:image",
    "blend:noise",
    "blend:image",
    "blend:stripes",
    "blend:triangles",
    "blend:text",
    "warp",
]

_ALPHA = {"blend:noise": 0.2, "blend:image": 0.2, "blend:stripes": 0.03, "blend:triangles": 0.15, "blend:text": 0.5}
_PICTURES = ("patch:image", "blend:image")
_USERS: dict[str, tuple[str, ...]] = {
    "file": _PICTURES,
    "file_hash": _PICTURES,
    "form": ("sig",),
    "amplitude": ("sig",),
    "frequency": ("sig",),
    "grid": ("warp",),
    "strength": ("warp",),
    "words": ("blend:text",),
}
_SAME_FOR_ALL = ("patch:black", "patch:yellow", "patch:image", "blend:image", "blend:triangles", "sig", "warp", "nashville")


class TriggerOptions(Attack):
    """Base of the attacks with image triggers. Options that a trigger does not use are refused where None means unused.

    Source: the options of the attacks that share them.
    """

    rate: float | None = Field(0.001, ge=0, le=0.5, description="Poisoned rows / all rows.")
    count: int | None = Field(None, ge=1, description="Poisoned rows; replaces the rate.")
    target_set: str | None = Field(None, description="Evaluation set that the class belongs to; None is the first.")
    size: int = Field(8, ge=1, description="Side of a patch, or of a tile of triangles, in pixels.")
    cell: int = Field(2, ge=1, description="Side of a checker's cell, or width of a stripe, in pixels.")
    alpha: float | None = Field(None, ge=0, le=1, description="Weight of the pattern; None is the trigger's own: 1 for patches, 0.2 for blends, and see the page.")
    place: str = Field("corner", description="Where a patch lies: corner, corner:tl (tr, bl, br; margin after a comma), centre, random, inner:LO,HI or at:Y,X.")
    place_test: str | None = Field(None, description="Where it lies at test; None for the same.")
    pattern: Literal["fixed", "per_image"] = Field("fixed", description="per_image draws noise or stripes again for every image, and moves a watermark.")
    pattern_seed: int = Field(0, ge=0, description="Seed of the pattern; does not follow the run's seed.")
    overflow: Literal["clip", "wrap"] = Field("clip", description="Per-image noise outside [0, 1].")
    reference_side: int | None = Field(None, ge=16, description="Image side that size, cell, grid and places are meant for; they scale with the run's. None: pixels as given.")
    file: str | None = Field(None, description="PNG of a picture trigger; None is the drawn cat.")
    file_hash: str | None = Field(None, description="Hash of the file's pixels; filled in, and refused if another is found.")
    form: Literal["additive", "blended"] | None = Field(None, description="Of sig; blended also darkens. None is additive.")
    amplitude: float | None = Field(None, ge=0, le=255, description="Of sig, in grey levels; None is 20, and 60 if blended.")
    frequency: float | None = Field(None, gt=0, description="Of sig, periods across the image; None is 6.")
    grid: int | None = Field(None, ge=2, description="Of wanet, control points along a side; None is 4.")
    strength: float | None = Field(None, ge=0, description="Of wanet, twice the mean shift in pixels; None is 1.")
    words: str | None = Field(None, description="Of watermark, in ASCII; None is a word for it.")

    @field_validator("place", "place_test")
    @classmethod
    def _places(cls, place: str | None) -> str | None:
        return None if place is None else check_place(place)

    @field_validator("words")
    @classmethod
    def _printable(cls, words: str | None) -> str | None:
        if words is not None and not (words.strip() and words.isascii() and words.isprintable()):
            raise ValueError("the words of a watermark are printable ASCII")
        return words

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.rate is None and self.count is None:
            raise ValueError("one of rate and count is needed")
        kinds = [kind_of(name) for name in self.trigger_names()]
        for option, users in _USERS.items():
            if getattr(self, option) is not None and not set(users) & set(kinds):
                raise ValueError(f"{option} belongs to {' and '.join(dict.fromkeys(_short(user) for user in users))}, and the trigger is {' and '.join(map(_short, kinds))}")
        steady = [kind for kind in kinds if kind in _SAME_FOR_ALL]
        if self.pattern == "per_image" and len(steady) == len(kinds):
            raise ValueError(f"pattern per_image belongs to {', '.join(map(_short, DRAWN_PER_IMAGE))} and watermark; {_short(steady[0])} is the same for every image")
        if self.file is None:
            if self.file_hash is not None:
                raise ValueError("file_hash is filled in by the program; give the file")
            return self
        found = picture_hash(read_picture(Path(self.file)))
        if self.file_hash not in (None, found):
            raise ValueError(f"{self.file} has the hash {found} and not {self.file_hash}; it is another picture than before")
        self.file_hash = found
        return self

    def trigger_names(self) -> tuple[str, ...]:
        """The names that the attack's own options give."""
        raise NotImplementedError

    @staticmethod
    def short_names() -> tuple[str, ...]:
        """The short name of every image trigger."""
        return tuple(ALIASES)

    def make_trigger(self, name: str, side: int) -> Stamp:
        """The trigger of this name with these options, for images of this side."""
        kind = kind_of(name)
        factor = 1.0 if self.reference_side is None else side / self.reference_side
        alpha = self.alpha if self.alpha is not None else _ALPHA.get(kind, 1.0)
        seed, size, cell = self.pattern_seed, _scaled(self.size, factor, 3), _scaled(self.cell, factor, 1)
        place, place_test = scaled_place(self.place, factor), scaled_place(self.place_test or "", factor)
        match kind:
            case "patch:image" | "blend:image":
                where: dict[str, Any] = {"size": size, "place": place, "place_test": place_test} if kind == "patch:image" else {"size": 0, "place": "full"}
                pixels = None if self.file is None else read_picture(Path(self.file))
                return PictureTrigger(kind, self.file_hash or "drawn", alpha=alpha, pattern_seed=seed, pixels=pixels, **where)
            case "blend:text":
                return WatermarkTrigger(words=self.words or "Watermarked", alpha=alpha, pattern=self.pattern, pattern_seed=seed)
            case "sig":
                form = self.form or "additive"
                weight = alpha if self.alpha is not None or form == "additive" else 0.2
                return SineTrigger(
                    form=form, amplitude=self.amplitude if self.amplitude is not None else 20.0 if form == "additive" else 60.0, frequency=self.frequency or 6.0, alpha=weight
                )
            case "warp":
                return WarpTrigger(
                    grid=_scaled(self.grid or 4, factor if self.grid else 1, 2), strength=1.0 if self.strength is None else self.strength, pattern_seed=seed, alpha=alpha
                )
            case "nashville":
                return NashvilleTrigger(alpha=alpha)
            case _ if kind.startswith("blend:"):
                width = {"blend:stripes": cell, "blend:triangles": size}.get(kind, 1)
                return PatternTrigger(kind, 0, alpha, width, self.pattern, seed, "full", "", self.overflow)
            case _:
                return PatternTrigger(kind, size, alpha, cell, self.pattern, seed, place, place_test, self.overflow)


def kind_of(name: str) -> str:
    """The long name of a trigger."""
    return ALIASES.get(name, name)


def keep_trigger(lab: AttackLab, trigger: Stamp, name: str = "trigger") -> None:
    """Hands a trigger to the sealed record, and stops before anything is stamped if it does not fit the images."""
    for at_test in (False, True):
        trigger.box(lab.side, "", at_test)
    lab.keep(name, trigger.spec())
    if isinstance(trigger, PictureTrigger) and trigger.pixels is not None:
        lab.keep("picture", trigger.pixels)


def _short(kind: str) -> str:
    return next(name for name, long in ALIASES.items() if long == kind)


def _scaled(pixels: int, factor: float, least: int) -> int:
    return pixels if factor == 1 else max(least, round(pixels * factor))
