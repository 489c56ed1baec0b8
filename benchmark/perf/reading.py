"""Pairs on their way in: drawing, reading and decoding."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from benchmark.data import world
from benchmark.data.decoding import decode_all
from benchmark.progress import silent


def drawing() -> float:
    """Images drawn in a second, over 2,000."""
    began = time.perf_counter()
    for row in range(1000):
        world.drawn_row(0, "train", row, 32)
    return 1000 / (time.perf_counter() - began) / 2000


def reading(what: Literal["seconds", "memory"]) -> float:
    """Each reader in a process of its own, which says how long it took and how much memory it held at most."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_pairs(Path(folder), 3_000_000)
        seconds, memory = measured(f"from benchmark.data.manifest import read_manifest\nread_manifest(__import__('pathlib').Path({str(path)!r}))")
        if what == "memory":
            return memory / 2e9
        options = "sep='\\t', dtype=str, keep_default_na=False, na_filter=False, engine='c'"
        return measured(f"import pandas\npandas.read_csv({str(path)!r}, {options})")[0] / seconds


def write_pairs(folder: Path, n: int) -> Path:
    """Writes a TSV of `n` pairs with captions of ten words and a thousand images, which are empty files."""
    words = sorted(world.SYNONYMS)
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    for image in range(1000):
        (folder / "images" / f"{image:09d}.jpg").touch()
    with open(folder / "pairs.tsv", "w") as out:
        out.write("image\tcaption\n")
        for begin in range(0, n, 100_000):
            drawn = rng.integers(len(words), size=(min(100_000, n - begin), 10)).tolist()
            out.writelines(f"images/{(begin + row) % 1000:09d}.jpg\t{begin + row} {' '.join(words[word] for word in caption)}\n" for row, caption in enumerate(drawn))
    return folder / "pairs.tsv"


def measured(code: str) -> tuple[float, int]:
    """Seconds that Python code takes, imports of its first line apart, and the peak of memory in bytes."""
    load, work = code.split("\n", 1)
    script = f"import resource, time\n{load}\nbegan = time.perf_counter()\n{work}\nprint(time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    seconds, memory = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()
    return float(seconds), int(memory)


def decoding(n: int = 1000, side: int = 64) -> float:
    """Images decoded in a second, over those of a plain loop."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{row}.jpg" for row in range(n)]
        for file in files:
            Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)).resize((340, 256), Image.Resampling.BICUBIC).save(file, quality=95)
        began = time.perf_counter()
        for file in files:
            with Image.open(file) as image:
                np.asarray(image.convert("RGB").resize((85, side), Image.Resampling.BICUBIC).crop((10, 0, 10 + side, side)))
        plain = time.perf_counter() - began
        began = time.perf_counter()
        decode_all(Path(folder), list(map(str, files)), side, lambda done: None, silent())
        return plain / (time.perf_counter() - began)
