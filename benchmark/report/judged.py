"""What defenses said of queries, predictions and models: tables beside the wide one, as plain text cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmark.evaluate.statistics import over_runs
from benchmark.report.controls import attack_names
from benchmark.report.records import Run
from benchmark.report.tables import Group, mean_of, shown_count


@dataclass(frozen=True)
class Section:
    """A table with a title above and what a reader must know below."""

    title: str
    header: tuple[str, ...]
    rows: list[list[str]]
    notes: list[str]


_QUERY_TITLE = "Queries judged at test time (positives: attacked queries; negatives: the same ones without the trigger, or test images for a targeted attack; F1 at the defense's own threshold):"
_QUERY = (
    "attack",
    "defense",
    "seeds",
    "probe",
    "AUROC",
    "AP",
    "base rate",
    "FPR at 95 % TPR",
    "F1",
    "attacked rejected",
    "clean rejected",
    "ASR",
    "ASR after rejection",
    "clean pairs used",
)
_CERTIFIED_TITLE = "Certified accuracy against the size e of the attack (share of queries predicted correctly with at least this radius; no certificate counts as wrong; sizes of different units cannot be compared):"
_AUDIT_TITLE = "Models audited (higher is more suspicious; the reference is the same audit of the same defense without an attack; with fewer than ten clean and ten poisoned models no more than the values can be said):"
_AUDIT = ("attack", "defense", "seeds", "score", "reference", "clean pairs used")
_SHOWN_SIZES = (0, 1, 2, 4, 8, 16, 32)


def sections(found: Sequence[Group]) -> list[Section]:
    """One section for each kind of judgement that these groups hold; none where there is none."""
    attacks = attack_names(found)
    return [section for section in (_queries(found, attacks), _certificates(found, attacks), _audits(found, attacks)) if section.rows]


def _queries(found: Sequence[Group], attacks: Mapping[int, str]) -> Section:
    rows = []
    for group in found:
        probes = _of(group, "query_auroc")
        main = _of(group, "query_clean_rejected")
        for probe in probes:
            numbers = [_number(group, name, probe) for name in ("query_auroc", "query_average_precision", "query_base_rate")]
            shares = [
                _share(group, "query_fpr_at_tpr_0.95", probe),
                _number(group, "query_f1_own", probe),
                _share(group, "query_tpr_own", probe),
                _share(group, "query_fpr_own", probe),
            ]
            attack = [_share(group, name, probe) for name in ("asr", "asr_after_rejection")]
            rows.append([*_names(group, attacks), probe, *numbers, *shares, *attack, _clean(group)])
        if main and not probes:
            rows.append([*_names(group, attacks), main[0], *[""] * 6, _share(group, "query_clean_rejected", main[0]), "", "", _clean(group)])
    return Section(_QUERY_TITLE, _QUERY, rows, [])


def _certificates(found: Sequence[Group], attacks: Mapping[int, str]) -> Section:
    sizes = [size for size in _SHOWN_SIZES if any(_of(group, f"certified_acc_{size}") for group in found)]
    header = ("attack", "defense", "seeds", "queries", "may be", "n", *(f"e = {size}" for size in sizes), "median radius", "not certified", "taken for the goal")
    rows, trusts = [], list[str]()
    for group in found:
        for of in _of(group, "certified_acc_0"):
            card = _card(group, "certified_acc_0", of)
            words = f"{group.key[1].partition('[')[0]}: trusts={card['trusts']}. {card['says'][0].upper()}{card['says'][1:]}. Labelled images: {card['n_support']}; models: {card['n_models']}."
            trusts += [] if words in trusts else [words]
            for metric, unit in (("certified_acc", card["unit"]), ("joint_certified_acc", f"{card['unit']}, one attack on all queries (bound on the average)")):
                if not _of(group, f"{metric}_0", of):
                    continue
                names = [*_names(group, attacks), f"{of.partition(':')[0]} ({card['queries']})", unit, str(_entry(group.runs[0], "certified_acc_0", of)["n"])]
                curve = [_share(group, f"{metric}_{size}", of, brackets=True) for size in sizes]
                rows.append([*names, *curve, _number(group, "certified_radius_median", of, "g"), _share(group, "certified_abstained", of), _share(group, "certified_asr", of)])
    return Section(_CERTIFIED_TITLE, header, rows, trusts)


def _audits(found: Sequence[Group], attacks: Mapping[int, str]) -> Section:
    rows = []
    for group in found:
        references = [one for one in found if one.key == ("none", *group.key[1:])]
        for of in _of(group, "audit_score"):
            reference = _number(references[0], "audit_score", of) if len(references) == 1 else ""
            missing = "several definitions" if len(references) > 1 else "not run: --attack none"
            rows.append([*_names(group, attacks), _number(group, "audit_score", of), reference or missing, _clean(group)])
    return Section(_AUDIT_TITLE, _AUDIT, rows, [])


def _of(group: Group, metric: str, only: str | None = None) -> list[str]:
    """What the first run has this metric of."""
    return [str(entry["of"]) for entry in group.runs[0].values(metric) if only in (None, entry["of"])]


def _entry(run: Run, metric: str, of: str) -> dict[str, Any]:
    return next((entry for entry in run.values(metric) if entry["of"] == of), {"value": None, "n": 0, "units": "queries", "card": ""})


def _card(group: Group, metric: str, of: str) -> dict[str, Any]:
    card: dict[str, Any] = group.runs[0].record["cards"][_entry(group.runs[0], metric, of)["card"]]
    return card


def _names(group: Group, attacks: Mapping[int, str]) -> list[str]:
    return [attacks[id(group)], group.key[1], str(len(group.runs))]


def _clean(group: Group) -> str:
    used = mean_of([run.record.get("clean_pairs_used") for run in group.runs])
    return "" if used is None else shown_count(used)


def _mean(group: Group, metric: str, of: str) -> float | None:
    return mean_of([_entry(run, metric, of)["value"] for run in group.runs])


def _number(group: Group, metric: str, of: str, form: str = ".3f") -> str:
    value = _mean(group, metric, of)
    return "" if value is None else f"{value:{form}}"


def _share(group: Group, metric: str, of: str, brackets: bool = False) -> str:
    value = _mean(group, metric, of)
    if value is None:
        return ""
    first = _entry(group.runs[0], metric, of)
    joint = metric.startswith("joint")
    interval = over_runs([_entry(run, metric, of)["value"] for run in group.runs], None if joint else first["n"], first["units"])
    known = brackets and interval.low is not None and interval.high is not None
    return f"{100 * value:.1f} %" + (f" [{100 * (interval.low or 0):.1f}, {100 * (interval.high or 0):.1f}]" if known else "")
