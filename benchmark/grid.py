"""A grid of cells from a TOML file: reference tables, recipes of published experiments, and what users write themselves."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from benchmark.errors import BenchError, nearest
from benchmark.matrix import Asked, Request, plan, takes


class Expected(BaseModel):
    """A published number beside which ours stands."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    attack: str
    defense: str
    metric: str
    value: float
    n: int | None = Field(None, description="Queries or targets behind it, where known: an interval can be had from it.")
    source: str
    sure: str = Field(description="How sure it is that this is the number of this very setting.")


@dataclass(frozen=True)
class Grid:
    """What a grid file asks for.

    Attributes:
        about: what the grid is, for people.
    """

    cells: list[Asked]
    expected: tuple[Expected, ...]
    about: str


_TOP = {"scale", "about", "needs", "set", "part", "expected"}
_PART = {"attacks", "defenses", "seeds", "set", "scale"}


def read_grid(path: Path, request: Request) -> Grid:
    """The cells of a TOML grid: tables `[[part]]` with attacks, defenses, seeds, set; above them `scale`, and `set` for all parts.

    Args:
        request: where data, evaluation sets and results lie, and how many cells run side by side.

    Raises:
        BenchError: no such file, no TOML, a key that does not exist, or cells that cannot be.
    """
    if not path.is_file():
        raise BenchError(f"no grid at {path}")
    try:
        grid = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BenchError(f"{path}: {error}") from None
    _check_keys(path, "the grid", grid, _TOP)
    parts = grid.get("part", [])
    if not isinstance(parts, list) or not parts or not all(isinstance(part, dict) for part in parts):
        raise BenchError(f"{path} has no [[part]]; each part has attacks, defenses, seeds and perhaps set")
    needs = " ".join(str(grid.get("needs", "")).split())
    if needs and request.data is None:
        raise BenchError(f"{path} wants data of yours. {needs}")
    requests = []
    for part in parts:
        _check_keys(path, "a [[part]]", part, _PART)
        for key in ("attacks", "defenses"):
            if key not in part:
                raise BenchError(f"{path}: a [[part]] has no {key}")
        asked = replace(
            request,
            attacks=_words(path, part, "attacks"),
            defenses=_words(path, part, "defenses"),
            seeds=_seeds(path, part.get("seeds", [0])),
            scale=part.get("scale", grid.get("scale", "small")),
            baseline=False,
            keep=path.parent,
        )
        requests.append((asked, _words(path, part, "set")))
    cells: list[Asked] = []
    for asked, own in requests:
        # What is set for the whole grid may concern some parts only: no other plugin has the option.
        above, given = (
            tuple(text for text in sets if takes(text, asked) or not any(takes(text, other) for other, _ in requests)) for sets in (_words(path, grid, "set"), request.sets)
        )
        cells += plan(replace(asked, sets=(*above, *own, *given)))
    try:
        expected = tuple(Expected(**entry) for entry in grid.get("expected", []))
    except (ValidationError, TypeError) as error:
        problem = str(error.errors()[0]["loc"][0]) + " " + error.errors()[0]["msg"].lower() if isinstance(error, ValidationError) else str(error)
        raise BenchError(f"{path}: [[expected]]: {problem}") from None
    return Grid(cells, expected, str(grid.get("about", "")).strip())


def _check_keys(path: Path, where: str, table: dict[str, Any], known: set[str]) -> None:
    for key in table:
        if key not in known:
            guess = nearest(key, known)
            raise BenchError(f"{path}: unknown key {key!r} in {where}.{f' Did you mean {guess!r}?' if guess else ''} Known keys: {', '.join(sorted(known))}")


def _words(path: Path, table: dict[str, Any], key: str) -> tuple[str, ...]:
    values = table.get(key, [])
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise BenchError(f'{path}: {key} must be a list of strings, for instance {key} = ["{"train.epochs=12" if key == "set" else "clip"}"]')
    return tuple(values)


def _seeds(path: Path, values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not values or not all(isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in values):
        raise BenchError(f"{path}: seeds must be a list of whole numbers from 0, got {values!r}")
    return tuple(values)
