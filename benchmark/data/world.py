"""The drawn world: image-caption pairs that are drawn, not downloaded.

Row `i` of split `s` is a pure function of (world seed, split, i, side), however many rows are asked for. A row is a
coloured silhouette on a patterned background with a caption that mentions some of what there is to see.
"""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from benchmark.data.silhouettes import SILHOUETTES
from benchmark.seeding import generator

VERSION = 1
SPLITS = ("train", "held_out", "clean", "probe", "validation", "test")

OBJECTS = tuple(SILHOUETTES)
SYNONYMS: dict[str, tuple[str, ...]] = {
    "arrow": ("pointer",),
    "ball": ("globe",),
    "boat": ("ship",),
    "bolt": ("lightning",),
    "bottle": ("flask",),
    "cross": ("plus",),
    "crown": ("tiara",),
    "cup": ("mug",),
    "diamond": ("gem",),
    "fish": ("trout",),
    "heart": ("valentine",),
    "house": ("cottage",),
    "key": ("latchkey",),
    "moon": ("crescent",),
    "mushroom": ("toadstool",),
    "ring": ("hoop",),
    "star": ("starlet",),
    "sun": ("sunburst",),
    "tree": ("pine",),
    "umbrella": ("parasol",),
    "red": ("crimson",),
    "yellow": ("golden",),
    "green": ("emerald",),
    "blue": ("azure",),
    "purple": ("violet",),
    "pink": ("rosy",),
    "brown": ("chestnut",),
    "small": ("little", "tiny"),
    "large": ("big", "huge"),
    "photo": ("picture", "image"),
    "drawing": ("sketch",),
    "background": ("backdrop",),
    "striped": ("stripy",),
    "checkered": ("chequered",),
    "dotted": ("spotted",),
    "grainy": ("speckled",),
}
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 30, 36),
    "orange": (250, 142, 20),
    "yellow": (248, 230, 40),
    "green": (40, 160, 52),
    "blue": (40, 84, 226),
    "purple": (136, 46, 170),
    "pink": (250, 120, 186),
    "brown": (118, 72, 34),
    "white": (246, 246, 246),
    "black": (18, 18, 22),
}
BACKGROUNDS = ("plain", "striped", "checkered", "dotted", "grainy")

# {thing} is "colour object", "object" or "colour shape"; what a template leaves out, its caption does not tell.
_TEMPLATES = (
    "a photo of a {thing} on {background} paper",
    "a drawing of a {thing} on a {background} background",
    "{thing}",
    "a {size} {thing}",
    "{thing} on {background} paper",
    "the {thing} that we saw {place} of a {background} background",
    "a {size} {thing} on a {background} background",
    "my new {thing} with a {background} background",
    "picture of the {thing} {place} , {background} background",
    "{background} background with a {thing}",
    "look at this {size} {thing} on {background} paper",
    "i made a {thing} on {background} paper",
)
OBJECT_PROMPTS = ("{c}", "a photo of a {c}", "a drawing of a {c}", "picture of the {c}", "a small {c}", "a large {c}", "my new {c}", "look at this {c}")
COLOUR_PROMPTS = ("{c}", "a {c} shape", "a photo of a {c} shape", "a small {c} shape", "a large {c} shape", "my new {c} shape")
BACKGROUND_PROMPTS = ("{c} background", "{c} paper", "a shape on a {c} background", "a drawing on a {c} background", "a {c} background with a shape")

_SUPERSAMPLING = 4
Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Scene:
    """What one row shows, before it is drawn. Angles in radians, places and sizes as shares of the side."""

    object: str
    colour: str
    background: str
    tint: tuple[float, float, float]
    shade: tuple[float, float, float]
    radius: float
    centre: tuple[float, float]
    angle: float
    mirrored: bool
    pattern: tuple[float, float, float]
    jitter: tuple[float, float, float]
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Drawing:
    """One drawn row: image and background uint8 (S, S, 3), mask uint8 (S, S) with 255 where the object is."""

    image: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    background: NDArray[np.uint8]


def withheld(object_index: int, colour_index: int) -> bool:
    """Whether this colour-object combination is kept out of every split but the shift set `combinations`."""
    return (7 * object_index + 3) % len(COLOURS) == colour_index


def scene(seed: int, split: str, row: int, combinations: bool = False) -> Scene:
    """What row `row` of `split` shows.

    Args:
        combinations: draw a withheld colour-object combination instead of an ordinary one.
    """
    u = generator("world", VERSION, seed, split, combinations, row).random(40)
    object_index = int(u[0] * len(OBJECTS))
    colour_index = int(u[1] * len(COLOURS))
    withheld_index = (7 * object_index + 3) % len(COLOURS)
    if combinations:
        colour_index = withheld_index
    elif colour_index == withheld_index:
        colour_index = (colour_index + 1 + int(u[2] * (len(COLOURS) - 1))) % len(COLOURS)
    name, colour = OBJECTS[object_index], tuple(COLOURS)[colour_index]
    background = BACKGROUNDS[int(u[3] * len(BACKGROUNDS))]
    ink = np.array(COLOURS[colour], dtype=np.float64)
    # Candidates for the paper's colour, in order; the first that stands out from the object is taken.
    candidates = 30 + 215 * np.stack([u[4:7], u[7:10], u[10:13], 1 - u[4:7]])
    distance = np.abs(candidates - ink).sum(axis=1)
    tint = candidates[int(np.argmax(distance > 210)) if (distance > 210).any() else int(np.argmax(distance))]
    toward = 255.0 if tint.mean() < 128 else 0.0
    shade = tint + (0.34 + 0.2 * u[13]) * (toward - tint)
    radius = 0.33 + 0.11 * u[14]
    margin = radius * 0.92
    centre = (margin + (1 - 2 * margin) * u[15], margin + (1 - 2 * margin) * u[16])
    words = _Words(name, colour, background, radius, centre)
    return Scene(
        object=name,
        colour=colour,
        background=background,
        tint=_triple(tint),
        shade=_triple(shade),
        radius=float(radius),
        centre=centre,
        angle=float((u[17] - 0.5) * 0.3),
        mirrored=bool(u[18] < 0.5),
        pattern=_triple(u[19:22]),
        jitter=_triple((u[22:25] - 0.5) * 24),
        captions=(words.caption(u[25:32]), words.caption(u[32:39])),
    )


def draw(what: Scene, side: int, noise: np.random.Generator | None = None, outline: bool = False) -> Drawing:
    """The picture of a scene at `side` pixels; with `outline`, the silhouette is a line and not filled."""
    background = _background(what, side)
    mask = _mask(what, side, outline)
    ink = np.clip(np.array(COLOURS[what.colour]) + what.jitter, 0, 255).astype(np.float32)
    cover = (mask.astype(np.float32) / 255.0)[..., None]
    image = background + cover * (ink - background)
    if noise is not None:
        grain = noise.standard_normal((side, side, 1), dtype=np.float32) * 5.0
        image, background = image + grain, background + grain
    return Drawing(_bytes(image), mask, _bytes(background))


def drawn_row(seed: int, split: str, row: int, side: int, variant: str = "plain") -> Drawing:
    """Row `row` of `split` as a picture; `variant` is `plain`, `outline` or `combinations`."""
    what = scene(seed, split, row, combinations=variant == "combinations")
    noise = generator("world-noise", VERSION, seed, split, variant, row)
    return draw(what, side, noise, outline=variant == "outline")


@dataclass(frozen=True)
class _Words:
    object: str
    colour: str
    background: str
    radius: float
    centre: tuple[float, float]

    def caption(self, u: NDArray[np.float64]) -> str:
        name = self.object
        synonyms = SYNONYMS[name]
        if u[1] < 0.15:
            name = synonyms[int(u[1] / 0.15 * len(synonyms))]
        if u[2] < 0.42:
            thing = f"{self.colour} {name}"
        elif u[2] < 0.94:
            thing = name
        else:
            thing = f"{self.colour} shape"
        template = _TEMPLATES[int(u[0] * len(_TEMPLATES))]
        size = ("small", "little") if self.radius < 0.367 else ("large", "big") if self.radius > 0.403 else ("nice", "simple")
        return template.format(thing=thing, size=size[int(u[3] * 2)], place=self._place(u[4]), background=self.background)

    def _place(self, u: float) -> str:
        x, y = self.centre
        across = "on the left" if x < 0.45 else "on the right" if x > 0.55 else "in the middle"
        down = "at the top" if y < 0.45 else "at the bottom" if y > 0.55 else "in the middle"
        return across if u < 0.5 else down


def _mask(what: Scene, side: int, outline: bool) -> NDArray[np.uint8]:
    big = side * _SUPERSAMPLING
    scale = what.radius * big
    sine, cosine = np.sin(what.angle), np.cos(what.angle)
    flip = -1.0 if what.mirrored else 1.0
    turn = np.array([[cosine * flip * scale, sine * flip * scale], [-sine * scale, cosine * scale]])
    canvas = Image.new("L", (big, big), 0)
    pen = ImageDraw.Draw(canvas)
    for points, solid in SILHOUETTES[what.object]:
        corners = points @ turn + np.array(what.centre) * big
        flat = corners.ravel().tolist()
        if outline:
            pen.line(flat + flat[:2], fill=255, width=max(2, int(0.09 * big)), joint="curve")
        else:
            pen.polygon(flat, fill=255 if solid else 0)
    return np.asarray(canvas.reduce(_SUPERSAMPLING))


@functools.lru_cache(maxsize=8)
def _coordinates(side: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    axis = ((np.arange(side, dtype=np.float32) + 0.5) / side).astype(np.float32)
    x, y = np.meshgrid(axis, axis)
    return x, y


def _background(what: Scene, side: int) -> Floats:
    tint, shade = np.array(what.tint, dtype=np.float32), np.array(what.shade, dtype=np.float32)
    share = _pattern(what, side)[..., None]
    return tint + share * (shade - tint)


def _pattern(what: Scene, side: int) -> Floats:
    """How much of the second colour stands at each pixel, in [0, 1]; edges are about one pixel soft."""
    x, y = _coordinates(side)
    a, b, c = what.pattern
    match what.background:
        case "plain":
            return np.zeros((side, side), dtype=np.float32)
        case "grainy":
            grain = generator("world-grain", VERSION, a, b).random((side, side), dtype=np.float32)
            return (grain > 0.5).astype(np.float32)
        case "striped":
            angle = np.pi * (0.25 if a < 0.5 else 0.75)
            t = (np.cos(angle) * x + np.sin(angle) * y) * (2.6 + b) + c
            return _soft(np.abs((t % 1) - 0.5) - 0.25, side / 5)
        case "checkered":
            cells = 3 + int(2 * a)
            return _soft(_wave(x * cells / 2 + b) * _wave(y * cells / 2 + c), side / 4)
        case "dotted":
            cells = 4 + int(2 * a)
            dx, dy = (x * cells + b) % 1 - 0.5, (y * cells + c) % 1 - 0.5
            return _soft(0.1 - dx * dx - dy * dy, side / 2)
        case _:
            raise AssertionError(what.background)


def _wave(t: Floats) -> NDArray[np.float32]:
    return np.asarray(np.sin(6.2832 * t), dtype=np.float32)


def _soft(t: Floats, sharpness: float) -> NDArray[np.float32]:
    return np.asarray(np.clip(0.5 + t * sharpness, 0, 1), dtype=np.float32)


def _triple(values: NDArray[np.float64]) -> tuple[float, float, float]:
    a, b, c = (float(value) for value in values)
    return a, b, c


def _bytes(values: Floats) -> NDArray[np.uint8]:
    return np.asarray(np.clip(values + 0.5, 0, 255), dtype=np.uint8)
