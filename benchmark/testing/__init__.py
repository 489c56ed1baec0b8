"""The contract as tests: what `bench check` and our own tests run on every attack and every defense.

    from benchmark.testing import check_defense

    def test_my_defense_keeps_the_contract():
        check_defense(MyDefense)

Everything happens on 192 drawn pairs in a temporary folder. A plugin whose defaults do not fit them names options that do in
its class attribute `tiny`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from benchmark.contract import Attack, Defense, Options
from benchmark.errors import BenchError, nearest
from benchmark.registry import Kind, find, names
from benchmark.testing.attacks import attack_checks
from benchmark.testing.defenses import defense_checks
from benchmark.testing.expect import Check, ContractError, why_it_fails
from benchmark.testing.world import World

__all__ = ["ContractError", "World", "check_attack", "check_defense", "check_plugin"]


def check_attack(cls: type[Attack]) -> None:
    """Runs every check on an attack.

    Raises:
        ContractError: with one line for each check that failed.
    """
    _raise_all(cls, attack_checks(cls))


def check_defense(cls: type[Defense]) -> None:
    """Runs every check on a defense.

    Raises:
        ContractError: with one line for each check that failed.
    """
    _raise_all(cls, defense_checks(cls))


def check_plugin(file_or_name: str, say: Callable[[str], None]) -> list[str]:
    """Runs every check on a plugin, says one line a check, and returns those that failed.

    Raises:
        BenchError: no such file or name, or a file that cannot be imported or defines no plugin.
    """
    failures = []
    for kind, cls in _classes(file_or_name):
        say(f"{kind} {cls.__name__}")
        with _checks(kind, cls) as checks:
            for name, check in checks:
                reason = why_it_fails(check)
                say(f"ok {name}" if reason is None else f"FAILED {name}: {reason}")
                if reason is not None:
                    failures.append(f"{name}: {reason}")
    return failures


def _raise_all(cls: type[Options], checks: AbstractContextManager[list[Check]]) -> None:
    with checks as found:
        failures = [f"{name}: {reason}" for name, check in found if (reason := why_it_fails(check)) is not None]
    if failures:
        raise ContractError(f"{cls.__name__} does not keep the contract\n" + "\n".join(failures))


def _classes(file_or_name: str) -> list[tuple[Kind, type[Any]]]:
    kinds: tuple[Kind, Kind] = ("attack", "defense")
    if file_or_name.endswith(".py") or "/" in file_or_name:
        if not Path(file_or_name).is_file():
            raise BenchError(f"no plugin file at {file_or_name}")
        found, problems = [], []
        for kind in kinds:
            plugin = find(kind, file_or_name)
            try:
                found.append((kind, plugin.load()))
            except BenchError as error:
                if "must define exactly one" not in str(error):
                    raise
                problems.append((str(error), error))
        if not found:
            several = next((text for text, _ in problems if "found 0" not in text), None)
            raise BenchError(several or f"{file_or_name} defines neither an Attack nor a Defense; `bench new` writes one to start from")
        return found
    known = [kind for kind in kinds if file_or_name in names(kind)]
    if not known:
        guess = nearest(file_or_name, [*names("attack"), *names("defense")])
        raise BenchError(f"no attack or defense is named {file_or_name!r}.{f' Did you mean {guess!r}?' if guess else ''} `bench list` shows what there is.")
    return [(kind, find(kind, file_or_name).load()) for kind in known]


def _checks(kind: Kind, cls: type[Any]) -> AbstractContextManager[list[Check]]:
    return attack_checks(cls) if kind == "attack" else defense_checks(cls)
