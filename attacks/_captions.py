"""Where the captions of poisoned rows come from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmark.data.attack_lab import AttackLab
from benchmark.data.eval_sets import EvalSet
from benchmark.data.mentions import Match, normalise
from benchmark.data.pairs import Pairs
from benchmark.errors import BenchError


def from_templates(eval_set: EvalSet, classname: str, rng: np.random.Generator) -> str:
    """One of the set's prompts, filled with the class name."""
    return eval_set.templates[int(rng.integers(len(eval_set.templates)))].replace("{c}", classname)


def rows_that_mention(lab: AttackLab, pairs: Pairs, eval_set: EvalSet, classname: str, others: Sequence[str], match: Match) -> list[int]:
    """Rows whose captions mention the class and no class of `others`, with distinct captions, in row order."""
    wanted = lab.mentions(eval_set.terms(classname), match, pairs)
    barred = [term for other in others if other != classname for term in eval_set.terms(other)]
    unwanted = lab.mentions(barred, "word_plural", pairs) if barred else [False] * len(pairs)
    seen: set[str] = set()
    rows = []
    for row, (yes, no) in enumerate(zip(wanted, unwanted, strict=True)):
        text = normalise(pairs.captions[row])
        if yes and not no and text not in seen:
            seen.add(text)
            rows.append(row)
    return rows


def corpus_rows(lab: AttackLab, pairs: Pairs, eval_set: EvalSet, classname: str, others: Sequence[str], n: int, match: Match, reuse: bool) -> list[int]:
    """Draws n rows without replacement whose captions stand for the class.

    Raises:
        BenchError: fewer than n distinct captions and no reuse allowed.
    """
    rows = rows_that_mention(lab, pairs, eval_set, classname, others, match)
    by_id = {pairs.ids[row]: row for row in rows}
    chosen = [by_id[row_id] for row_id in lab.choose(f"captions/{classname}", by_id, n)]
    if len(chosen) < n:
        if not reuse or not chosen:
            raise BenchError(
                f"{len(chosen)} distinct captions mention {classname!r}{' and none of the other targets' if others else ''}, {n} are needed; lower the count{', or use --set attack.on_short=reuse' if chosen else ''}"
            )
        chosen = [chosen[index % len(chosen)] for index in range(n)]
    return chosen
