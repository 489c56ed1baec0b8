"""Random streams named by what they decide, so that one draw never moves another."""

import hashlib

import numpy as np
import torch


def stream_key(*parts: object) -> int:
    """A 128-bit integer that names the stream of these parts; equal on every machine and Python.

    Parts are joined by their text, so use plain values: strings, integers, tuples of them.
    """
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")


def generator(*parts: object) -> np.random.Generator:
    """A NumPy generator of its own for the stream that these parts name."""
    return np.random.Generator(np.random.Philox(key=stream_key(*parts)))


def torch_generator(*parts: object, device: str = "cpu") -> torch.Generator:
    """A torch generator of its own for the stream that these parts name."""
    return torch.Generator(device=device).manual_seed(stream_key(*parts) % 2**63)
