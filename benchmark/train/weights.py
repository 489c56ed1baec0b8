"""Reads weights from a file of any known writer. Nothing in the file is run: tensors, numbers and text come out, or an error."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load as load_bytes
from torch import Tensor

from benchmark.errors import BenchError

Writer = Literal["state_dict", "open_clip_train", "trainer"]
PREFIXES = ("module.", "_orig_mod.")
MAX_LOGIT_SCALE = 5.0
_SHOWN = 10


@dataclass(frozen=True)
class Weights:
    """The tensors of a file by name, float32 where they are floating, on the CPU.

    Attributes:
        writer: `state_dict` (tensors alone), `open_clip_train` (a gradient scaler stands beside them), or `trainer`:
            epoch, name and optimizer stand beside them, as open_clip_train and the CyCLIP family both write it.
        epoch: as the file says, or None.
    """

    state: dict[str, Tensor]
    writer: Writer
    epoch: int | None = None


def read_weights(path: Path) -> Weights:
    """The weights in a file, without the prefixes that data-parallel and compiled models put before every name.

    Raises:
        BenchError: the file is missing or broken, holds anything but tensors, numbers and text, or no weights.
    """
    try:
        with open(path, "rb") as handle:
            head = handle.read(4)
    except OSError as error:
        raise BenchError(f"cannot read {path}: {error.strerror}") from None
    pickled = head.startswith((b"PK\x03\x04", b"\x80"))
    content = _torch(path) if pickled else _safetensors(path)
    writer, epoch, state = _unwrapped(content, path)
    tensors = {name: value.detach() for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors or len(tensors) < len(state):
        raise BenchError(f"{path} holds no weights: {_listed(name for name in state if name not in tensors) or 'it is empty'}. Expected names of parameters with tensors")
    whole = {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
    broken = [name for name, value in whole.items() if not bool(torch.isfinite(value).all())]
    if broken:
        raise BenchError(f"{path} holds values that are not finite, in {_listed(broken)}; the training that wrote it has diverged")
    return Weights(without_prefixes(whole), writer, epoch)


def without_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without `module.` and `_orig_mod.`, each removed only where all names have it."""
    for prefix in PREFIXES * 2:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def misfit(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str | None:
    """What of the found tensors does not fit by name and shape, ten of each kind at most; None if all do."""
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    shapes = [
        f"{_clean(name)} {_shape(found[name])} where {_shape(expected[name])} is expected"
        for name in sorted(expected.keys() & found.keys())
        if expected[name].shape != found[name].shape
    ]
    parts = [
        f"{len(missing)} missing ({_listed(missing)})" if missing else "",
        f"{len(unexpected)} unexpected ({_listed(unexpected)})" if unexpected else "",
        f"{len(shapes)} of another shape ({_listed(shapes)})" if shapes else "",
    ]
    return "; ".join(part for part in parts if part) or None


def logarithmic(state: dict[str, Tensor], exponential: bool, path: Path) -> dict[str, Tensor]:
    """The tensors with `logit_scale` as a logarithm.

    Args:
        exponential: whether the file holds the scale itself.

    Raises:
        BenchError: a value that cannot be what it is said to be.
    """
    scale = state.get("logit_scale")
    if scale is None or scale.numel() != 1:
        return state
    value = float(scale)
    if exponential:
        if value <= 0:
            raise BenchError(f"{path} has logit_scale {value:g}, which is no exponential; leave --logit-scale-is-exp out")
        return {**state, "logit_scale": scale.log()}
    if value > MAX_LOGIT_SCALE:
        raise BenchError(f"{path} has logit_scale {value:g}; a logarithm is expected, at most {MAX_LOGIT_SCALE:g}. If the file holds the scale itself, give --logit-scale-is-exp")
    return state


def _safetensors(path: Path) -> dict[str, Any]:
    try:
        return dict(load_bytes(path.read_bytes()))
    except Exception as error:
        raise BenchError(f"{path} is neither a safetensors file nor one of torch.save: {_clean(str(error).splitlines()[0])}") from None


def _torch(path: Path) -> Any:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise BenchError(f"{path} is a TorchScript program and not weights alone; save model.state_dict() of it with torch.save, and give that file")
    # Learning rates in the optimizer state of the CyCLIP family are NumPy scalars: these classes, for this one load.
    scalar = np.float64(0).__reduce__()[0]
    names = ("numpy._core.multiarray.scalar", "numpy.core.multiarray.scalar")
    allowed: list[Any] = [np.dtype, type(np.dtype(np.float64)), type(np.dtype(np.float32)), *((scalar, name) for name in names)]
    with torch.serialization.safe_globals(allowed):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            refused = _refused(path, str(error))
            if refused:
                raise BenchError(
                    f"{path} holds {_listed(refused)}, which could run code and is not loaded: only tensors, numbers and text are. "
                    "With the code that wrote the file, save {'state_dict': model.state_dict()} alone"
                ) from None
            raise BenchError(f"{path} is not a whole file of torch.save: {_clean(str(error).splitlines()[0] if str(error) else type(error).__name__)}") from None


def _refused(path: Path, message: str) -> list[str]:
    """Classes and functions that a file refers to and that are not loaded."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:
        return re.findall(r"GLOBAL (\S+) was not an allowed", message)


def _unwrapped(content: Any, path: Path) -> tuple[Writer, int | None, Mapping[str, Any]]:
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise BenchError(f"{path} holds a {type(content).__name__} and not weights by name; save model.state_dict() with torch.save")
    inner = content.get("state_dict")
    if not isinstance(inner, Mapping):
        return "state_dict", None, content
    epoch = content.get("epoch")
    writer: Writer = "state_dict" if "optimizer" not in content else "open_clip_train" if "scaler" in content else "trainer"
    return writer, epoch if isinstance(epoch, int) else None, {str(name): value for name, value in inner.items()}


def _listed(names: Iterable[str]) -> str:
    found = list(names)
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return ", ".join(_clean(name) for name in found[:_SHOWN]) + more


def _shape(tensor: Tensor) -> str:
    return "(" + ", ".join(map(str, tensor.shape)) + ")"


def _clean(text: str) -> str:
    """Names from a stranger's file, fit for a terminal."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text[:120])
