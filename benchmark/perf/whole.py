"""Whole commands and whole cells: start-up, memory, and what a defense costs beside CLIP."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmark.matrix import open_cell
from benchmark.progress import silent
from benchmark.request import Request, plan

_SETS = ("train.epochs=6", "data.n_pairs=2048", "data.n_held_out=64", "evaluation.linear_probe=none", "evaluation.curve=false")


def cell_ratio(defense: str) -> float:
    """Seconds that a defense needs for all its trainings and scores, over those of CLIP on the same pairs."""
    from benchmark.cell import run_cell

    def seconds(name: str, folder: Path) -> float:
        request = Request(("none",), (name,), scale="smoke", sets=_SETS, results=folder / name, baseline=False, device="cpu")
        cell = open_cell(plan(request)[0], silent())
        began = time.perf_counter()
        run_cell(cell)
        return time.perf_counter() - began

    with tempfile.TemporaryDirectory() as folder:
        own = seconds("clip", Path(folder))
        return seconds(defense, Path(folder)) / own


def start_up(*arguments: str) -> float:
    """Seconds until a command has answered, over the 0.3 that it may take."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "benchmark", *arguments], check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return (time.perf_counter() - began) / 0.3


def memory() -> float:
    """Peak memory of a small run of one epoch, evaluation included, over 1.5 GB."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["run", "--defense", "clip", "--no-baseline", "--jobs", "1", "--device", "cpu", "--set", "train.epochs=1", "--results", folder]
        subprocess.run([sys.executable, "-m", "benchmark", *words], check=True, capture_output=True)
        (cost,) = Path(folder).glob("runs/*/cost.json")
        return float(json.loads(cost.read_text())["peak_memory_bytes"]) / 1.5e9
