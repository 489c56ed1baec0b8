"""Reads recorded runs from disk and picks those a table asks for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmark.errors import BenchError
from benchmark.settings import SCHEMA

_ABSENT = object()
_NEEDED = {"schema", "run_id", "label", "resolved", "data", "poison", "cards", "metrics", "curve"}


@dataclass(frozen=True)
class Run:
    """One recorded run: the deterministic record, and what it cost on the machine that made it."""

    record: dict[str, Any]
    cost: dict[str, Any]
    folder: Path

    def label(self, name: str) -> str:
        """One of the labels: attack, defense, scale, dataset, model."""
        return str(self.record["label"][name])

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.record["resolved"]["seed"])

    @property
    def train_seconds(self) -> float | None:
        """Seconds of all trainings; None if unknown."""
        return _number(self.cost.get("train_seconds"))

    @property
    def beside_seconds(self) -> float | None:
        """Seconds of what the defense did beside its trainings; None in records from before it was measured."""
        return _number(self.cost.get("beside_seconds"))

    @property
    def pairs(self) -> float | None:
        """What the run cost in trained pairs; None if unknown.

        Half an image or text that went through its tower, with a third of that where no gradient followed; of runs that did not
        count these, the pairs of all trainings.
        """
        passes = self.cost.get("passes")
        if not passes:
            return _number(self.cost.get("pairs_trained"))
        return float(sum(n * (0.5 if name.endswith("backward") else 0.5 / 3) for name, n in passes.items()))

    @property
    def environment(self) -> dict[str, Any]:
        """Versions and hardware that made the run; empty if nothing is known of them."""
        try:
            found: dict[str, Any] = json.loads((self.folder / "environment.json").read_text())
        except (OSError, ValueError):
            return {}
        return found

    @property
    def hardware(self) -> str:
        """The devices or, without any, the processor that the run was made on; empty if nothing is known of them."""
        environment = self.environment
        return ", ".join(environment.get("devices", [])) or str(environment.get("processor", ""))

    @property
    def made(self) -> float:
        """When the run was made, in seconds since 1970; of runs that do not tell, when their folder was written, which a copy changes."""
        try:
            return datetime.fromisoformat(str(self.environment.get("made"))).timestamp()
        except ValueError:
            return self.folder.stat().st_mtime

    @property
    def machine(self) -> str:
        """The hardware that the run was made on and its threads, for people."""
        threads = self.cost.get("threads", "unknown")
        return f"{self.hardware or 'unknown machine'}, {threads} {'thread' if threads == 1 else 'threads'}"

    def values(self, metric: str) -> list[dict[str, Any]]:
        """All entries of this metric, one for each evaluation set or probe."""
        return [entry for entry in self.record["metrics"] if entry["name"] == metric]


def load(results: Path) -> list[Run]:
    """Every finished run under `<results>/runs`, in order of attack, defense and seed.

    Raises:
        BenchError: no such folder, or a record of a newer version of this program.
    """
    folder = results / "runs"
    if not folder.is_dir():
        raise BenchError(f"no runs in {results}; `bench run` makes some, and --results names another folder, such as results/reference/main")
    runs = []
    for path in sorted(folder.glob("*/record.json")):
        if path.parent.suffix == ".part":
            continue
        runs.append(read_run(path.parent))
    return sorted(runs, key=lambda run: (run.label("attack"), run.label("defense"), run.label("scale"), run.seed))


def read_run(folder: Path) -> Run:
    """The finished run in this folder.

    Raises:
        BenchError: its record is damaged, or of a newer version of this program.
    """
    path = folder / "record.json"
    try:
        record = json.loads(path.read_text(), parse_constant=_refuse)
        cost = json.loads((folder / "cost.json").read_text()) if (folder / "cost.json").is_file() else {}
        whole = record.keys() >= _NEEDED
    except (OSError, ValueError, AttributeError):
        whole = False
    if not whole:
        raise BenchError(f"{path} is damaged; run its cell again, or remove {folder}")
    if record["schema"] > SCHEMA:
        raise BenchError(f"{path} has schema {record['schema']}, this version reads up to {SCHEMA}; install a newer one")
    return Run(record, cost, folder)


def select(runs: Sequence[Run], attacks: Sequence[str] = (), defenses: Sequence[str] = (), scales: Sequence[str] = (), where: Sequence[str] = ()) -> list[Run]:
    """Runs whose labels match; a name matches its own label and the label with options behind it.

    Args:
        where: `key=value` over the resolved settings, with dots: `train.epochs=12`, `attack.options.rate=0.001`.

    Raises:
        BenchError: a key that no run has.
    """
    conditions = [_condition(text) for text in where]
    for key, _ in conditions:
        if runs and all(_lookup(run.record["resolved"], key) is _ABSENT for run in runs):
            raise BenchError(f"no run here has a setting {key!r}; `resolved` in a record lists them, for instance train.epochs or attack.rate")
    chosen = []
    for run in runs:
        fits = all(not wanted or any(_matches(run.label(key), name) for name in wanted) for key, wanted in (("attack", attacks), ("defense", defenses), ("scale", scales)))
        if fits and all(_lookup(run.record["resolved"], key) == value for key, value in conditions):
            chosen.append(run)
    return chosen


def superseded(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """Runs of the newest source of each plugin file, and a line for each older one that was left out."""
    newest: dict[tuple[str, str], tuple[float, str]] = {}
    for run in runs:
        for kind in ("attack", "defense"):
            plugin = run.record["resolved"][kind]
            if plugin["file"]:
                stamp = (run.made, plugin["source"])
                key = (kind, plugin["name"])
                newest[key] = max(newest.get(key, stamp), stamp)
    kept, lines = [], []
    for run in runs:
        old = [kind for kind in ("attack", "defense") for plugin in [run.record["resolved"][kind]] if plugin["file"] and newest[(kind, plugin["name"])][1] != plugin["source"]]
        if old:
            lines.append(f"{run.record['run_id']} is of an older source of {run.record['resolved'][old[0]]['name']} and was left out")
        else:
            kept.append(run)
    return kept, lines


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _matches(label: str, name: str) -> bool:
    return label == name or label.startswith((f"{name}[", f"{name}@"))


def _condition(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise BenchError(f"expected --where key=value, got {text!r}; for instance --where train.epochs=12")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _lookup(settings: dict[str, Any], key: str) -> Any:
    value: Any = settings
    for part in key.split("."):
        if not isinstance(value, dict):
            return _ABSENT
        options = value.get("options")
        value = value.get(part, options.get(part, _ABSENT) if isinstance(options, dict) else _ABSENT)
    return value
