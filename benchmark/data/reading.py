"""How `--data` is read: the user's choices, and what becomes of rows that cannot be used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmark.errors import BenchError, unknown

TABLES = ("own", "open_clip", "cyclip")
SHARDS = ("webdataset", "img2dataset")
DIALECTS = (*TABLES, *SHARDS, "folder", "gcc")
QUOTING = ("minimal", "none")
_SHOWN = 9


@dataclass(frozen=True)
class Reading:
    """Choices about pairs that are read from files.

    Attributes:
        dialect: one of DIALECTS; None goes by the file's ending and its header.
        image_column, caption_column: columns of a table; None goes by the dialect.
        quoting: `minimal`, `none`, or None for minimal with a guard against stray quotes.
        allow_outside: image paths may be absolute or leave their folder.
        skip_broken: leave out rows that cannot be used and count them, instead of stopping.
        max_broken: the largest share of such rows that is left out.
    """

    dialect: str | None = None
    image_column: str | None = None
    caption_column: str | None = None
    quoting: str | None = None
    allow_outside: bool = False
    skip_broken: bool = False
    max_broken: float = 0.001

    @property
    def facts(self) -> dict[str, str]:
        """The choices that change which pairs the same files give; empty for the defaults."""
        named = {"dialect": self.dialect, "image_column": self.image_column, "caption_column": self.caption_column, "quoting": self.quoting}
        return {name: value for name, value in named.items() if value is not None}


def check_reading(reading: Reading, given: bool) -> None:
    """Refuses choices that do not exist, and choices about data that are not given.

    Args:
        given: whether there is a `--data` that they can be about.

    Raises:
        BenchError: names the option.
    """
    if not given and reading != Reading():
        changed = next(name for name in vars(reading) if getattr(reading, name) != getattr(Reading(), name))
        raise BenchError(f"--{changed.replace('_', '-')} needs --data: it says how your own pairs are read")
    if reading.dialect is not None and reading.dialect not in DIALECTS:
        raise unknown("dialect", reading.dialect, DIALECTS)
    if reading.quoting is not None and reading.quoting not in QUOTING:
        raise unknown("quoting", reading.quoting, QUOTING)
    if not 0 <= reading.max_broken < 1:
        raise BenchError(f"expected --max-broken in [0, 1), got {reading.max_broken}. It is a share: 1 % is 0.01")


@dataclass
class Findings:
    """Rows of one data set that cannot be used, by kind.

    Attributes:
        where: the file or folder, as messages name it.
        counts: number of such rows by kind.
        skipped: `row` and sentence of each row left out, the first few thousand of every kind.
    """

    where: str
    reading: Reading
    counts: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    _remedies: dict[str, str] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """All such rows."""
        return sum(self.counts.values())

    def add(self, kind: str, row: int | str, problem: str, remedy: str = "", n: int = 1) -> None:
        """Notes that a row (its number from 1, or its shard and key) cannot be used; `settle` says what becomes of it."""
        self.counts[kind] = self.counts.get(kind, 0) + n
        self._remedies.setdefault(kind, remedy)
        kept = self.skipped.setdefault(kind, [])
        if len(kept) < 5000:
            kept.append((str(row), problem))

    def settle(self, n_rows: int, n_before: int = 0) -> None:
        """Goes on if nothing was found, or if it may be left out.

        Args:
            n_rows: all rows, those found included.
            n_before: rows among them that were left out earlier, and count for the share.

        Raises:
            BenchError: names the first row of the first kind and how many more there are.
        """
        if not self.counts:
            return
        kind = next(iter(self.counts))
        (row, problem), *others = self.skipped[kind]
        n_more = self.counts[kind] - 1
        more = f", and {n_more} more rows ({_listed([name for name, _ in others], n_more)})" if others else f", and {n_more} more" if n_more else ""
        sentence = f"{self.where} {_named(row)}: {problem}{more}{self._remedies.get(kind, '')}"
        if not self.reading.skip_broken:
            raise BenchError(f"{sentence}. --skip-broken leaves such rows out and counts them")
        n = self.n + n_before
        if n > self.reading.max_broken * n_rows:
            raise BenchError(f"{n} of {n_rows} rows cannot be used, which is more than the share of {self.reading.max_broken:g} that --max-broken allows. First: {sentence}")

    def as_counts(self) -> dict[str, int]:
        """For the record."""
        return {f"skipped_{kind}": n for kind, n in self.counts.items()}

    def warnings(self) -> list[str]:
        """A sentence for each kind."""
        return [f"skipped {n} {kind.replace('_', ' ')} ({_listed([_named(row) for row, _ in self.skipped[kind]], n)})" for kind, n in self.counts.items()]


def _named(row: str) -> str:
    return f"row {row}" if row.isdigit() else row


def _listed(names: Sequence[str], n: int) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if n > _SHOWN else "")
