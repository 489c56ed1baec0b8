"""A grid of cells from a TOML file: reference tables, recipes of published experiments, and what users write themselves."""

from __future__ import annotations

import itertools
import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from benchmark.errors import BenchError, nearest
from benchmark.request import SECTIONS, Asked, Request, parse_set, plan, takes


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


_TOP = {"scale", "about", "needs", "set", "order", "part", "expected"}
_PART = {"attacks", "defenses", "seeds", "set", "scale", "axes", "variants", "exclude", "sham", "clean_model"}
_ORDERS = ("parts", "seeds", "defenses")


def read_grid(path: Path, request: Request) -> Grid:
    """The cells of a TOML grid: tables `[[part]]` with attacks, defenses, seeds, set; above them `scale`, and `set` for all parts.

    A part runs once for each entry of `variants` (a list of lists like `set`) and for each combination of its `axes` (an
    option and its values), one seed of all of them before the next seed. `exclude` leaves cells out. `sham = true` and
    `clean_model = true` are the controls of that name (docs/metrics.md). With `order =
    "seeds"` the grid as a whole runs one seed of every part before the next seed, with `order = "defenses"` one defense, all
    its seeds, before the next.

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
    if grid.get("order", "parts") not in _ORDERS:
        raise BenchError(f"{path}: expected order = {' or '.join(map(repr, _ORDERS))}, got {grid['order']!r}")
    needs = " ".join(str(grid.get("needs", "")).split())
    if needs and request.data is None:
        raise BenchError(f"{path} wants data of yours. {needs}")
    requests = [_request(path, grid, part, request) for part in parts]
    above = _words(path, grid, "set")
    cells: list[Asked] = []
    for part, asked in zip(parts, requests, strict=True):
        # What is set for the whole grid may concern some parts only: no other plugin has the option.
        shared, given = (tuple(text for text in sets if takes(text, asked) or not any(takes(text, other) for other in requests)) for sets in (above, request.sets))
        cells += _cells(path, part, asked, (*shared, *_words(path, part, "set")), given)
    if grid.get("order") == "seeds":
        cells.sort(key=lambda cell: cell.seed)
    elif grid.get("order") == "defenses":
        first = list(dict.fromkeys(cell.defense for cell in cells))
        cells.sort(key=lambda cell: (first.index(cell.defense), cell.seed))
    try:
        expected = tuple(Expected(**entry) for entry in grid.get("expected", []))
    except (ValidationError, TypeError) as error:
        problem = str(error.errors()[0]["loc"][0]) + " " + error.errors()[0]["msg"].lower() if isinstance(error, ValidationError) else str(error)
        raise BenchError(f"{path}: [[expected]]: {problem}") from None
    return Grid(list(_distinct(cells)), expected, str(grid.get("about", "")).strip())


def _request(path: Path, grid: Mapping[str, Any], part: dict[str, Any], request: Request) -> Request:
    _check_keys(path, "a [[part]]", part, _PART)
    for key in ("attacks", "defenses"):
        if key not in part:
            raise BenchError(f"{path}: a [[part]] has no {key}")
    scale = part.get("scale", grid.get("scale", "small"))
    if not isinstance(scale, str):
        raise BenchError(f"{path}: scale must be the name of one, got {scale!r}")
    return replace(
        request,
        attacks=_words(path, part, "attacks"),
        defenses=_words(path, part, "defenses"),
        seeds=_seeds(path, part.get("seeds", [0])),
        scale=scale,
        baseline=False,
        keep=path.parent,
        sham=_yes(path, part, "sham"),
        clean_model=_yes(path, part, "clean_model"),
    )


def _cells(path: Path, part: dict[str, Any], asked: Request, sets: tuple[str, ...], given: tuple[str, ...]) -> list[Asked]:
    """The cells of one part; what the command line gives stands last and wins."""
    combinations = [(*variant, *axis) for variant in _variants(path, part) for axis in _combinations(path, part)]
    excluded = _excluded(path, part)
    seeds = [(seed,) for seed in asked.seeds] if len(combinations) > 1 else [asked.seeds]
    cells = [(cell, combination) for some in seeds for combination in combinations for cell in plan(replace(asked, seeds=some, sets=(*sets, *combination, *given)))]
    left_out = [[_matches(condition, cell, combination) for cell, combination in cells] for condition in excluded]
    for condition, found in zip(excluded, left_out, strict=True):
        if not any(found):
            raise BenchError(f"{path}: exclude {json.dumps(condition)} matches no cell of its [[part]]; names and values must be those of the part")
    return [cell for index, (cell, _) in enumerate(cells) if not any(found[index] for found in left_out)]


def _variants(path: Path, part: dict[str, Any]) -> list[tuple[str, ...]]:
    variants = part.get("variants", [[]])
    if not isinstance(variants, list) or not variants or not all(isinstance(one, list) for one in variants):
        raise BenchError(f'{path}: variants must be a list of lists, for instance variants = [["defense.every=3"], ["defense.every=1", "defense.first_matched_epoch=9"]]')
    return [_words(path, {"variants": one}, "variants") for one in variants]


def _combinations(path: Path, part: dict[str, Any]) -> list[tuple[str, ...]]:
    """Every combination of the axes' values, as options of `set`; the last axis runs fastest."""
    axes = part.get("axes", {})
    example = '[part.axes] with "attack.rate" = [0.0005, 0.001, 0.002] below it'
    if not isinstance(axes, dict):
        raise BenchError(f"{path}: axes must be a table of options and their values, for instance {example}")
    for option, values in axes.items():
        if not isinstance(values, list) or not values:
            raise BenchError(f"{path}: axis {option!r} must have a list of values, got {values!r}; for instance {example}")
        parse_set(f"{option}=0")
    return list(itertools.product(*([f"{option}={_text(value)}" for value in values] for option, values in axes.items())))


def _excluded(path: Path, part: dict[str, Any]) -> list[dict[str, Any]]:
    excluded = part.get("exclude", [])
    if not isinstance(excluded, list) or not all(isinstance(one, dict) and one for one in excluded):
        raise BenchError(f'{path}: exclude must be a list of tables, for instance exclude = [{{ defense = "clip", "attack.rate" = 0.01 }}]')
    return excluded


def _matches(condition: Mapping[str, Any], cell: Asked, combination: Sequence[str]) -> bool:
    """Whether a cell is what `exclude` names: attack, defense, seed, or an option of its variant or axes; a list names several values."""
    facts = {"attack": cell.attack, "defense": cell.defense, "seed": cell.seed} | {f"{section}.{option}": value for section, option, value in map(parse_set, combination)}
    return all(name in facts and facts[name] in (wanted if isinstance(wanted, list) else [wanted]) for name, wanted in condition.items())


def _distinct(cells: Iterable[Asked]) -> Iterable[Asked]:
    """The cells without repetitions: an axis that a plugin does not have gives one cell and not several."""
    seen = set()
    for cell in cells:
        sections = {f"{section}.{option}": value for section, option, value in map(parse_set, cell.request.sets) if section in SECTIONS}
        key = json.dumps(
            [cell.request.scale, cell.attack, cell.attack_options, cell.defense, cell.defense_options, cell.seed, cell.request.sham, cell.request.clean_model, sections],
            sort_keys=True,
            default=str,
        )
        if key not in seen:
            seen.add(key)
            yield cell


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


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


def _yes(path: Path, part: Mapping[str, Any], key: str) -> bool:
    value = part.get(key, False)
    if not isinstance(value, bool):
        raise BenchError(f"{path}: {key} must be true or false, got {value!r}")
    return value


def _seeds(path: Path, values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not values or not all(isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in values):
        raise BenchError(f"{path}: seeds must be a list of whole numbers from 0, got {values!r}")
    return tuple(values)
