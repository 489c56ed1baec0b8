"""Where a patch lies, and how pixels become numbers and bytes again: what all triggers share."""

from __future__ import annotations

import re
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from benchmark.contract import Trigger
from benchmark.errors import BenchError
from benchmark.seeding import generator

Pixels = NDArray[np.float32]
Box = tuple[int, int, int, int]

_NUMBER = r"(?:0?\.\d+|0|1)"
_PLACE = re.compile(rf"corner|corner:(?:tl|tr|bl|br)(?:,\d+)?|centre|random|inner:{_NUMBER},{_NUMBER}|at:\d+,\d+")


class Stamp(Trigger, Protocol):
    """A trigger that also says which pixels it may change."""

    def box(self, side: int, key: str, at_test: bool = False) -> Box:
        """Top, left, height, width of what changes."""
        ...


def check_place(place: str) -> str:
    """The place itself, if it is one.

    Raises:
        ValueError: anything else; the sentence lists what is.
    """
    if _PLACE.fullmatch(place):
        return place
    raise ValueError("a place is corner, corner:tl (tr, bl, br; a margin after a comma), centre, random, inner:LO,HI in shares of the side, or at:Y,X")


def scaled_place(place: str, factor: float) -> str:
    """The place on an image whose side is `factor` times as long; shares and names stay."""
    kind, colon, rest = place.partition(":")
    if kind not in ("at", "corner") or not colon:
        return place
    parts = [str(round(int(part) * factor)) if part.isdecimal() else part for part in rest.split(",")]
    return f"{kind}:{','.join(parts)}"


def patch_box(place: str, size: int, side: int, seed: int, key: str, at_test: bool) -> Box:
    """Top, left, height, width of a square patch.

    Raises:
        BenchError: the patch is larger than the image, or its place lies outside.
    """
    if size > side:
        raise BenchError(f"a trigger of {size} px does not fit an image of {side} px; lower attack.size")
    room = side - size
    kind, _, rest = place.partition(":")
    parts = rest.split(",")
    low, high = 0, room
    match kind:
        case "corner":
            which = parts[0] or "br"
            margin = int(parts[1]) if len(parts) > 1 else 0
            top = room - margin if which[0] == "b" else margin
            left = room - margin if which[1] == "r" else margin
        case "centre":
            top = left = room // 2
        case "random" | "inner":
            if kind == "inner":
                low, high = int(np.ceil(float(parts[0]) * side)), int(np.floor(float(parts[1]) * side)) - size
                if high < low:
                    raise BenchError(f"attack.place {place!r} leaves no room for a trigger of {size} px in an image of {side} px")
            top, left = (int(value) for value in generator("place", seed, at_test, key).integers(low, high + 1, 2))
        case _:
            top, left = (int(part) for part in parts)
    if not (0 <= top <= room and 0 <= left <= room):
        raise BenchError(f"attack.place {place!r} puts a trigger of {size} px outside an image of {side} px")
    return top, left, size, size


def to_float(image: NDArray[np.uint8]) -> Pixels:
    """Bytes as float32 in [0, 1]."""
    return image.astype(np.float32) / np.float32(255)


def to_bytes(values: Pixels) -> NDArray[np.uint8]:
    """Values clipped to [0, 1] and rounded to bytes."""
    return np.asarray(np.floor(np.clip(values, 0, 1) * np.float32(255) + np.float32(0.5)), dtype=np.uint8)


def mixed(under: Pixels, over: Pixels, alpha: float) -> NDArray[np.uint8]:
    """(1 - alpha) under + alpha over, as bytes."""
    return to_bytes(np.float32(1 - alpha) * under + np.float32(alpha) * over)
