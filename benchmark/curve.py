"""The curve of a run: cheap metrics after each epoch of its last training, and what becomes of the snapshots."""

from __future__ import annotations

import functools
import json
import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmark.data.pack import Pack
from benchmark.data.poison import Poisoned, SealedRecord
from benchmark.evaluate import splits, trained_pairs
from benchmark.evaluate.measure import Evaluator, read
from benchmark.settings import canonical
from benchmark.stages import write_atomically
from benchmark.train.lab import Lab, Split, drop_snapshots, snapshots, weights_hash
from benchmark.train.model import Model, load_weights

if TYPE_CHECKING:
    from benchmark.cell import Cell


class SnapshotsGone(Exception):
    """Weights that this curve needs were dropped after another evaluation.

    Attributes:
        folder: of their training.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder


def curve_of(cell: Cell, lab: Lab, evaluator: Evaluator, pairs: Pairs) -> list[dict[str, Any]]:
    """Cheap metrics after each epoch of the last training, with the phase of the epoch."""
    if not lab.trainings:
        return []
    folder = lab.trainings[-1]
    seen, points = 0, []
    parted = {split.epoch: split for split in lab.splits}
    with cell.stages.lock(folder.with_name(folder.name + ".curve")):
        if not (folder / "log.json").is_file():  # another cell of this training has removed it, to make it again
            raise SnapshotsGone(folder)
        log = {row["epoch"]: row for row in json.loads((folder / "log.json").read_text())}
        names = snapshot_names(folder)
        for epoch, row in sorted(log.items()):
            seen += row["pairs"]
            point = {"epoch": epoch, "phase": row["phase"], "samples_seen": seen}
            point |= {name: value for name, value in row.items() if name not in ("warnings", "epoch", "phase", "pairs")}
            if str(epoch) in names and (cell.settings.evaluation.curve or epoch == max(log)):
                metrics, _ = read(_evaluate_snapshot(cell, evaluator, folder, epoch, names[str(epoch)]))
                point["metrics"] = {f"{metric.name}/{metric.of}": metric.value for metric in metrics if metric.name in _CURVE} | pairs.measure(folder, epoch, names[str(epoch)])
                if epoch in parted:
                    point["metrics"] |= pairs.split(parted[epoch])
            points.append(point)
        if not cell.keep_snapshots:
            drop_snapshots(folder)
    return points


def no_curve(cell: Cell, lab: Lab) -> list[dict[str, Any]]:
    """Models that vote have no one curve, and nobody else wants their snapshots."""
    if not cell.keep_snapshots:
        for folder in dict.fromkeys(lab.trainings):
            drop_snapshots(folder)
    return []


_CURVE = ("zero_shot_acc1", "asr", "asr_floor", "triggered_acc1")


def _evaluate_snapshot(cell: Cell, evaluator: Evaluator, folder: Path, epoch: int, name: str) -> Path:
    precision = cell.settings.train.precision
    found = cell.stages.open("evaluate", evaluator.facts([name], precision, None))
    if found is not None:
        return found
    path = snapshots(folder).get(epoch)
    if path is None:
        raise SnapshotsGone(folder)
    return evaluator.measure(partial(_load, cell, path), [name], precision, None)


class Pairs:
    """Asks snapshots about the training pairs; what is asked is drawn when the first answer is not in the cache."""

    def __init__(self, cell: Cell, record: SealedRecord, poisoned: Poisoned, packed: Pack) -> None:
        self.cell, self.packed = cell, packed
        self.key = {"rows": packed.content, "poison": poisoned.record.parent.name}
        self.touched = functools.cache(lambda: np.isin(poisoned.rows()[0], record.rows["id"].tolist()))
        self.asked = functools.cache(lambda: trained_pairs.ask(poisoned.rows()[0], record, cell.source, cell.suite))

    def split(self, split: Split) -> dict[str, float]:
        """The values of what a defense parted, with the sealed record's rows."""
        return splits.measure(split.kept, split.scores, self.touched())

    def measure(self, folder: Path, epoch: int, name: str) -> dict[str, float]:
        """The values of one snapshot."""
        stages = self.cell.stages
        facts = {"stage": "trained_pairs", "version": trained_pairs.VERSION, "weights": name, "precision": self.cell.settings.train.precision, **self.key}
        found = stages.open("trained_pairs", facts)
        if found is None:
            path = snapshots(folder).get(epoch)
            if path is None:
                raise SnapshotsGone(folder)
            found = stages.make("trained_pairs", facts, lambda part: trained_pairs.write(partial(_load, self.cell, path), self.packed, self.asked(), part))
        return trained_pairs.read(found)


def snapshot_names(folder: Path) -> dict[str, str]:
    """Weight hashes by epoch, kept beside the training so that evaluations of dropped snapshots are found again."""
    present = {str(epoch): weights_hash(file) for epoch, file in snapshots(folder).items()}
    path = _names_file(folder)
    names: dict[str, str] = json.loads(path.read_text()) if path.is_file() else {}
    if present.items() <= names.items():
        return names
    write_atomically(path, canonical(present).encode())  # a new training, or one made again to other weights
    return present


def _names_file(folder: Path) -> Path:
    return folder.with_name(folder.name + ".snapshots.json")


def forget_training(cell: Cell, folder: Path) -> None:
    """Removes a training whose snapshots are gone, unless another process has made it again meanwhile."""
    with cell.stages.lock(folder):
        path = _names_file(folder)
        listed = json.loads(path.read_text()) if path.is_file() else {}
        if folder.is_dir() and len(snapshots(folder)) >= len(listed):
            return
        path.unlink(missing_ok=True)
        if folder.is_dir():
            shutil.rmtree(folder)


def _load(cell: Cell, path: Path) -> list[Model]:
    return [load_weights(path, cell.settings.model, cell.settings.data.side, torch.device(cell.settings.device), cell.settings.train.precision)]
