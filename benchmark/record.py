"""What a run leaves behind: its folder, whole or not at all, and what the record says of poison, versions and hardware."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from benchmark.data.poison import Poisoned, SealedRecord
from benchmark.evaluate.predictions import ROWS
from benchmark.settings import canonical, digest
from benchmark.stages import damage, seal, write_atomically

_PACKAGES = ("clip-poison-bench", "torch", "torchvision", "open_clip_torch", "timm", "numpy", "pandas", "pillow", "scikit-learn", "scipy", "pydantic")


def finished(folder: Path) -> dict[str, Any] | None:
    """The record of a finished run, or None; a damaged one counts as not finished."""
    if not folder.is_dir() or damage(folder) is not None:
        return None
    record: dict[str, Any] = json.loads((folder / "record.json").read_text())
    return record


def about_poison(record: SealedRecord) -> dict[str, Any]:
    """What a run record says of the poison."""
    return {
        "n_requested": record.header["n_requested"],
        "n_poison": record.n_poison,
        "poison_rate": record.header["poison_rate"],
        "edit_mode": record.header["edit_mode"],
        "manifest_sha256": record.header["poisoned_manifest_sha256"],
        "triggers": record.header["triggers"],
        "targets": record.kept.get("targets", []),
    } | {name: found[name] for found, name in ((record.header, "surrogate"), (record.kept, "facts")) if name in found}


def poison_key(poisoned: Poisoned, sham: bool) -> str:
    """What stands for the poison in the key of an evaluation."""
    return digest({"poison": poisoned.record.parent.name, "sham": sham})


def publish(folder: Path, record: dict[str, Any], evaluation: Path, cost: dict[str, Any], predictions: Path | None = None, rows: pd.DataFrame | None = None) -> None:
    """Writes the folder of a finished run, whole or not at all; `predictions` holds further tables beside those of the evaluation, `rows` what was said of poisoned rows."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    part.mkdir(parents=True)
    shutil.copytree(evaluation / "predictions", part / "predictions")
    if predictions is not None:
        shutil.copytree(predictions, part / "predictions", dirs_exist_ok=True)
    if rows is not None:
        rows.to_parquet(part / "predictions" / f"{ROWS}.parquet", compression="zstd", index=False)
    write_atomically(part / "cost.json", canonical(cost).encode())
    write_atomically(part / "environment.json", canonical(environment() | {"made": datetime.now(UTC).isoformat(timespec="seconds")}).encode())
    write_atomically(part / "record.json", (canonical(record) + "\n").encode())
    seal(part, {"run_id": record["run_id"]})
    part.rename(folder)


def environment() -> dict[str, Any]:
    """Versions and hardware of this process."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"python": platform.python_version(), "platform": platform.platform(), "processor": _processor(), "packages": versions, "devices": devices, "git": _git()}


def _git() -> dict[str, Any] | None:
    """Commit of the checkout that this code runs from, and whether it was changed; None for an installed package."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        commit, changes = (
            subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=30).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "dirty": bool(changes)}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
