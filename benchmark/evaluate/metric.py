"""One measured number, with its denominator and the card that says what it refers to."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from benchmark.evaluate.statistics import TARGET_IMAGES, wilson


@dataclass(frozen=True)
class Metric:
    """A value over n units.

    Attributes:
        name: column name.
        of: evaluation set or probe it was measured on.
        units: what n counts: queries, targets, images of targets, pairs.
        low, high: Wilson over the units of this one training run, for rates over units; else None.
    """

    name: str
    of: str
    value: float | None
    n: int
    units: str = "queries"
    low: float | None = None
    high: float | None = None
    card: str = ""

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def rate(name: str, of: str, successes: int, n: int, card: str, units: str = "queries") -> Metric:
    """A share of n units; its interval says how sure it is for this one model, not for the method. Images of targets have none."""
    if n == 0:
        return Metric(name, of, None, 0, units, card=card)
    low, high = (None, None) if units == TARGET_IMAGES else wilson(successes, n)
    return Metric(name, of, successes / n, n, units, low, high, card)
