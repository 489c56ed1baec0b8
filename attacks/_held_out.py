"""Which held-out images stand for a class, or do not show it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from benchmark.data.attack_lab import AttackLab
from benchmark.data.eval_sets import EvalSet
from benchmark.data.mentions import matcher, mentions, normalise
from benchmark.data.pairs import Pairs
from benchmark.errors import BenchError


def true_class(pairs: Pairs, row: int, eval_set: EvalSet) -> int:
    """Class index by the row's own tag, or -1 where the data has no tags."""
    for values in pairs.tags.values():
        if values[row] in eval_set.classnames:
            return eval_set.classnames.index(values[row])
    return -1


def innocent_image(lab: AttackLab, texts: Sequence[str], eval_set: EvalSet, classname: str, taken: Collection[str], purpose: str) -> int:
    """Draws a held-out row that neither shows nor mentions the class.

    Args:
        texts: the held-out captions, normalised.
        taken: ids that are used already.

    Raises:
        BenchError: no such row is left.
    """
    held_out = lab.held_out
    pattern = matcher(eval_set.terms(classname), "word_plural")
    goal = eval_set.index(classname)
    by_id = {held_out.ids[row]: row for row in lab.unseen if held_out.ids[row] not in taken and not pattern.search(texts[row]) and true_class(held_out, row, eval_set) != goal}
    if not by_id:
        raise BenchError(f"no held-out image is left for target {classname!r}: all {len(lab.unseen)} are taken or show or mention it")
    return by_id[lab.choose(purpose, by_id, 1)[0]]


def images_of(lab: AttackLab, eval_set: EvalSet, classname: str, n: int) -> list[int]:
    """Draws n held-out rows of the class: by tag, else by a caption that mentions it.

    Raises:
        BenchError: fewer than n such rows.
    """
    held_out, goal = lab.held_out, eval_set.index(classname)
    shows = rows_of(held_out, eval_set, goal)
    by_id = {held_out.ids[row]: row for row in lab.unseen if shows[row]}
    if len(by_id) < n:
        raise BenchError(f"{len(by_id)} held-out images show {classname!r}, {n} are needed; bring more held-out pairs, or choose another class")
    return [by_id[row_id] for row_id in lab.choose(f"images/{classname}", by_id, n)]


def rows_of(pairs: Pairs, eval_set: EvalSet, index: int) -> list[bool]:
    """Which pairs are of the class: by tag where the data has tags, else by a caption that mentions it and no other class."""
    for values in pairs.tags.values():
        if not set(values).isdisjoint(eval_set.classnames):
            return [value == eval_set.classnames[index] for value in values]
    classname = eval_set.classnames[index]
    mine = mentions(pairs.captions, eval_set.terms(classname), "word")
    others = matcher([term for other in eval_set.classnames if other != classname for term in eval_set.terms(other)], "word_plural")
    return [yes and not others.search(normalise(caption)) for yes, caption in zip(mine, pairs.captions, strict=True)]
