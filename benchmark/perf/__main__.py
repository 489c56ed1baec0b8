"""Prints one line a ratio, the median of its repeats with their spread, under a line that describes the machine."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial

import torch

from benchmark.perf import evaluation, reading, step, towers, trainer, whole
from benchmark.record import environment

Line = tuple[str, Callable[[], float]]


def lines() -> list[Line]:
    """What is measured: what is divided by what, and how."""
    return [
        ("loop / bare step, clip, small (pairs per second; goal 0.95)", partial(step.loop_ratio, augmented=False)),
        ("loop / bare step, clip+aug, small (pairs per second)", partial(step.loop_ratio, augmented=True)),
        ("clip+aug / clip, small (pairs per second)", step.augmentation_ratio),
        ("matched RoCLIP epoch / CLIP epoch (seconds)", step.matched_ratio),
        ("a CLIP step without the backward pass of the text tower / with it (seconds; a matched epoch may take 0.03 more)", step.text_backward_ratio),
        ("bare step with train.precision=bf16 / fp32, small (pairs per second)", step.precision_ratio),
        ("loop with freed memory kept / given back (pairs per second)", step.allocator_ratio),
        ("training from JPEG files kept as bytes / from decoded pixels (pairs per second)", step.codec_ratio),
        ("loop / open_clip_train, its best of 0, 1, 2 and 4 workers, one thread each, 32 px (pairs per second)", partial(trainer.ratio, trainer.SMALL_IMAGES)),
        (
            "two trainings on two cores / open_clip_train on two cores, its best of 1, 2 threads and 0, 1, 2, 4 workers, 32 px (pairs per second; goal 2)",
            partial(trainer.machine_ratio, trainer.SMALL_IMAGES),
        ),
        ("loop / open_clip_train, its best of 0, 1, 2 and 4 workers, RN50 at 224 px (pairs per second; goal 1)", partial(trainer.ratio, trainer.RN50)),
        ("train.towers=compiled / plain, small (pairs per second of the second epoch)", towers.compiled_ratio),
        ("train.towers=recomputed / plain, one step of RN50 at 224 px on 64 pairs (peak memory)", partial(towers.recomputed_ratio, "memory")),
        ("train.towers=recomputed / plain, the same (seconds)", partial(towers.recomputed_ratio, "seconds")),
        ("SafeCLIP / CLIP, a cell without its evaluation (seconds)", partial(whole.cell_ratio, "safeclip")),
        ("filter (clipscore, trained twice) / CLIP, a cell without its evaluation (seconds)", partial(whole.cell_ratio, "clipscore")),
        ("linear probe with its choice of L2 / scikit-learn's over the same strengths (seconds)", evaluation.probe_ratio),
        ("drawing at 32 px / 2,000 images per second and core (goal 1)", reading.drawing),
        ("packing: decoding JPEG files of 340x256 to 64 px / a plain Pillow loop on one core (images per second)", reading.decoding),
        ("reading, checking and naming 3,000,000 pairs / pandas.read_csv alone (rows per second)", partial(reading.reading, "seconds")),
        ("reading, checking and naming 3,000,000 pairs / 2 GB (peak memory; goal below 1)", partial(reading.reading, "memory")),
        ("bench --help / 0.3 seconds (goal below 1)", partial(whole.start_up, "--help")),
        ("an unknown defense / 0.3 seconds (goal below 1)", partial(whole.start_up, "run", "--defense", "rocilp")),
        ("peak memory of a small run / 1.5 GB (goal below 1)", whole.memory),
    ]


def main() -> None:
    """Measures all lines, or those whose name holds a word."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="", help="only lines that hold this text")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    machine = environment()
    print(f"{machine['processor']}, {os.cpu_count()} cores, {', '.join(machine['devices']) or 'no GPU'}, torch {machine['packages']['torch']}", flush=True)  # noqa: T201
    for name, ratio in lines():
        if asked.only in name:
            values = sorted(ratio() for _ in range(asked.repeats))
            print(f"- {name}: {values[len(values) // 2]:.2f} [{values[0]:.2f}, {values[-1]:.2f}], n={asked.repeats}", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
