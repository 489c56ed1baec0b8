"""What stands beside the weights of a checkpoint of ours: preprocessing, origin and a self-test; how it is written and read."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from benchmark.errors import BenchError
from benchmark.settings import canonical
from benchmark.stages import file_sha256, write_atomically
from benchmark.train.model import Colour, Model, save_weights

SCHEMA = 1
WEIGHTS, ABOUT = "weights.safetensors", "checkpoint.json"
ROLES = ("clean", "poisoned", "defended", "unknown")
TOLERANCE = 1e-3
MAX_JSON = 16 << 20


@dataclass(frozen=True)
class Preprocessing:
    """How images are prepared for a model, and who says so: recorded, given, config, pretrained or assumed."""

    side: int
    mean: Colour
    std: Colour
    interpolation: str = "bicubic"
    source: str = "assumed"

    def __post_init__(self) -> None:
        if min(self.std) <= 0:
            raise BenchError(f"a standard deviation must be above 0, got {said(self.std)}")

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "side": self.side,
            "mean": list(self.mean),
            "std": list(self.std),
            "interpolation": self.interpolation,
            "geometry": "shorter side, centre crop",
            "source": self.source,
        }


def export_checkpoint(model: Model, folder: Path, about: Mapping[str, Any]) -> Path:
    """Writes `weights.safetensors` and `checkpoint.json` into a new folder, whole or not at all.

    Args:
        about: `role` (one of ROLES), `manifest_sha256` of the pairs it was trained on, and whatever else should be said.

    Raises:
        BenchError: an unknown role, or a folder that exists.
    """
    role = about.get("role", "unknown")
    if role not in ROLES:
        raise BenchError(f"expected a role among {', '.join(ROLES)}, got {role!r}")
    if folder.exists():
        raise BenchError(f"{folder} exists; name another folder for the checkpoint")
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
    except OSError as error:
        raise BenchError(f"cannot write to {folder.parent}: {error.strerror}") from None
    save_weights(model, part / WEIGHTS)
    images, texts = self_test(model)
    card = {
        "schema": SCHEMA,
        "role": role,
        "model": model.name,
        "model_cfg": model.config,
        "manifest_sha256": about.get("manifest_sha256"),
        "preprocessing": Preprocessing(model.side, model.mean, model.std, source="recorded").as_json(),
        "tokenizer": {"name": model.tokenizer.name, "context_length": model.tokenizer.context_length},
        "weights_sha256": file_sha256(part / WEIGHTS),
        "versions": {name: metadata.version(name) for name in ("clip-poison-bench", "torch", "open_clip_torch")},
        "about": {name: value for name, value in about.items() if name not in ("role", "manifest_sha256")},
        "self_test": {"images": _rounded(images), "texts": _rounded(texts)},
    }
    write_atomically(part / ABOUT, (canonical(card) + "\n").encode())
    os.replace(part, folder)
    return folder


def self_test(model: Model) -> tuple[Tensor, Tensor]:
    """Features of eight fixed images and eight fixed captions, in full precision."""
    full = replace(model, precision="fp32")
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False):
        return full.encode_images(patterns(model.side)), full.encode_texts(CAPTIONS)


class _Prepared(BaseModel):
    side: int = Field(ge=16, le=1024)
    mean: Colour
    std: Colour
    interpolation: str = "bicubic"


class _SelfTest(BaseModel):
    images: list[list[float]]
    texts: list[list[float]]


class Card(BaseModel):
    """`checkpoint.json`."""

    model_config = ConfigDict(extra="allow", populate_by_name=True, protected_namespaces=())

    schema_: int = Field(alias="schema")
    role: str
    model: str
    model_cfg: dict[str, Any]
    preprocessing: _Prepared
    weights_sha256: str
    self_test: _SelfTest
    manifest_sha256: str | None = None
    about: dict[str, Any] = Field(default_factory=dict)


def read_card(path: Path) -> Card:
    """`checkpoint.json` beside this file of weights, which must have the bytes that it says.

    Raises:
        BenchError: a card of another form or of a newer schema, or other weights.
    """
    file = path.with_name(ABOUT)
    try:
        card = Card(**read_json(file))
    except ValidationError as error:
        problem = error.errors()[0]
        raise BenchError(f"{file}: {'.'.join(map(str, problem['loc']))}: {problem['msg'].lower()}") from None
    if card.schema_ > SCHEMA:
        raise BenchError(f"{file} has schema {card.schema_}, this version reads up to {SCHEMA}; install a newer one")
    if file_sha256(path) != card.weights_sha256:
        raise BenchError(f"{path} has other bytes than {ABOUT} beside it says; take both files from one place")
    return card


def check_self_test(path: Path, model: Model, card: Card) -> None:
    """Stops if the features of the fixed images and captions are not those that were written down.

    Raises:
        BenchError: they differ by more than TOLERANCE.
    """
    for what, now, then in zip(("images", "texts"), self_test(model), (card.self_test.images, card.self_test.texts), strict=True):
        written = torch.tensor(then)
        worst = float((now - written).norm(dim=1).max()) if now.shape == written.shape else math.inf
        if not worst <= TOLERANCE:
            raise BenchError(
                f"{path} fails its self-test: features of fixed {what} differ by {worst:.2g} from those in {ABOUT}, {TOLERANCE:g} is allowed. "
                "The weights, the configuration or the preprocessing are not those it was written with"
            )


def said(value: Any) -> str:
    """The value as options and messages write it."""
    return ",".join(f"{part:g}" for part in value) if isinstance(value, tuple) else str(value)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file of somebody else's, of a bounded size."""
    try:
        if file.stat().st_size > MAX_JSON:
            raise BenchError(f"{file} has more than {MAX_JSON >> 20} MB, too much for a description")
        content = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except OSError as error:
        raise BenchError(f"cannot read {file}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise BenchError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise BenchError(f"{file} holds no JSON object")
    return content


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def _rounded(features: Tensor) -> list[list[float]]:
    return [[round(float(value), 6) for value in row] for row in features]


def patterns(side: int) -> NDArray[np.uint8]:
    """Eight images uint8 (8, side, side, 3) of whole-number patterns, alike at every side."""
    image, y, x, channel = np.indices((8, side, side, 3))
    y, x = y * 32 // side, x * 32 // side
    return np.asarray((y * (image + 1) * 3 + x * (image + 2) * 5 + y * x * (image % 3) + 60 * channel * (image + 1) + 31 * image) % 256, dtype=np.uint8)


CAPTIONS = (
    "",
    "a",
    "a photo of a dog.",
    "a red boat on a striped background",
    "two cats, one black and one white, asleep on a sofa",
    "THE SKYLINE OF A CITY AT NIGHT",
    "3 green apples & 7 lemons (1998)",
    "a long caption " * 40,
)
