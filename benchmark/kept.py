"""Committed runs of a reference table: copied beside its grid, and found there again after the code has moved on."""

from __future__ import annotations

import functools
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from benchmark.cell import Cell, poison_of
from benchmark.data.poison import open_record
from benchmark.errors import BenchError
from benchmark.evaluate.hooks import without_hooks
from benchmark.evaluate.measure import Evaluator
from benchmark.evaluate.pictures import gallery_key
from benchmark.evaluate.predictions import FOLDER, SLIM, read_predictions, write_slim
from benchmark.record import finished
from benchmark.registry import with_defaults
from benchmark.settings import RunSettings, canonical
from benchmark.stages import damage, seal, write_atomically


def keep(folder: Path, kept: Path) -> None:
    """Copies a finished run with its predictions in their slim form; `kept` may be the folder itself."""
    part = kept.with_name(kept.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(folder, part, ignore=shutil.ignore_patterns(FOLDER, SLIM, "done.json"))
    tables = read_predictions(folder)
    if tables:
        write_slim(tables, part / SLIM)
    seal(part, {"run_id": folder.name})
    shutil.rmtree(kept, ignore_errors=True)
    part.rename(kept)
    if folder != kept:
        _keep_pictures(folder, kept)
    _index.cache_clear()


def slim(table: Path) -> tuple[int, int]:
    """Rewrites the predictions of every kept run of a reference table; bytes before and after. Records stay byte for byte.

    Raises:
        BenchError: no runs there, or one that is damaged.
    """
    folders = sorted(path.parent for path in table.glob("runs/*/record.json") if path.parent.suffix != ".part")
    if not folders:
        raise BenchError(f"no runs in {table}; a reference table has them in its folder runs")
    before = after = 0
    for folder in folders:
        problem = damage(folder)
        if problem:
            raise BenchError(f"{folder} is damaged ({problem}); run its cell again, or remove it")
        before += _size(folder)
        keep(folder, folder)
        after += _size(folder)
    return before, after


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _keep_pictures(folder: Path, kept: Path) -> None:
    """Copies the pictures of the run's poison, which all runs of that poison share."""
    pictures = Path("gallery") / gallery_key(json.loads((kept / "record.json").read_text()))
    made, copy = folder.parents[1] / pictures, kept.parents[1] / pictures
    if made.is_dir() and not copy.is_dir():
        shutil.copytree(made, copy)


def find_kept(cell: Cell, runs: Path) -> dict[str, Any] | None:
    """The record in this folder that the cell would make again, or None.

    That is the record of the same run id. It is also one of the same settings whose attack had other code, if today's
    attack makes the same poisoned set and asks the same questions: training sees no difference. Options that have come
    since count as set to their defaults. Such a record moves to today's run id, with today's settings.
    """
    own = runs / cell.settings.run_id
    part = own.with_name(own.name + ".part")
    record = finished(own)
    if record is None and finished(part) is not None:  # `keep` was stopped before its last step
        shutil.rmtree(own, ignore_errors=True)
        part.rename(own)
        record = finished(own)
    if record is not None:
        return record
    wanted = _without_attack_code(cell.settings.as_json())
    for run_id, resolved in _index(runs).items():
        if _filled_in(cell, resolved) == wanted:
            record = finished(runs / run_id)
            if record is not None and _same_poison(cell, record):
                return _moved(cell, record, runs)
    return None


@functools.cache
def _index(runs: Path) -> dict[str, dict[str, Any]]:
    """Resolved settings by run id."""
    found = {}
    for path in sorted(runs.glob("*/record.json")):
        if path.parent.suffix == ".part":
            continue
        try:
            found[path.parent.name] = json.loads(path.read_text())["resolved"]
        except (FileNotFoundError, ValueError, KeyError):  # the first where another worker has just moved a record
            continue
    return found


def _filled_in(cell: Cell, resolved: dict[str, Any]) -> dict[str, Any] | None:
    plugins = {"attack": cell.attack_plugin, "defense": cell.defense_plugin}
    if any(resolved[kind]["name"] != plugin.name for kind, plugin in plugins.items()):
        return None
    try:
        return _without_attack_code(RunSettings(**with_defaults(resolved, lambda kind, one: plugins[kind])).as_json())
    except ValidationError:
        return None


def _without_attack_code(resolved: dict[str, Any]) -> dict[str, Any]:
    return {**resolved, "attack": {**resolved["attack"], "source": ""}}


def _moved(cell: Cell, record: dict[str, Any], runs: Path) -> dict[str, Any]:
    """The record under today's run id, with today's settings; `environment.json` still says what made it."""
    old, new = runs / record["run_id"], runs / cell.settings.run_id
    renewed = {**record, "run_id": cell.settings.run_id, "resolved": cell.settings.as_json()}
    part = new.with_name(new.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(old, part, ignore=shutil.ignore_patterns("done.json"))
    write_atomically(part / "record.json", (canonical(renewed) + "\n").encode())
    seal(part, {"run_id": cell.settings.run_id})
    shutil.rmtree(new, ignore_errors=True)
    part.rename(new)
    shutil.rmtree(old)
    known = _index(runs)
    known.pop(old.name, None)
    known[new.name] = renewed["resolved"]
    return renewed


def _same_poison(cell: Cell, record: dict[str, Any]) -> bool:
    made = poison_of(cell)
    sealed = open_record(made.record)
    cards = Evaluator(cell.suite, cell.attack.probes(cell.suite, sealed.kept), "", cell.stages).cards()
    same = cell.settings.clean_model or sealed.header["poisoned_manifest_sha256"] == record["poison"]["manifest_sha256"]
    return bool(same and cards == without_hooks(record["cards"]))


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        sizes = slim(Path(argument))
        sys.stdout.write(f"{argument}: {sizes[0] / 1e6:.2f} MB -> {sizes[1] / 1e6:.2f} MB\n")
