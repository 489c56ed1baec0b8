"""Audits a checkpoint with a defense's `audit`, beside a reference of the same architecture if there is one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmark.contract import Audit, Defense
from benchmark.data.eval_sets import open_suite
from benchmark.data.world import drawn_row
from benchmark.errors import BenchError
from benchmark.progress import Progress
from benchmark.registry import Plugin, configure, find
from benchmark.request import parse_set
from benchmark.settings import DataSettings, canonical
from benchmark.stages import Stages, write_atomically
from benchmark.train.checkpoints import Ask, Loaded, Writer, load_checkpoint


@dataclass(frozen=True)
class ModelAudit:
    """What the user asks for.

    Attributes:
        reference: a checkpoint of the same architecture that is known to be clean.
        audit: a defense that overrides `audit`, by name or file.
        sets: its options, as `defense.epochs=200`.
        eval: an evaluation set whose training images (test images, where it has none) the model is shown; None for drawn ones.
        results: where the decoded set is kept.
        writer: who wrote an `epoch_N.pt` whose file leaves it open, of both checkpoints.
    """

    checkpoint: Path
    architecture: str | None = None
    reference: Path | None = None
    audit: str = "decree"
    sets: tuple[str, ...] = ()
    eval: str | None = None
    eval_root: Path | None = None
    results: Path = Path("results")
    device: str | None = None
    writer: Writer = "auto"


def audit_model(asked: ModelAudit, progress: Progress) -> dict[str, Any]:
    """The score of the checkpoint and of the reference, and what they were measured with.

    Raises:
        BenchError: a checkpoint that does not load, a defense that audits nothing, too few images, a reference of another architecture.
    """
    plugin = find("defense", asked.audit)
    defense = _defense(plugin, asked.sets)
    device = torch.device(asked.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    files = [asked.checkpoint, *([asked.reference] if asked.reference else [])]
    loaded = [load_checkpoint(file, device, Ask(model=asked.architecture, writer=asked.writer)) for file in files]
    kinds = [(one.model.name, one.model.side) for one in loaded]
    if len(set(kinds)) > 1:
        raise BenchError(
            f"{files[0]} is {kinds[0][0]} at {kinds[0][1]} px and the reference {files[1]} is {kinds[1][0]} at {kinds[1][1]} px; scores compare within one architecture alone"
        )
    images, shown = _images(asked, defense.clean_wanted(), loaded[0].model.side, progress)
    found = []
    for file, one in zip(files, loaded, strict=True):
        progress.say(f"{one.summary()}; {plugin.name} looks at {len(images)} images")
        answer = _answer(defense, plugin, one, images)
        about = {"file": file.name, "weights": one.model.weights_sha256(), "model": one.model.name, "side": one.model.side}
        found.append(about | {"score": answer.score, "says": answer.says})
    return {
        "audit": plugin.name,
        "source": plugin.source,
        "paper": defense.paper,
        "options": defense.model_dump(mode="json"),
        "images": shown,
        "n_images": len(images),
        "checkpoint": found[0],
        "reference": found[1] if asked.reference else None,
    }


def lines(found: dict[str, Any]) -> list[str]:
    """What a person reads."""
    checkpoint, reference = found["checkpoint"], found["reference"]
    said = [f"{found['audit']} on {found['n_images']} {found['images']}; higher is more suspicious", _line(checkpoint, "")]
    if reference is None:
        return [*said, "A score says little alone: give --reference, a model of this architecture that is known to be clean."]
    difference = checkpoint["score"] - reference["score"]
    return [
        *said,
        _line(reference, ", the reference"),
        f"The checkpoint is {abs(difference):.4f} {'above' if difference > 0 else 'below'} the reference.",
    ]


def _line(one: dict[str, Any], which: str) -> str:
    return f"{one['score']:+.4f}  {one['file']}{which}{'. ' if one['says'] else ''}{one['says']}"


def write(found: dict[str, Any], folder: Path) -> Path:
    """Writes model.json into the folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "model.json"
        write_atomically(path, (canonical(found) + "\n").encode())
    except OSError as error:
        raise BenchError(f"cannot write {folder}: {error.strerror}") from None
    return path


def _defense(plugin: Plugin, sets: Sequence[str]) -> Defense:
    options = {}
    for section, option, value in map(parse_set, sets):
        if section not in ("defense", plugin.name):
            raise BenchError(f"--set {section}.{option}: an audit takes options of {plugin.name}, as --set defense.{option}=...")
        options[option] = value
    defense: Defense = configure(plugin, {}, options)
    if not defense.overrides("audit"):
        raise BenchError(f"defense {plugin.name!r} audits no model; `bench list defenses` shows which are of the kind audit")
    return defense


def _images(asked: ModelAudit, n: int, side: int, progress: Progress) -> tuple[NDArray[np.uint8], str]:
    """Clean images (n, side, side, 3) and what they are."""
    if asked.eval is None:
        drawn = [drawn_row(0, "clean", row, side).image for row in range(n)]
        return np.array(drawn, dtype=np.uint8).reshape(n, side, side, 3), "drawn images"
    main = open_suite(DataSettings(side=side), [asked.eval], Stages(asked.results / "cache", progress.say), progress, asked.eval_root).main
    images, split = (main.train.images, "training") if len(main.train.labels) else (main.test.images, "test")
    if len(images) < n:
        raise BenchError(f"evaluation set {main.name!r} has {len(images)} {split} images and the audit wants {n}; lower defense.n_clean")
    return np.array(images[np.linspace(0, len(images) - 1, n).round().astype(int)]), f"{split} images of {main.name}"


def _answer(defense: Defense, plugin: Plugin, loaded: Loaded, images: NDArray[np.uint8]) -> Audit:
    from benchmark.cell import plugin_code

    def asked() -> Audit:
        answer = Audit.of(defense.audit(loaded.model, images))
        if not math.isfinite(answer.score):
            raise ValueError(f"audit must return a finite number, got {answer.score}")
        return answer

    answer: Audit = plugin_code("defense", plugin, asked)
    return answer
