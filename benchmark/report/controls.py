"""Control runs: which they are, and their ASR beside the row that they are controls of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmark.report.records import Run
from benchmark.report.tables import Group, differences_of, mean_of, per_run

CONTROLS = {"asr_sham": ("+sham", "sham poison"), "asr_clean_model": ("+clean", "clean model")}
"""ASR without the attack's doing: what the scale of such runs ends in, and what people call it."""
_MADE_BY = ("seed", "sham", "clean_model")


@dataclass(frozen=True)
class Controlled:
    """Controls of the rows of a table.

    Attributes:
        values: for each row, by its `id`, the ASR of its controls as means over the seeds that both have, None where there is none.
        seeds: for each row and control, how many seeds those are.
        shown: names of the controls that at least one row has, in the order of CONTROLS.
        notes: a line for each control that was not used, saying why.
    """

    values: dict[int, dict[str, float | None]] = field(default_factory=dict)
    seeds: dict[int, dict[str, int]] = field(default_factory=dict)
    shown: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def is_control(run: Run) -> bool:
    """Whether a run trained on sham poison or on clean pairs: it says what the attack's own doing is worth and is no attacked run."""
    return run.label("scale").endswith(tuple(suffix for suffix, _ in CONTROLS.values()))


def kind_of_control(scale: str) -> str:
    """What the runs of a scale are, for people: sham poison, a clean model, or nothing special (empty)."""
    return next((words for suffix, words in CONTROLS.values() if scale.endswith(suffix)), "")


def attack_names(found: Sequence[Group]) -> dict[int, str]:
    """The attack of each row, by the row's `id`, for people: with the kind of control that it is and, where the rows have several scales, data
    sets or models, with its own of these.
    """
    places = {id(group): (_bare(group.key[2]), *group.key[3:]) for group in found}
    several = [len(set(values)) > 1 for values in zip(*places.values(), strict=True)]
    names = {}
    for group in found:
        words = [kind_of_control(group.key[2]), *(part for part, differs in zip(places[id(group)], several, strict=True) if differs)]
        inside = ", ".join(word for word in words if word)
        names[id(group)] = f"{group.key[0]} ({inside})" if inside else group.key[0]
    return names


def _bare(scale: str) -> str:
    """A scale without what marks it as that of a control."""
    return next((scale.removesuffix(suffix) for suffix, _ in CONTROLS.values() if scale.endswith(suffix)), scale)


def without_controls(runs: Sequence[Run]) -> list[Run]:
    """The runs that are attacked, or that no attack was made on: what defenses are compared, and spreads and doses taken over."""
    return [run for run in runs if not is_control(run)]


def controls(found: Sequence[Group]) -> Controlled:
    """The controls of each group: runs of its label and scale + `+sham` or `+clean` whose settings are the group's but for those two
    and the seed, and whose ASR refers to the same cards. Others are not used, and a note says what differs.
    """
    by_key: dict[tuple[str, ...], list[Group]] = {}
    for group in found:
        by_key.setdefault(group.key, []).append(group)
    result = Controlled()
    for group in found:
        attack, defense, scale, *rest = group.key
        values: dict[str, float | None] = dict.fromkeys(CONTROLS)
        counts = dict.fromkeys(CONTROLS, 0)
        for name, (suffix, words) in CONTROLS.items():
            candidates = by_key.get((attack, defense, scale + suffix, *rest), [])
            reasons = [_unfit(group, one) for one in candidates]
            fit = [one for one, reason in zip(candidates, reasons, strict=True) if not reason]
            if len(fit) == 1:
                seeds = {run.seed for run in group.runs}
                shared = [run for run in fit[0].runs if run.seed in seeds]
                values[name], counts[name] = mean_of([per_run(run, "asr") for run in shared]), len(shared)
            elif candidates:
                why = "several of its definition fit" if fit else f"they differ in {'; '.join(dict.fromkeys(reasons))}"
                result.notes.append(f"{attack} / {defense} ({scale}): the {words} is not shown beside it, {why}")
        result.values[id(group)], result.seeds[id(group)] = values, counts
    result.shown.extend(name for name in CONTROLS if any(one[name] is not None for one in result.values.values()))
    result.notes[:] = list(dict.fromkeys(result.notes))
    return result


def _unfit(group: Group, control: Group) -> str:
    """What keeps a group from being a control of another; empty if nothing does."""
    left, right = group.runs[0], control.runs[0]
    found = differences_of(left.record["resolved"], right.record["resolved"], _MADE_BY)
    cards = [{entry["of"]: entry["card"] for entry in run.values("asr")} for run in (left, right)]
    if cards[0] != cards[1]:
        found.append("what their ASR refers to")
    return ", ".join(found)
