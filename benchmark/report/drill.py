"""What a cell of the report opens to: runs, settings, provenance, numbers, and what the model said to each query."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from benchmark.data import world
from benchmark.data.image import png_bytes
from benchmark.errors import BenchError
from benchmark.evaluate.pictures import open_pictures
from benchmark.evaluate.predictions import read_predictions
from benchmark.evaluate.statistics import TARGET_IMAGES
from benchmark.gallery import residual
from benchmark.report import plots
from benchmark.report.controls import CONTROLS, Controlled, kind_of_control
from benchmark.report.formatting import percent
from benchmark.report.records import Run
from benchmark.report.same_model import TOLD
from benchmark.report.series import Spent, charts, spent
from benchmark.report.tables import Group, interval_of, interval_of_entry, mean_of, per_run
from benchmark.report.targets import over_runs_and_targets
from benchmark.settings import digest

MOST_ROWS = 64
SHARES = ("acc1", "acc5", "recall", "asr", "share", "hit", "precision", "auroc", "frac", "rate")
_PARTS = {True: "trainings and what the defense did beside them", False: "trainings alone"}
_NUMBERS = (("ASR", "asr"), ("floor", "asr_floor"), ("zero-shot", "zero_shot_acc1"), ("linear probe", "linear_probe_acc1"))


class Sheet:
    """All images of a page, each once, as classes of its style sheet."""

    def __init__(self) -> None:
        self._names: dict[bytes, str] = {}

    def put(self, content: bytes) -> str:
        """The class that shows a PNG."""
        return self._names.setdefault(content, f"i{len(self._names)}")

    def css(self) -> str:
        """The style sheet."""
        return "".join(f".{name}{{background-image:url(data:image/png;base64,{base64.b64encode(content).decode()})}}\n" for content, name in self._names.items())


@dataclass(frozen=True)
class Pictures:
    """Pictures of a run's poison as they were kept beside the run, put on the page's sheet when they are shown."""

    found: Mapping[str, Any] | None
    sheet: Sheet

    @staticmethod
    def of(run: Run, sheet: Sheet) -> Pictures:
        """Those kept beside the run."""
        return Pictures(open_pictures(run.folder.parents[1], run.record) if len(run.folder.parents) > 1 else None, sheet)

    def shown(self, name: str | None) -> str:
        """The class that shows an image; empty without one."""
        if self.found is None or name is None:
            return ""
        folder: Path = self.found["folder"]
        return self.sheet.put((folder / name).read_bytes())

    def residual(self, before: str, after: str) -> tuple[str, float]:
        """What has changed between two of the images, as a class, and by how much it was multiplied."""
        assert self.found is not None
        images = [np.asarray(Image.open(self.found["folder"] / name).convert("RGB")) for name in (before, after)]
        changed, gain = residual(images[0], images[1])
        return self.sheet.put(png_bytes(changed)), gain


def names_of(card: Mapping[str, Any], pictures: Pictures) -> list[str]:
    """Class names behind a card, where a list of names has the card's hash; empty otherwise."""
    known = [list(world.OBJECTS), list(world.COLOURS), list(world.BACKGROUNDS)]
    known += list((pictures.found or {}).get("classes", {}).values())
    return next((names for names in known if digest(names)[:16] == card.get("classes")), [])


def cell(group: Group, number: int, pictures: Mapping[str, Pictures], controlled: Controlled) -> dict[str, Any]:
    """What the template needs of one cell."""
    first = group.runs[0].record
    lines = list(dict.fromkeys(line for run in group.runs for line in run.record["warnings"]))
    shown, took = charts(group), spent(group)
    return {
        "id": number,
        "attack": group.key[0],
        "defense": group.key[1],
        "told": TOLD.get(first["told"], ""),
        "place": f"Scale {group.key[2]}, {group.key[3]} pairs, {group.key[4]}.",
        "control": kind_of_control(group.key[2]),
        "facts": _facts(group, controlled),
        "warnings": lines,
        "charts": [{"svg": plots.curves(chart), "title": chart.title, "names": [curve.name for curve in chart.curves], "phases": chart.phases} for chart in shown],
        "curve_note": _curve_note(group, {chart.name for chart in shown}),
        "outcomes": _outcomes(group, pictures),
        "run_columns": [name for name, metric in _NUMBERS if any(run.values(metric) for run in group.runs)]
        + ["seconds, trainings alone" if took is not None and not took.whole else "seconds"],
        "runs": [_run(run, took) for run in group.runs],
        "hashes": _hashes(group),
        "settings": [(name, value) for name, value in flat(first["resolved"]) if name != "seed"],
        "counts": _counts(group),
        "numbers": _numbers(group),
        "not_run": sorted({(name, str(reason)) for run in group.runs for name, reason in run.record.get("not_run", {}).items()}),
    }


def flat(value: Any, path: str = "") -> list[tuple[str, str]]:
    """Leaves of nested settings as dotted names with JSON values."""
    if isinstance(value, Mapping) and value:
        return [leaf for name in sorted(value) for leaf in flat(value[name], f"{path}.{name}" if path else str(name))]
    return [(path, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))]


def shown_value(metric: str, value: float | None) -> str:
    """A value for people: percent for shares, three digits otherwise, empty for a missing one."""
    if value is None:
        return ""
    if any(part in metric for part in SHARES) and 0 <= value <= 1:
        return percent(value)
    return f"{value:.4g}"


def bracket(low: float | None, high: float | None) -> str:
    """A 95 % interval in percent, or nothing."""
    return "" if low is None or high is None else f"[{100 * low:.1f}, {100 * high:.1f}]"


def _facts(group: Group, controlled: Controlled) -> list[tuple[str, str, str]]:
    found = []
    for name, metric in (("ASR", "asr"), ("floor", "asr_floor"), ("true class kept", "triggered_acc1"), ("zero-shot", "zero_shot_acc1"), ("linear probe", "linear_probe_acc1")):
        value = mean_of([per_run(run, metric) for run in group.runs])
        if value is not None:
            interval = interval_of(group, metric)
            note = bracket(interval.low, interval.high)
            entries = group.runs[0].values(metric)
            units = f"n={entries[0]['n']} {entries[0]['units']} a run" if len(entries) == 1 else f"{len(entries)} sets or probes"
            found.append((name, percent(value), f"{note} {interval.kind}; {units}" if interval.kind != "missing" else units))
        if metric == "asr":
            found += [("ASR over runs and targets", bracket(one.low, one.high), f"{probe}: {one.kind}") for probe, one in over_runs_and_targets(group.runs).items()]
        if metric == "asr_floor":
            found += _control_facts(group, controlled)
    took, pairs = spent(group), mean_of([run.pairs for run in group.runs])
    if pairs is not None:
        found.append(("pairs trained", f"{pairs:,.0f}", f"mean over {len(group.runs)} {_runs(group.runs)}; pairs that only went forward count a third"))
    if took is not None:
        found.append(("seconds", f"{took.seconds:,.0f} s", f"{_PARTS[took.whole]}; they depend on the machine and on how busy it was"))
    return found


def _control_facts(group: Group, controlled: Controlled) -> list[tuple[str, str, str]]:
    values, seeds = controlled.values[id(group)], controlled.seeds[id(group)]
    return [
        (words, percent(values[name]), f"ASR without the attack's doing, over {seeds[name]} shared {'seed' if seeds[name] == 1 else 'seeds'}; row {group.key[2]}{suffix}")
        for name, (suffix, words) in CONTROLS.items()
        if values[name] is not None
    ]


def _curve_note(group: Group, shown: set[str]) -> str:
    if not any(point.get("metrics") for run in group.runs for point in run.record["curve"]):
        return "No snapshot of these runs was evaluated, so there are no curves."
    if "similarity" not in shown:
        return "These runs were made before the similarity of pairs and the nearest captions were measured."
    reasons: dict[str, set[str]] = {}
    for run in group.runs:
        for name in ("pool_goal_class", "pool_true_class"):
            if name in run.record.get("not_run", {}):
                reasons.setdefault(run.record["not_run"][name], set()).add(name)
    of = {1: " of the true class", 2: ""}
    return " ".join(f"Nearest captions{of[len(names)]} were not measured: {reason}." for reason, names in sorted(reasons.items()))


def _run(run: Run, took: Spent | None) -> dict[str, Any]:
    environment = run.environment
    git = environment.get("git") or {}
    version = environment.get("packages", {}).get("clip-poison-bench", "unknown")
    numbers = []
    for _, metric in _NUMBERS:
        entries = run.values(metric)
        if entries:
            value, n = per_run(run, metric), entries[0]["n"]
            count = f" ({round(value * n)}/{n})" if metric == "asr" and value is not None and len(entries) == 1 else ""
            numbers.append(percent(value) + count)
    own = None if run.train_seconds is None else run.train_seconds + ((run.beside_seconds or 0.0) if took is not None and took.whole else 0.0)
    return {
        "id": run.record["run_id"],
        "seed": run.seed,
        "numbers": [*numbers, f"{own:,.0f}" if own is not None else ""],
        "code": f"{version} {git.get('commit', 'no checkout')[:10]}{' with changes' if git.get('dirty') else ''}",
        "made": run.machine,
    }


def _hashes(group: Group) -> list[tuple[str, str]]:
    first = group.runs[0].record
    found = [("pairs", first["data"].get("content", "unknown")), ("evaluation sets", first["data"].get("suite", "unknown"))]
    found += [(f"{kind} code", first["resolved"][kind].get("source", "unknown")) for kind in ("attack", "defense")]
    found += [(f"poisoned manifest, seed {run.seed}", str(run.record["poison"].get("manifest_sha256", "unknown"))) for run in group.runs]
    return found


def _counts(group: Group) -> list[tuple[str, str]]:
    first = group.runs[0].record
    poison, used = first["poison"], first.get("clean_pairs_used")
    found = [("pairs trained on", f"{first['data']['n_pairs']:,}"), ("poisoned rows", f"{poison['n_poison']:,} of {poison.get('n_requested', poison['n_poison']):,} asked for")]
    found += [
        ("poison rate", f"{100 * poison['poison_rate']:.3g} %"),
        ("edits", str(poison.get("edit_mode", "unknown"))),
        ("clean pairs used", "unknown" if used is None else f"{used:,}"),
    ]
    costs = group.runs[0].cost
    found += [(name.replace("_", " "), f"{costs[name]:,}") for name in ("pairs_trained", "n_models_trained") if costs.get(name) is not None]
    found += [(name.replace("_", " "), f"{n:,}") for name, n in sorted((costs.get("passes") or {}).items())]
    if costs.get("peak_memory_bytes") is not None:
        found.append(("peak memory", f"{costs['peak_memory_bytes'] / 1e9:.2f} GB"))
    return found + [(name.replace("_", " "), str(value)) for name, value in first["data"].get("counts", {}).items()]


def _numbers(group: Group) -> list[dict[str, Any]]:
    rows = []
    for entry in group.runs[0].record["metrics"]:
        values = [next((one["value"] for one in run.values(entry["name"]) if one["of"] == entry["of"]), None) for run in group.runs]
        known = [value for value in values if value is not None]
        whole = len(known) == len(values)
        interval = ""
        if whole and entry["low"] is not None:
            found = interval_of_entry(entry, known)
            interval = bracket(found.low, found.high)
        value = shown_value(entry["name"], sum(known) / len(known) if whole and known else None)
        rows.append({"metric": entry["name"], "of": entry["of"], "value": value, "interval": interval, "n": f"{entry['n']:,} {entry['units']}", "card": entry["card"]})
    return rows


def _outcomes(group: Group, pictures: Mapping[str, Pictures]) -> list[dict[str, Any]]:
    """One part for each probe whose predictions are there: per target, or by true class with a few queries."""
    tables = {run.record["run_id"]: _attacks(run) for run in group.runs}
    probes = list(dict.fromkeys(name for found in tables.values() for name in found))
    parts = []
    for probe in probes:
        runs = [run for run in group.runs if probe in tables[run.record["run_id"]]]
        found = [tables[run.record["run_id"]][probe] for run in runs]
        if not {"query_id", "true", "goal", "counted", "pred", "rank_goal", "margin"} <= set(found[0].columns):
            parts += _retrieved(probe, runs, found)
            continue
        card: Mapping[str, Any] = next((card for card in runs[0].record["cards"].values() if _is_card_of(card, probe, runs[0])), {})
        names = _class_names(card, runs[0], pictures[runs[0].record["run_id"]])
        targets = card.get("queries") == "targets"
        parts.append(
            {
                "title": f"What the model said: {probe}",
                "note": _outcome_note(targets, found, TARGET_IMAGES if card.get("images_per_target", 1) > 1 else "targets"),
                "summary": None if targets else _by_class(found, names),
                "parts": [_part(run, table, probe, names, pictures[run.record["run_id"]], targets) for run, table in zip(runs if targets else runs[:1], found, strict=False)],
            }
        )
    return parts


def _attacks(run: Run) -> dict[str, pd.DataFrame]:
    try:
        found = read_predictions(run.folder)
    except (BenchError, OSError):
        return {}
    return {name.removeprefix("attack-"): table for name, table in found.items() if name.startswith("attack-")}


def _is_card_of(card: Mapping[str, Any], probe: str, run: Run) -> bool:
    hashes = {entry["card"] for entry in run.record["metrics"] if entry["of"] == probe and entry["name"] == "asr"}
    return digest(dict(card))[:16] in hashes


def _retrieved(probe: str, runs: Sequence[Run], found: Sequence[pd.DataFrame]) -> list[dict[str, Any]]:
    """What a retrieval put first for a few queries of each run; nothing for predictions of another form."""
    if not {"query_id", "counted", "first", "rank_goal"} <= set(found[0].columns):
        return []
    asked = [table[table["counted"] & ~table["floor"]] if "floor" in table else table[table["counted"]] for table in found]
    hits = sum(int((table["rank_goal"] <= 1).sum()) for table in asked)
    parts = []
    for run, table in zip(runs, asked, strict=True):
        rows = [
            {
                "image": "",
                "triggered": "",
                "true": row["query_id"],
                "goal": "an item of the goal",
                "said": row["first"],
                "hit": row["rank_goal"] <= 1,
                "rank": row["rank_goal"],
                "margin": "",
            }
            for row in table.head(MOST_ROWS // 4).to_dict("records")
        ]
        parts.append({"title": f"Seed {run.seed}: {len(rows)} of {len(table)} queries", "rows": rows, "pictures": False, "triggered": False})
    note = f"{hits} of {sum(map(len, asked))} queries found an item of the goal first, over {len(found)} {_runs(found)}."
    return [{"title": f"What the model found: {probe}", "note": note, "summary": None, "parts": parts}]


def _class_names(card: Mapping[str, Any], run: Run, pictures: Pictures) -> list[str]:
    """Names by class index; of data whose names are not at hand, those of the attack's targets."""
    names = names_of(card, pictures)
    if names:
        return names
    targets = {target["index"]: str(target["class"]) for target in run.record["poison"].get("targets", []) if "index" in target and "class" in target}
    return [targets.get(index, f"class {index}") for index in range(max(targets, default=-1) + 1)]


def _outcome_note(targets: bool, found: Sequence[pd.DataFrame], units: str) -> str:
    if targets:
        hits = sum(int((table["rank_goal"] <= 1)[table["counted"]].sum()) for table in found)
        return f"{hits} of {sum(int(table['counted'].sum()) for table in found)} {units} were read as the class the attack wants, over {len(found)} {_runs(found)}."
    left_out = int((~found[0]["counted"]).sum())
    return f"Counts over {len(found)} {_runs(found)}. {left_out} queries of each run show the goal itself and are left out."


def _runs(found: Sequence[Any]) -> str:
    return "run" if len(found) == 1 else "runs"


def _by_class(found: Sequence[pd.DataFrame], names: Sequence[str]) -> dict[str, Any]:
    table = pd.concat(found)
    table = table[table["counted"]]
    rows = []
    for label, part in table.groupby("true"):
        kept = int((part["rank_true"] == 1).sum()) if "rank_true" in part else 0
        rows.append([name_of(int(str(label)), names), len(part), int((part["rank_goal"] <= 1).sum()), kept, f"{part['rank_goal'].median():g}"])
    columns = [("true class", False), ("queries", True), ("read as the goal", True), ("read as the true class", True), ("median rank of the goal", True)]
    return {"columns": columns, "rows": rows}


def _part(run: Run, table: pd.DataFrame, probe: str, names: Sequence[str], pictures: Pictures, targets: bool) -> dict[str, Any]:
    kept = {} if pictures.found is None else {one["id"]: one for one in pictures.found["queries"].get(probe, [])}
    chosen = table[table["counted"]] if targets or not kept else table[table["query_id"].isin(list(kept))]
    if not targets and not kept:
        chosen = chosen.drop_duplicates("true").sort_values("true").head(6)
    rows = []
    for row in chosen.head(MOST_ROWS).to_dict("records"):
        images = kept.get(str(row["query_id"]), {})
        rows.append(
            {
                "image": pictures.shown(images.get("image")),
                "triggered": pictures.shown(images.get("triggered")),
                "true": name_of(int(row["true"]), names),
                "goal": name_of(int(row["goal"]), names),
                "said": name_of(int(row["pred"]), names),
                "hit": int(row["rank_goal"]) <= 1,
                "rank": int(row["rank_goal"]),
                "margin": f"{float(row['margin']):+.3f}",
            }
        )
    what = f"{len(rows)} targets" if targets else f"{len(rows)} queries, with the trigger"
    return {
        "title": f"Seed {run.seed}: {what}",
        "rows": rows,
        "pictures": any(row["image"] for row in rows),
        "triggered": any(row["triggered"] for row in rows),
    }


def name_of(index: int, names: Sequence[str]) -> str:
    """A class by name, or by number where the names are not known."""
    if index < 0:
        return "not known"
    return names[index] if index < len(names) else f"class {index}"
