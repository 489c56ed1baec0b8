"""What compiled towers and recomputed activations change."""

from __future__ import annotations

import subprocess
import sys

from benchmark.perf.step import clip, loop_seconds, pairs, small

_ONE = """
import resource, sys, torch
from benchmark.perf.step import clip, loop_seconds, pairs
from benchmark.settings import TrainSettings
torch.set_num_threads(1)
images, captions = pairs(64, 224)
seconds = loop_seconds(images, captions, clip(), False, TrainSettings(epochs=1, batch_size=64, towers=sys.argv[1]), "RN50", 224)
print(min(seconds), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def compiled_ratio() -> float:
    """The rate of the second epoch of a compiled image tower over the same of a plain one; compiling falls into the first."""
    plain = loop_seconds(*pairs(), clip(), False, small())[1]
    return plain / loop_seconds(*pairs(), clip(), False, small().model_copy(update={"towers": "compiled"}))[1]


def recomputed_ratio(of: str) -> float:
    """`seconds` or peak `memory` of one step of RN50 at 224 px on 64 pairs, blocks recomputed over blocks kept."""
    column = ("seconds", "memory").index(of)
    return _one("recomputed")[column] / _one("plain")[column]


def _one(towers: str) -> tuple[float, float]:
    done = subprocess.run([sys.executable, "-c", _ONE, towers], check=True, capture_output=True, text=True)
    seconds, memory = map(float, done.stdout.split())
    return seconds, memory
