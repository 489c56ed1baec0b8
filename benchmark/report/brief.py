"""The brief table: one row a defense and one column an attack, to pick a defense from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmark.report.controls import without_controls
from benchmark.report.formatting import bracket, count, escape, line, rate
from benchmark.report.records import Run
from benchmark.report.same_model import model_of, plain_models, remark
from benchmark.report.tables import Group, groups, interval_of, mean_of, per_run, place_of, shown_count
from benchmark.report.wide import clean_pairs

_Row = tuple[str, str]


def to_brief(runs: Sequence[Run]) -> str:
    """A Markdown table for each scale, data set and model: a defense's ASR on every attack, its accuracy, and what it takes.

    Controls of attacks (sham poison, clean models) have no column. Defenses that leave the model of `clip` as it is have no row: they are named below.
    """
    kept = without_controls(runs)
    found, notes = groups(kept)
    plain = plain_models(kept)
    places: dict[tuple[str, ...], list[Group]] = {}
    for group in sorted(found, key=lambda group: place_of(group.key)):
        places.setdefault(group.key[2:], []).append(group)
    lines = []
    for (scale, dataset, model), members in places.items():
        lines += [*_table(members, plain), "", f"Scale {escape(scale)}, {escape(dataset)} pairs, model {escape(model)}. {_about(members)}", ""]
        judges = sorted({f"`{group.key[1]}`" for group in members if model_of(group, plain)})
        if judges:
            lines += [f"Without a row, for they judge queries, predictions or a model and train as plain defenses do: {', '.join(judges)}.", ""]
    return "\n".join([*lines, *(f"- {escape(note)}" for note in notes)]).rstrip("\n") + "\n"


def _table(found: Sequence[Group], plain: Mapping[str, str]) -> list[str]:
    """Header and rows; what a control is told stands behind its name, and controls stand last."""
    cells: dict[_Row, dict[str, list[Group]]] = {}
    for group in found:
        if not model_of(group, plain):
            cells.setdefault((group.key[1], remark(group, plain)), {}).setdefault(group.key[0], []).append(group)
    attacks = _attacks(found)
    accuracy, costly = _quiet(found), _reference(attacks, cells)
    header = ("defense", *(f"{escape(attack)}: ASR, %" for attack in attacks), f"{escape(accuracy)}: zero-shot, %", "clean pairs", "cost", "runs a cell")
    rows = []
    for (defense, told), by_attack in sorted(cells.items(), key=lambda item: (bool(item[0][1]), place_of(next(iter(item[1].values()))[0].key)[-1])):
        members = [group for one in by_attack.values() for group in one]
        seeds = sorted({len(group.runs) for group in members})
        rows.append(
            line(
                [
                    escape(defense) + told,
                    *(_values(by_attack.get(attack, ()), "asr") for attack in attacks),
                    _values(by_attack.get(accuracy, ()), "zero_shot_acc1"),
                    count(max((pairs for group in members if (pairs := clean_pairs(group)) is not None), default=None)),
                    _cost(by_attack, costly),
                    shown_count(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}",
                ]
            )
        )
    return [line(header), "|" + "---|" * len(header), *rows]


def _attacks(found: Sequence[Group]) -> list[str]:
    """The attacks with an ASR, in the order of the rows."""
    return list(dict.fromkeys(group.key[0] for group in found if any(per_run(run, "asr") is not None for run in group.runs)))


def _quiet(found: Sequence[Group]) -> str:
    """The attack whose zero-shot accuracy is shown: none where it was run, or else the first."""
    return found[0].key[0]


def _reference(attacks: Sequence[str], cells: Mapping[_Row, Mapping[str, Sequence[Group]]]) -> dict[str, float]:
    """What `clip` took on each attack, in trained pairs."""
    taken = {attack: _pairs(by_attack.get(attack, ())) for (defense, _), by_attack in cells.items() if defense == "clip" for attack in (*attacks, "none")}
    return {attack: pairs for attack, pairs in taken.items() if pairs}


def _pairs(found: Sequence[Group]) -> float | None:
    return mean_of([run.pairs for group in found for run in group.runs])


def _cost(by_attack: Mapping[str, Sequence[Group]], reference: Mapping[str, float]) -> str:
    """Cost on the first attack that the defense shares with `clip`, as a multiple of what that took; empty where there is none."""
    for attack, found in by_attack.items():
        pairs = _pairs(found)
        if pairs is not None and attack in reference:
            return f"{pairs / reference[attack]:.2g} x"
    return ""


def _values(found: Sequence[Group], metric: str) -> str:
    """Mean and interval of a cell; those of runs that must not be averaged one after the other."""
    return "; ".join(f"{rate(value)}{bracket(interval_of(group, metric))}" for group in found if (value := mean_of([per_run(run, metric) for run in group.runs])) is not None)


def _about(found: Sequence[Group]) -> str:
    """What the numbers of a table are over."""
    several = "; ".join(f"{escape(attack)} {_range([group for group in found if group.key[0] == attack])}" for attack in _attacks(found))
    return (
        "Means over runs of other seeds; brackets are 95 % intervals: over the queries or targets of one run for one seed, none for two, over runs from three on (where all runs agree, over the targets of all). "
        "ASR is that after the last epoch. Cost is what went through the towers, and a third of that for what only went forward, as a multiple of what `clip` took. "
        "Clean pairs are the most that the defense was granted."
    ) + (
        f" Queries or targets of each run, and floors (the same without the trigger or, where there is none, by what was no target; means of single rows): {several}."
        if several
        else ""
    )


def _range(found: Sequence[Group]) -> str:
    counts = sorted({entry["n"] for group in found for run in group.runs for entry in run.values("asr")})
    floors = sorted(floor for group in found if (floor := mean_of([per_run(run, "asr_floor") for run in group.runs])) is not None)
    n = "" if not counts else f"n={counts[0]}" if len(counts) == 1 else f"n={counts[0]} to {counts[-1]}"
    return n + (f", floor {rate(floors[0])} to {rate(floors[-1])} %" if floors else "")
