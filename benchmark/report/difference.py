"""What differs between two recorded runs: settings, code, results, single queries."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from benchmark.errors import BenchError, nearest
from benchmark.evaluate.paired_tests import mcnemar
from benchmark.evaluate.predictions import read_predictions
from benchmark.evaluate.statistics import TARGET_IMAGES
from benchmark.report.records import Run, read_run
from benchmark.settings import canonical

_ABSENT = "(none)"
_SECTIONS = (("settings", "resolved"), ("data", "data"), ("poison", "poison"), ("definitions", "cards"))


def find_run(name: str, results: Path) -> Run:
    """The run of this id (or the start of one) under `results` and its reference tables, or in this folder.

    Raises:
        BenchError: no such run, or several, or unequal records of it: one id is one setting, and another kind of processor rounds otherwise.
    """
    if (Path(name) / "record.json").is_file():
        return read_run(Path(name))
    folders = [path.parent for pattern in ("runs", "reference/*/runs") for path in sorted(results.glob(f"{pattern}/*/record.json")) if path.parent.suffix != ".part"]
    found = {folder.name: folder for folder in reversed(folders) if name and folder.name.startswith(name)}
    if len(found) == 1:
        (run_id, first), *_ = found.items()
        known = read_run(first)
        other = [folder for folder in folders if folder.name == run_id and _values_differ(read_run(folder), known)]
        if other:
            raise BenchError(f"run {run_id} was made more than once, with other results: {', '.join(map(str, [first, *other]))}; give the folder that you mean")
        return known
    if found:
        raise BenchError(f"{name!r} is the start of {len(found)} run ids ({', '.join(sorted(found)[:4])}, ...); give more of it")
    guess = nearest(name, [folder.name for folder in folders])
    raise BenchError(f"no run {name!r} in {results}.{f' Did you mean {guess!r}?' if guess else ''} `bench report --format long` lists run ids; a folder of a run will do as well")


def differing(left: Run, right: Run) -> list[str]:
    """Lines for people: what differs in settings, data, poison and definitions, then in results. One line if nothing does."""
    lines = [" -> ".join(f"{run.record['run_id']} ({run.label('attack')}, {run.label('defense')}, {run.label('scale')}, seed {run.seed})" for run in (left, right))]
    for title, section in _SECTIONS:
        changes = [f"  {path}: {one} -> {two}" for path, one, two in changed(left.record.get(section), right.record.get(section))]
        lines += [f"{title}:", *changes] if changes else []
    code = _code(left, right)
    lines += ["made with:", *code] if code else []
    results = result_lines(left, right)
    lines += ["results:", *results] if results else []
    if canonical(left.record) == canonical(right.record):
        return [f"{left.record['run_id']}: the same record, byte for byte", *lines[1:]]
    if not results:
        lines.append("results: the same")
    return lines


def result_lines(left: Run, right: Run) -> list[str]:
    """What differs in metrics, the curve and the answers to single queries."""
    values = [_values(run) for run in (left, right)]
    lines = [f"  {name}: {_shown(values[0].get(name))} -> {_shown(values[1].get(name))}{_step(values[0].get(name), values[1].get(name))}" for name in _differing_names(*values)]
    curves = [{point["epoch"]: point for point in run.record["curve"]} for run in (left, right)]
    epochs = [epoch for epoch in sorted(curves[0].keys() | curves[1].keys()) if curves[0].get(epoch) != curves[1].get(epoch)]
    if epochs:
        lines.append(f"  the curve differs in {len(epochs)} of {max(map(len, curves))} epochs, the first is {epochs[0]}")
    return lines + _queries(left, right)


def _values(run: Run) -> dict[str, Any]:
    return {f"{entry['name']}/{entry['of']}": entry["value"] for entry in run.record["metrics"]}


def _values_differ(left: Run, right: Run) -> bool:
    """Whether a value that both have is not the same."""
    one, two = _values(left), _values(right)
    return any(one[name] != two[name] for name in one.keys() & two.keys())


def changed(left: Any, right: Any, path: str = "") -> list[tuple[str, str, str]]:
    """Paths (with dots) at which two JSON values differ, with both values; lists and leaves are compared whole."""
    if isinstance(left, dict) and isinstance(right, dict):
        names = sorted(left.keys() | right.keys())
        return [one for name in names for one in changed(left.get(name, _ABSENT), right.get(name, _ABSENT), f"{path}.{name}" if path else str(name))]
    return [] if left == right else [(path, _shown(left), _shown(right))]


def _queries(left: Run, right: Run) -> list[str]:
    """Where both runs answered the same queries: how many succeeded with one alone, and McNemar's p over them."""
    tables = [read_predictions(run.folder) for run in (left, right)]
    lines = []
    for name in sorted(tables[0].keys() & tables[1].keys()):
        one, two = (table[name] for table in tables)
        if "rank_goal" not in one or "rank_goal" not in two or not _same_questions(one, two):
            continue
        counted = (one["counted"] & two["counted"]).to_numpy()
        if "floor" in one:
            counted = counted & ~one["floor"].to_numpy()
        first, second = ((table["rank_goal"] <= 1).to_numpy()[counted] for table in (one, two))
        if (first == second).all():
            continue
        only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
        counts = f"{int((first & second).sum())} reach the goal in both, {only_first} in the first alone, {only_second} in the second alone, of {len(first)}"
        units = _units(left, name.removeprefix("attack-"))
        test = "no test: images of one target are not independent" if units == TARGET_IMAGES else f"McNemar p = {mcnemar(only_first, only_second):.2g}"
        lines.append(f"  {name}: {counts} {units}, one model each ({test})")
    return lines


def _units(run: Run, probe: str) -> str:
    """What a probe's card counts: targets, images of targets, or queries."""
    cards = run.record.get("cards", {})
    of_probe = [cards.get(entry["card"], {}) for entry in run.record["metrics"] if entry["of"] == probe]
    if not any(card.get("queries") == "targets" for card in of_probe):
        return "queries"
    return TARGET_IMAGES if any(card.get("images_per_target", 1) > 1 for card in of_probe) else "targets"


def _same_questions(one: pd.DataFrame, two: pd.DataFrame) -> bool:
    columns = [name for name in ("query_id", "goal", "floor") if name in one or name in two]
    return all(name in one and name in two and list(one[name]) == list(two[name]) for name in columns)


def _code(left: Run, right: Run) -> list[str]:
    environments = [{name: value for name, value in run.environment.items() if name != "made"} for run in (left, right)]
    return [f"  {path}: {one} -> {two}" for path, one, two in changed(environments[0], environments[1])]


def _differing_names(left: dict[str, Any], right: dict[str, Any]) -> Sequence[str]:
    return [name for name in dict.fromkeys([*left, *right]) if left.get(name, _ABSENT) != right.get(name, _ABSENT)]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else canonical(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _step(left: Any, right: Any) -> str:
    return f" ({right - left:+.4g})" if isinstance(left, int | float) and isinstance(right, int | float) else ""
