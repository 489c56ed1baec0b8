"""Runs a recorded run again from its own settings, and says whether the same record comes out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from benchmark.data.source import WORLD
from benchmark.errors import BenchError
from benchmark.matrix import open_cell
from benchmark.progress import Progress
from benchmark.report.difference import changed, differing
from benchmark.report.records import Run, load
from benchmark.request import SECTIONS, Asked, Request
from benchmark.settings import SCALES, canonical
from benchmark.train import distributed


@dataclass(frozen=True)
class Again:
    """What came out.

    Attributes:
        same: whether the two records are equal, apart from the source hashes of plugins whose code has changed and from metrics that have come since.
        lines: what differs, for people.
    """

    run: Run
    same: bool
    lines: list[str]


def rerun(run: Run, given: Request, progress: Progress, plugins: dict[str, str]) -> Again:
    """Trains and measures the run's settings anew.

    Args:
        given: what no record holds. `results`, which must not be where the record comes from, and the cache; and of a run on data of
            one's own the data, the evaluation sets, and how they are read. Their content must be that of the record.
        plugins: paths of an attack or a defense that was given by file, by kind.

    Raises:
        BenchError: a record that is no run, a plugin or data that are needed and not given, other data than recorded.
    """
    from benchmark.cell import run_cell

    asked = asked_again(run, given, plugins)
    cell = open_cell(asked, progress)
    resolved, now = run.record["resolved"], cell.settings.as_json()
    for name in ("data_hash", "suite_hash"):
        if resolved[name] != now[name]:
            raise BenchError(
                f"{name} of the record is {resolved[name][:12]} and that of the data here is {now[name][:12]}; give the data of the record, "
                "with --data, --eval and whatever else of --templates and of how data are read the run was given"
            )
    cell.label = dict(run.record["label"])
    if cell.folder.resolve() == run.folder.resolve():
        raise BenchError(f"{given.results} is where the record comes from; choose another folder with --out")
    new = run_cell(cell)
    again = next(one for one in load(given.results) if one.record["run_id"] == new["run_id"])
    expected = {**run.record, "run_id": new["run_id"], "resolved": new["resolved"]}
    old = {(entry["name"], entry["of"]) for entry in run.record["metrics"]}
    added = sorted({entry["name"] for entry in new["metrics"] if (entry["name"], entry["of"]) not in old})
    shared = {
        "metrics": [entry for entry in new["metrics"] if (entry["name"], entry["of"]) in old],
        "cards": {key: card for key, card in new["cards"].items() if key in run.record["cards"]},
    }
    same = canonical(expected) == canonical({**new, **shared})
    code = [path for path, _, _ in changed(resolved, new["resolved"])]
    lines = differing(run, again)
    if added:
        lines.insert(0, f"measured now and not in the record: {', '.join(added)}")
    if same and code:
        lines.insert(0, f"the same numbers, although the settings have changed in {', '.join(code)}")
    return Again(again, same, lines)


def asked_again(run: Run, given: Request, plugins: dict[str, str]) -> Asked:
    """The cell that the record's settings ask for, on the data that are given."""
    resolved: dict[str, Any] = run.record["resolved"]
    if not isinstance(resolved["train"], dict):
        raise BenchError(f"{run.record['run_id']} is a measured checkpoint and no run; measure it again with bench eval")
    if resolved.get("processes", 1) != distributed.size():
        raise BenchError(
            f"{run.record['run_id']} was trained by {resolved.get('processes', 1)} processes together and this is {distributed.size()}; start it with torchrun as it was"
        )
    if resolved["scale"] not in SCALES:
        raise BenchError(f"{run.record['run_id']} is of scale {resolved['scale']!r}, which this version does not have")
    if resolved["dataset"] != WORLD and given.data is None:
        raise BenchError(f"{run.record['run_id']} is of the data set {resolved['dataset']!r}; give it with --data and --eval")
    names = {}
    for kind in ("attack", "defense"):
        plugin = resolved[kind]
        if plugin["file"] and kind not in plugins:
            raise BenchError(f"{kind} {plugin['name']!r} of {run.record['run_id']} was given by file; give its path with --{kind}")
        names[kind] = plugins.get(kind, plugin["name"])
    usual = SCALES[resolved["scale"]]
    sets = tuple(
        f"{section}.{option}={_text(value)}"
        for section in SECTIONS
        for option, value in resolved[section].items()
        if value != getattr(usual, section).model_dump(mode="json").get(option)
    )
    request = replace(
        given,
        attacks=(names["attack"],),
        defenses=(names["defense"],),
        seeds=(resolved["seed"],),
        scale=resolved["scale"],
        sets=sets,
        baseline=False,
        sham=resolved["sham"],
        clean_model=resolved.get("clean_model", False),
        device=resolved["device"],
    )
    defense = names["defense"] + ("+aug" if resolved["augmented"] else "")
    return Asked(names["attack"], defense, resolved["seed"], request, dict(resolved["attack"]["options"]), dict(resolved["defense"]["options"]))


def _text(value: Any) -> str:
    return canonical(value)
