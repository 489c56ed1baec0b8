"""The report as one HTML file that opens from disk: everything inline, nothing loaded, readable without scripts."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib import metadata, resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from benchmark.errors import BenchError
from benchmark.evaluate.pictures import gallery_key
from benchmark.report import plots
from benchmark.report.comparisons import Comparison, compare
from benchmark.report.controls import CONTROLS, Controlled, controls, is_control, kind_of_control
from benchmark.report.dose import DoseCurve, dose_curves
from benchmark.report.drill import Pictures, Sheet, bracket, cell, flat
from benchmark.report.formatting import percent
from benchmark.report.markdown import FLOOR_NOTE
from benchmark.report.records import Run
from benchmark.report.same_model import NOTE as SAME_MODEL_NOTE
from benchmark.report.same_model import plain_models, remark
from benchmark.report.series import BESIDE_NOTE, COLUMNS, METRICS, Panel, panels, spent, trades
from benchmark.report.tables import Group, groups, interval_of, place_of, shown_count
from benchmark.report.wide import wide_row

LINES_A_PLOT = 6
_LEGENDS = {
    "asr": (
        "0 %",
        "100 %",
        "The stronger the colour, the worse. Below each value its 95 % interval and the floor: the same goal without the trigger or, where there is none, of what was no target.",
    ),
    "zero_shot": ("0 %", "100 %", "The stronger the colour, the better. Mean over the evaluation sets."),
    "probe": ("0 %", "100 %", "The stronger the colour, the better. Mean over the evaluation sets."),
    "cost": (
        "0 s",
        "",
        "Trainings, charged in full where they came from the cache, and what the defense did beside them; trainings alone where a run of the cell does not tell the rest, as its tooltip says. Seconds depend on the machine and on how busy it was; pairs, below, do not.",
    ),
}
# Shares of a ramp's length from which white (in light) or black (in dark) is easier to read on it than the other; a test measures the contrast.
_PAST = {"asr": (0.82, 0.6), "zero_shot": (0.76, 0.58), "probe": (0.76, 0.58), "cost": (0.76, 0.52)}
_TABLE = (
    ("attack", False),
    ("defense", False),
    ("seeds", True),
    ("poisoned", True),
    ("ASR", True),
    ("floor", True),
    ("true class kept", True),
    ("zero-shot", True),
    ("linear probe", True),
    ("seconds", True),
    ("scale", False),
)
_PAST_FLOOR = [name for name, _ in _TABLE].index("floor") + 1
GLOSSARY = (
    (
        "ASR",
        "Share of attacked queries that are read as the class the attack wants, at rank 1. Queries that show this class are left out. For a targeted attack: share of targets.",
    ),
    ("floor", "How often the goal is met anyway. Backdoors: by the same queries without the trigger. Targets: by other test images; in retrieval, by other captions."),
    (
        "sham poison, clean model",
        "ASR of controls: after the attack's edits without its trigger, and of a model that trained on the pairs before the attack; over the seeds that both have. Their scale ends in +sham or +clean.",
    ),
    ("true class kept", "Share of attacked queries that are still read as what they show."),
    ("zero-shot, linear probe", "Accuracy on untouched test images, by prompts and by a linear probe on clean labelled images; means over the evaluation sets."),
    (
        "interval",
        "95 %. One run: Wilson over its queries or targets, which says nothing about another training run. Two runs: none. Three or more: t over runs, or Wilson where all agree.",
    ),
    ("+aug", "The run trains with image and text augmentation. What a defense adds to it is the difference to clip+aug."),
    (
        "seconds",
        "Of trainings and of what the defense did beside them; of trainings alone where the cell says so, because a run of it does not tell the rest. They depend on the machine and on how busy it was.",
    ),
    (
        "pairs trained",
        "Pairs that went forward and backward in all trainings, and a third of those that only went forward, where the run counted them. They depend on no machine.",
    ),
    ("told the rows, told the count", "A control that knows which rows are poisoned, or how many. Not a defense."),
    ("model of ...", SAME_MODEL_NOTE),
    ("similarity", "Mean cosine of image and caption over poisoned and over untouched training pairs, at each snapshot, without augmentation."),
    (
        "nearest caption",
        "For each poisoned image the nearest of a pool of 2 % of all captions, which the evaluator draws and which has this size whatever pool a defense has: whether it belongs to the image's true class, or to the attack's target class.",
    ),
    ("phase", "What the defense trained in an epoch. RoCLIP: clip, or match, when images meet captions out of its pool."),
    ("PSNR, SSIM", "How far the edited image is from the one before it, at full size. Higher is closer."),
)


def html(runs: Sequence[Run], notes: Sequence[str] = (), source: str = "records", title: str = "Poisoning attacks and defenses") -> str:
    """The page for these runs.

    Args:
        notes: lines that the reader should see, such as which records were left out.
        source: where the runs were read from.

    Raises:
        BenchError: no runs.
    """
    if not runs:
        raise BenchError("no runs to show")
    found, split = groups(runs)
    found = sorted(found, key=lambda group: place_of(group.key))
    numbers = {id(group): number for number, group in enumerate(found)}
    sheet = Sheet()
    pictures = _pictures(runs, sheet)
    controlled, plain = controls(found), plain_models(runs)
    shown = panels([group for group in found if not is_control(group.runs[0])])
    script = _text("page.js")
    lines = [*notes, *split, *controlled.notes, *_augmentation_note(found), *dict.fromkeys(line for run in runs for line in run.record["warnings"])]
    parts = {
        "panels": [_panel(panel, numbers) for panel in shown],
        "cells": [cell(group, numbers[id(group)], pictures, controlled) for group in found],
        "rows": [_row(group, numbers[id(group)], controlled, plain) for group in found],
        "doses": _doses(runs),
        "trades": _trades(shown),
        "differences": _differences(runs),
        "attacks": _attacks(found, pictures),
        "cards": [{"id": name, "facts": flat(card)} for name, card in sorted({name: card for run in runs for name, card in run.record["cards"].items()}.items())],
    }
    environment = Environment(loader=PackageLoader("benchmark.report", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template(
        "page.html"
    ).render(
        **parts,
        title=title,
        css=Markup(_text("page.css") + sheet.css()),  # a file of this package, and images in base64
        js=Markup(script),
        script_hash=f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}",
        dot=plots.mark,
        n_runs=len(runs),
        n_groups=len(found),
        floor_note=FLOOR_NOTE.replace("`", ""),
        metrics=[(name, label) for name, (label, _) in METRICS.items()],
        columns=[*_TABLE[:_PAST_FLOOR], *((CONTROLS[name][1], True) for name in controlled.shown), *_TABLE[_PAST_FLOOR:]],
        machines="; ".join(_machines(runs)),
        glossary=GLOSSARY,
        notes=lines or ["Nothing to note."],
        source=source,
        version=_version(),
    )


def _pictures(runs: Sequence[Run], sheet: Sheet) -> dict[str, Pictures]:
    """The pictures of each run, by its id; those of one poison are opened once."""
    by_poison: dict[tuple[str, str], Pictures] = {}
    found = {}
    for run in runs:
        where = (str(run.folder.parent), gallery_key(run.record))
        if where not in by_poison:
            by_poison[where] = Pictures.of(run, sheet)
        found[run.record["run_id"]] = by_poison[where]
    return found


def _text(name: str) -> str:
    return resources.files("benchmark.report").joinpath(name).read_text(encoding="utf-8")


def _version() -> str:
    try:
        return metadata.version("clip-poison-bench")
    except metadata.PackageNotFoundError:
        return "not installed"


def _augmentation_note(found: Sequence[Group]) -> list[str]:
    bare = {group.key[1].partition("[")[0] for group in found}
    if any(name.endswith("+aug") for name in bare) and "clip+aug" not in bare:
        return ["There is no clip+aug beside the augmented defenses, so what augmentation alone does cannot be seen here."]
    return []


def _panel(panel: Panel, numbers: Mapping[int, int]) -> dict[str, Any]:
    return {"title": f"{panel.scale}, {panel.dataset} pairs, {panel.model}", "defenses": panel.defenses, "maps": [_map(panel, name, numbers) for name in METRICS]}


def _map(panel: Panel, name: str, numbers: Mapping[int, int]) -> dict[str, Any]:
    label, value_of = METRICS[name]
    values = [value for members in panel.cells.values() for group in members if (value := value_of(group)) is not None]
    largest = 1.0 if name != "cost" else max(values, default=1.0) or 1.0
    rows = []
    for attack in panel.attacks:
        cells = []
        for defense in panel.defenses:
            members = panel.cells.get((attack, defense), [])
            cells.append({"links": [_link(group, name, value_of(group), largest, numbers[id(group)]) for group in members], "reason": "not run"})
        rows.append((attack, cells))
    low, high, note = _LEGENDS[name]
    return {"name": name, "label": label, "rows": rows, "low": low, "high": high or f"{largest:,.0f} s", "note": note}


def _link(group: Group, name: str, value: float | None, largest: float, number: int) -> dict[str, Any]:
    small = ""
    if name in COLUMNS:
        interval = interval_of(group, COLUMNS[name])
        small = bracket(interval.low, interval.high)
        text = percent(value) if value is not None else ("no attack" if name == "asr" else "missing")
        if name == "asr" and value is not None:
            small = f"{small} floor {percent(wide_row(group)['asr_floor'])}".strip()
        parts = ""
    else:
        text = f"{value:,.0f} s" if value is not None else "missing"
        took = spent(group)
        parts = ", trainings alone" if took is not None and not took.whole else ""
    runs = f"{len(group.runs)} {'run' if len(group.runs) == 1 else 'runs'}"
    share = round((value or 0) / largest, 3)
    past = " ".join(f"past-{theme}" for theme, limit in zip(("light", "dark"), _PAST[name], strict=True) if share > limit)
    return {"id": number, "text": text, "small": small, "share": share, "past": past, "title": f"{group.key[0]} × {group.key[1]}, {runs}{parts}: open"}


def _row(group: Group, number: int, controlled: Controlled, plain: Mapping[str, str]) -> dict[str, Any]:
    row = wide_row(group) | controlled.values[id(group)]
    intervals = {name: interval_of(group, name) for name in ("asr", "zero_shot_acc1", "linear_probe_acc1")}

    def share(name: str) -> dict[str, Any]:
        interval = intervals.get(name)
        return {"text": percent(row[name]), "small": bracket(interval.low, interval.high) if interval else "", "sort": _sort(row[name]), "numeric": True}

    def number_of(value: float | None, text: str) -> dict[str, Any]:
        return {"text": text if value is not None else "", "small": "", "sort": _sort(value), "numeric": True}

    asr = share("asr")
    if row["asr"] is not None and row["asr_n"]:
        asr["small"] = f"{asr['small']} n={row['asr_n']}".strip()
    texts = [
        {"text": text, "small": small, "sort": text, "numeric": False}
        for text, small in ((row["attack"], kind_of_control(row["scale"])), (row["defense"] + remark(group, plain), ""), (f"{row['scale']}, {row['dataset']}, {row['model']}", ""))
    ]
    poisoned = number_of(row["n_poison"], f"{shown_count(row['n_poison'])} of {row['n_pairs']:,}" if row["n_poison"] is not None else "")
    took = spent(group)
    seconds = number_of(took.seconds if took else None, f"{took.seconds:,.0f}" if took else "")
    cells = [
        *texts[:2],
        number_of(row["seeds"], str(row["seeds"])),
        poisoned,
        asr,
        *(share(name) for name in ("asr_floor", *controlled.shown, "triggered_acc1", "zero_shot_acc1", "linear_probe_acc1")),
    ]
    return {"id": number, "cells": [*cells, seconds, texts[2]]}


def _sort(value: float | None) -> str:
    return "" if value is None else f"{value:.9g}"


def _doses(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A plot for each attack that was run at several doses, a line for each defense."""
    try:
        found = dose_curves(runs)
    except BenchError:
        return []
    by_attack: dict[tuple[str, ...], list[DoseCurve]] = {}
    for curve in found:
        if any(point.n_poison > 0 for point in curve.points):
            by_attack.setdefault((curve.attack, curve.scale, curve.dataset, curve.model), []).append(curve)
    plotted = []
    for (attack, scale, dataset, model), lines in by_attack.items():
        for begin in range(0, len(lines), LINES_A_PLOT):
            part = lines[begin : begin + LINES_A_PLOT]
            names = [{"index": index, "name": line.defense, "note": _dose_note(line)} for index, line in enumerate(part)]
            plotted.append({"svg": plots.dose(part), "title": f"{attack}: {scale}, {dataset} pairs, {model}", "lines": names})
    return plotted


def _dose_note(line: DoseCurve) -> str:
    if line.fit is None or line.fit.n50 is None:
        return line.note
    low, high = (f"{value:.0f}" if value is not None else "?" for value in (line.fit.low, line.fit.high))
    return f"50 % at {line.fit.n50:.0f} rows [{low}, {high}]{'; ' + line.note if line.note else ''}"


def _differences(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Each defense against plain training with the same augmentation, over the seeds that both have; `names` end with the place."""
    rows: list[dict[str, Any]] = []
    for reference in ("clip", "clip+aug"):
        augmented = reference.endswith("+aug")
        others = [name for name in dict.fromkeys(run.label("defense") for run in runs) if name.partition("[")[0].endswith("+aug") == augmented and name != reference]
        found, _ = compare(runs, reference)
        by_pair: dict[tuple[str, ...], dict[str, Comparison]] = {}
        for one in found:
            if one.defense in others:
                by_pair.setdefault((one.attack, one.defense, one.scale, one.dataset, one.model), {})[one.metric] = one
        for (attack, defense, *place), metrics in by_pair.items():
            cells = [_points(metrics.get(name)) for name in ("asr", "zero_shot_acc1", "linear_probe_acc1")]
            seeds = max(one.n_runs for one in metrics.values())
            rows.append({"names": (attack, defense, reference, ", ".join(place)), "seeds": seeds, "cells": cells})
    if len({row["names"][-1] for row in rows}) <= 1:
        rows = [row | {"names": row["names"][:-1]} for row in rows]
    return rows


def _points(one: Comparison | None) -> dict[str, str]:
    """A difference in percentage points, its interval, and p after Holm's correction."""
    if one is None:
        return {"text": "", "small": "", "sort": ""}
    interval = f"[{100 * one.low:+.1f}, {100 * one.high:+.1f}]" if one.low is not None and one.high is not None else ""
    p = f"p {one.p_holm:.2g}" if one.p_holm is not None else ""
    return {"text": f"{100 * one.difference:+.1f}", "small": f"{interval} {p}".strip(), "sort": f"{one.difference:.9g}"}


def _trades(shown: Sequence[Panel]) -> list[dict[str, Any]]:
    plotted = []
    for panel in shown:
        for attack in panel.attacks:
            found = trades(panel, attack)
            if len(found) > 1:
                plotted.append(
                    {
                        "svg": plots.pareto(attack, found),
                        "title": f"{attack}: {panel.scale}, {panel.dataset} pairs, {panel.model}",
                        "note": BESIDE_NOTE if any(trade.beside for trade in found) else "",
                    }
                )
    return plotted


def _machines(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(run.machine for run in runs))


def _attacks(found: Sequence[Group], pictures: Mapping[str, Pictures]) -> list[dict[str, Any]]:
    """One part for each poisoning attack: its triggers, and a few of its edits as images and captions."""
    by_attack: dict[tuple[str, ...], list[Run]] = {}
    for group in found:
        if group.runs[0].record["poison"]["n_poison"]:
            by_attack.setdefault((group.key[0], *group.key[2:]), []).extend(group.runs)
    parts = []
    for (name, scale, dataset, model), runs in by_attack.items():
        run = next((one for one in runs if pictures[one.record["run_id"]].found is not None), runs[0])
        poison = run.record["poison"]
        shown = pictures[run.record["run_id"]]
        targets = list(dict.fromkeys(str(target.get("class")) for target in poison.get("targets", []) if target.get("class")))
        summary = f"{poison['n_poison']:,} of {run.record['data']['n_pairs']:,} pairs ({100 * poison['poison_rate']:.3g} %), {poison.get('edit_mode', 'edited')}"
        aims = f"; {'class' if len(targets) == 1 else 'classes'} wanted: {', '.join(targets[:20])}{' and more' if len(targets) > 20 else ''}" if targets else ""
        parts.append(
            {
                "name": f"{name} ({scale}, {dataset} pairs, {model}, seed {run.seed})",
                "summary": summary + aims + ".",
                "triggers": [", ".join(f"{key} {value}" for key, value in flat(spec) if value) for spec in (poison.get("triggers") or {}).values()],
                "edits": [] if shown.found is None else [_edit(edit, shown) for edit in shown.found["edits"]],
                "no_pictures": "No pictures were kept with these runs. bench report --pictures makes them again for drawn pairs.",
            }
        )
    return parts


def _edit(edit: Mapping[str, Any], shown: Pictures) -> dict[str, Any]:
    facts = [str(edit["role"]), str(edit["edit"]), *([f"for {edit['goal']}"] if edit["goal"] else [])]
    if edit["before"]:
        residual, gain = shown.residual(edit["before"], edit["after"])
        images = [(shown.shown(edit["before"]), "clean"), (shown.shown(edit["after"]), "poisoned"), (residual, f"residual x {gain:g}")]
        facts += [f"PSNR {edit['psnr']:.1f} dB", *([f"SSIM {edit['ssim']:.3f}"] if edit["ssim"] is not None else [])]
    else:
        images = [(shown.shown(edit["after"]), "as it is")]
        facts.append("image unchanged")
    changed = edit["caption_before"] and edit["caption_before"] != edit["caption_after"]
    before = edit["caption_before"] if changed else ""
    return {"images": images, "facts": ", ".join(facts), "before": before, "after": edit["caption_after"], "caption": "caption after" if changed else "caption"}
