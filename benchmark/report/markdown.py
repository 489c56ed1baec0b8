"""The wide table for people: percent with intervals and n, and below it what augmentation has no part in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from benchmark.report.comparisons import Comparison, compare
from benchmark.report.controls import CONTROLS, attack_names, controls
from benchmark.report.formatting import bracket, count, escape, line, percent
from benchmark.report.judged import sections
from benchmark.report.records import Run
from benchmark.report.same_model import NOTE as SAME_MODEL_NOTE
from benchmark.report.same_model import model_of, plain_models, remark
from benchmark.report.tables import Group, groups, interval_of, mean_of, per_run, place_of, shown_count, summaries
from benchmark.report.wide import clean_pairs, detected, detection_row, uses_clean_pairs, wide_row

FLOOR_NOTE = "The floor is how often the goal is met without the trigger or, where there is none, by what was no target. Where an interval reaches down to it, the mean over runs cannot be told apart from no attack; three runs give wide intervals, so look at single runs (`--format long`) too."
_CONTROLS_NOTE = "Sham poison is the ASR after the attack's edits without its trigger; clean model is that of a model which trained on the pairs before the attack. Both are means over the seeds that they share with the row; their intervals and n stand in their own rows, which are marked."
_COLUMNS = (
    "attack",
    "defense",
    "seeds",
    "poison",
    "ASR, last epoch",
    "last CLIP epoch",
    "last 2K epochs",
    "floor",
    "true class kept",
    "zero-shot",
    "linear probe",
    "pairs trained",
)
_PAST_FLOOR = _COLUMNS.index("floor") + 1


def to_markdown(runs: Sequence[Run]) -> str:
    """The wide table, the floor beside every ASR, then `+aug` defenses against `clip+aug`, then notes."""
    found, notes = groups(runs)
    found = sorted(found, key=lambda group: place_of(group.key))
    controlled = controls(found)
    shown = controlled.shown
    plain, attacks = plain_models(runs), attack_names(found)
    clean = uses_clean_pairs(found)
    header = (*_COLUMNS[:_PAST_FLOOR], *(CONTROLS[name][1] for name in shown), *_COLUMNS[_PAST_FLOOR:], *(["clean pairs used"] if clean else ()))
    lines = [line(header), "|" + "---|" * len(header)]
    for group in found:
        cells = _cells(group, attacks[id(group)], plain)
        lines.append(
            line([*cells[:_PAST_FLOOR], *(percent(controlled.values[id(group)][name]) for name in shown), *cells[_PAST_FLOOR:], *([count(clean_pairs(group))] if clean else ())])
        )
    scales = sorted({f"{group.key[2]}, {group.key[3]} pairs, {group.key[4]}" for group in found})
    lines += [
        "",
        f'Scale, data and model: {escape("; ".join(scales))}. Means over seeds; brackets are 95 % intervals: Wilson over the queries or targets of one run for one seed (a mean over several sets or probes has none), none for two, t over runs from three on and, where all runs agree, Wilson over all their targets, or over runs for queries. n is the number of queries or targets in each run. "Last CLIP epoch" and "last 2K epochs" are the ASR after the last epoch without matching, and its mean over the last two periods of K epochs (the last quarter of the epochs where there is no K). Zero-shot and linear probe are means over the evaluation sets. Pairs trained are those that went forward and backward, over all trainings. {FLOOR_NOTE}',
    ]
    if shown:
        lines += ["", _CONTROLS_NOTE]
    if any(model_of(group, plain) for group in found):
        lines += ["", SAME_MODEL_NOTE]
    lines += _detection(found, attacks, plain) + _judged(found) + _against_augmentation(runs, found)
    lines += [f"- {escape(note)}" for note in [*notes, *controlled.notes, *_processors(runs)]]
    for warning in dict.fromkeys(warning for run in runs for warning in run.record["warnings"]):
        lines.append(f"- {escape(warning)}")
    return "\n".join(lines) + "\n"


def _cells(group: Group, attack: str, plain: Mapping[str, str]) -> list[str]:
    row = wide_row(group)
    asr = "" if row["asr"] is None else f"{_with_interval(group, 'asr')}, n={row['asr_n']}"
    curves = [summaries(run) for run in group.runs]
    return [
        escape(attack),
        escape(group.key[1]) + remark(group, plain),
        str(row["seeds"]),
        f"{shown_count(row['n_poison'])} of {shown_count(row['n_pairs'])}" if row["n_poison"] else "0",
        asr,
        *(percent(mean_of([curve.get(name) for curve in curves])) for name in ("asr_last_clip", "asr_mean_last")),
        percent(row["asr_floor"]),
        percent(row["triggered_acc1"]),
        _with_interval(group, "zero_shot_acc1"),
        _with_interval(group, "linear_probe_acc1"),
        _pairs(row["pairs_trained"], row["n_models_trained"]),
    ]


def _pairs(pairs: float | None, models: float | None) -> str:
    return count(pairs) + (f", {models:g} models" if pairs is not None and models is not None and models > 1 else "")


def _with_interval(group: Group, metric: str) -> str:
    value = mean_of([per_run(run, metric) for run in group.runs])
    return percent(value) + bracket(interval_of(group, metric))


def _detection(found: Sequence[Group], attacks: Mapping[int, str], plain: Mapping[str, str]) -> list[str]:
    """How well scores tell poisoned rows, and what was dropped; nothing where no run says so."""
    shown = [group for group in found if detected(group)]
    if not shown:
        return []
    lines = [
        "",
        "Rows scored and dropped (positives: the poisoned rows, all rows ranked; AP of a random ranking is the base rate; F1 at the threshold that the defense chose itself; recall: share of the poison among the dropped):",
        "",
    ]
    header = ("attack", "defense", "score", "AUROC", "AP", "base rate", "FPR at 95 % TPR", "F1, own threshold", "rows dropped", "recall", "poison left", "clean rows lost")
    lines += [line(header), "|" + "---|" * len(header)]
    for group in shown:
        row = detection_row(group)
        numbers = ["" if row[name] is None else f"{row[name]:.{digits}}" for name, digits in (("auroc", "3f"), ("average_precision", "3f"), ("base_rate", "2g"))]
        numbers += [percent(row["fpr_at_tpr_0.95"]), "" if row["f1_own"] is None else f"{row['f1_own']:.2f}"]
        names = [escape(attacks[id(group)]), escape(group.key[1]) + remark(group, plain), escape(row["score"] or "")]
        lines.append(line([*names, *numbers, count(row["n_dropped"]), percent(row["recall_dropped"]), count(row["n_poison_kept"]), percent(row["clean_lost"])]))
    return lines


def _judged(found: Sequence[Group]) -> list[str]:
    """What defenses said of queries, predictions and models."""
    lines = []
    for section in sections(found):
        rows = [line([escape(cell) for cell in row]) for row in section.rows]
        notes = ["", *(f"- {escape(note)}" for note in section.notes)] if section.notes else []
        lines += ["", section.title, "", line(section.header), "|" + "---|" * len(section.header), *rows, *notes]
    return lines


def _against_augmentation(runs: Sequence[Run], found: Sequence[Group]) -> list[str]:
    """What a defense adds to augmentation alone: paired differences over shared seeds, beside how often crops show the trigger."""
    defenses = list(dict.fromkeys(group.key[1] for group in found if group.key[1].partition("[")[0].endswith("+aug")))
    others = [defense for defense in defenses if defense != "clip+aug"]
    if not others:
        return []
    if "clip+aug" not in defenses:
        return ["", "There is no `clip+aug` beside the augmented defenses, so what augmentation alone does cannot be seen here.", ""]
    # Corrected for all defenses that are compared, not for those shown alone, so that every table gives one p.
    compared, refused = compare(runs, "clip+aug")
    rows: dict[tuple[str, ...], dict[str, Comparison]] = {}
    for one in compared:
        rows.setdefault((one.attack, one.defense, one.scale, one.dataset, one.model), {})[one.metric] = one
    attacks = attack_names([group for group in found if group.key in rows])
    lines = []
    for group in sorted((group for group in found if group.key in rows and group.key[1] in others), key=lambda group: (*group.key[2:], others.index(group.key[1]))):
        by_metric = rows[group.key]
        visible = [value for run in group.runs if not _whole_image(run) and (value := per_run(run, "trigger_visible_share")) is not None]
        cells = [_difference(by_metric[name]) if name in by_metric else "" for name in ("asr", "zero_shot_acc1", "linear_probe_acc1")]
        lines.append(
            line([escape(attacks[id(group)]), escape(group.key[1]), str(max(one.n_runs for one in by_metric.values())), *cells, percent(mean_of(visible) if visible else None)])
        )
    notes = [f"- {escape(note)}" for note in refused]
    if not lines:
        return ["", "Nothing was compared with `clip+aug`:", "", *notes] if notes else []
    header = ("attack", "defense", "shared seeds", "ASR", "zero-shot", "linear probe", "crops that show the trigger whole")
    about = "Against `clip+aug` on the same poison, in points (95 % t intervals over shared seeds, from three on; * where p < .05 after Holm's correction for all defenses and attacks compared with it in that column):"
    return ["", about, "", line(header), "|" + "---|" * len(header), *lines, "", *notes]


def _processors(runs: Sequence[Run]) -> list[str]:
    """A note where the runs were made on more than one kind of processor or GPU."""
    kinds = Counter(kind for run in runs if (kind := run.hardware))
    if len(kinds) < 2:
        return []
    each = ", ".join(f"{n} on {name}" for name, n in sorted(kinds.items()))
    return [
        f"Made on more than one kind of processor ({each}). Each rounds sums in its own way and training amplifies that as another seed would, so a difference between rows of two kinds holds that too."
    ]


def _whole_image(run: Run) -> bool:
    """Whether the trigger is a blend over the whole image, of which every crop shows a part; older records have a share of whole ones all the same."""
    kinds = [str(spec.get("kind", "")) for spec in run.record["poison"].get("triggers", {}).values()]
    return bool(kinds) and all(kind.startswith("blend:") for kind in kinds)


def _difference(one: Comparison) -> str:
    interval = f" [{100 * one.low:+.1f}, {100 * one.high:+.1f}]" if one.low is not None and one.high is not None else ""
    return f"{100 * one.difference:+.1f}{interval}" + ("*" if one.p_holm is not None and one.p_holm < 0.05 else "")
