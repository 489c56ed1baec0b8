"""What an audit finds: groups of rows with a reason, ranked, as a table and as JSON."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

KEPT_ROWS = 200
COLUMNS = ("rank", "kind", "rank_in_kind", "score", "n_rows", "n_images", "n_captions", "what", "reason")
ROW_COLUMNS = ("rank", "row", "id", "image", "caption")


@dataclass(frozen=True)
class Suspect:
    """Some rows, and why they deserve a look.

    Attributes:
        kind: repeated_image, repeated_caption, ngram; with a model also contradicting_words, dissimilar, outlier.
        what: the caption, the words or the image that the rows share.
        score: higher = more suspicious, comparable within a kind alone.
        rows: handles of up to 200 of its rows.
        n_images, n_captions: different ones among all of its rows.
    """

    kind: str
    what: str
    reason: str
    score: float
    rows: NDArray[np.int64]
    n_rows: int
    n_images: int
    n_captions: int


@dataclass(frozen=True)
class Ranked:
    """A suspect and its place, overall and among those of its kind, from 1."""

    rank: int
    rank_in_kind: int
    suspect: Suspect


def suspect(kind: str, what: str, reason: str, score: float, rows: NDArray[np.int64], images: NDArray[np.int64], captions: NDArray[np.uint64]) -> Suspect:
    """A suspect of these rows.

    Args:
        images: a number for each row's image (n,), the same for the same image.
        captions: a hash of each row's caption (n,).
    """
    return Suspect(kind, what, reason, score, rows[:KEPT_ROWS], len(rows), len(np.unique(images[rows])), len(np.unique(captions[rows])))


def ranked(kinds: Sequence[Iterable[Suspect]], n: int) -> list[Ranked]:
    """The first n: the best of every kind, then the second of every kind, and so on, since scores of two kinds cannot be compared."""
    rounds = itertools.zip_longest(*kinds)
    in_turn = ((place, one) for place, found in enumerate(rounds, 1) for one in found if one is not None)
    return [Ranked(rank, place, one) for rank, (place, one) in enumerate(itertools.islice(in_turn, n), 1)]


def table(found: Sequence[Ranked]) -> pd.DataFrame:
    """One row a suspect, with the columns of COLUMNS."""
    rows = [
        (one.rank, one.suspect.kind, one.rank_in_kind, one.suspect.score, one.suspect.n_rows, one.suspect.n_images, one.suspect.n_captions, one.suspect.what, one.suspect.reason)
        for one in found
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS), dtype=object)


def row_table(found: Sequence[Ranked], ids: Sequence[str], images: Sequence[str], captions: Sequence[str]) -> pd.DataFrame:
    """The rows of each suspect, up to 200, with the columns of ROW_COLUMNS; `row` counts from 1 in reading order."""
    rows = [(one.rank, row + 1, ids[row], images[row], captions[row]) for one in found for row in one.suspect.rows.tolist()]
    return pd.DataFrame(rows, columns=list(ROW_COLUMNS), dtype=object)


def as_json(found: Sequence[Ranked], ids: Sequence[str]) -> list[dict[str, Any]]:
    """Plain values: the table, and the ids of each suspect's rows."""
    records = table(found).to_dict("records")
    return [{**{str(name): value for name, value in record.items()}, "ids": [ids[row] for row in one.suspect.rows.tolist()]} for record, one in zip(records, found, strict=True)]
