"""What all checks share: how one fails, what it watches, and a plugin with options that fit."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmark.contract import Options
from benchmark.registry import Kind, Plugin, plugin_of
from benchmark.settings import SCALES


class ContractError(AssertionError):
    """A plugin that does not keep the contract, and how."""


Check = tuple[str, Callable[[], None]]


def why_it_fails(check: Callable[[], None]) -> str | None:
    """What a check says against the plugin, or None."""
    try:
        check()
    except ContractError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def expect(holds: bool, reason: str) -> None:
    """Raises ContractError with the reason unless it holds."""
    if not holds:
        raise ContractError(reason)


def instance(kind: Kind, cls: type[Any]) -> Any:
    """The plugin with options that fit 192 pairs: its own `tiny`, else the smoke scale's and a rate of 5 %."""
    plugin: Plugin = plugin_of(kind, cls)
    values: dict[str, Any] = dict(SCALES["smoke"].options.get(plugin.name, {}))
    rate = cls.model_fields.get("rate")
    if kind == "attack" and rate is not None and isinstance(rate.default, float) and rate.default > 0:
        values["rate"] = 0.05
    if "n_targets" in cls.model_fields:
        values |= {"n_targets": 2}
    if "captions_per_target" in cls.model_fields:
        values |= {"captions_per_target": 2}
    return cls(**{name: value for name, value in {**values, **cls.tiny}.items() if name in cls.model_fields or name in cls.tiny})


def check_described(cls: type[Options]) -> None:
    """The docstring names a source, and every option has a description."""
    expect("Source:" in (cls.__dict__.get("__doc__") or ""), "the docstring has no line `Source: authors, venue year, arXiv id`")
    bare = [name for name, field in cls.model_fields.items() if not field.description]
    expect(not bare, f"options without a description: {', '.join(bare)}")


def _global_state() -> tuple[Any, ...]:
    kind, keys, *rest = np.random.get_state(legacy=True)
    return random.getstate(), kind, np.asarray(keys).tobytes(), tuple(rest), torch.get_rng_state().numpy().tobytes()


def watched(run: Callable[[], Any]) -> tuple[Any, list[str]]:
    """What the call returns, and the global generators that it moved."""
    before = _global_state()
    result = run()
    after = _global_state()
    return result, [name for name, places in (("random", (0,)), ("numpy", (1, 2, 3)), ("torch", (4,))) if any(before[place] != after[place] for place in places)]


def expect_untouched(moved: list[str]) -> None:
    """No global generator may have moved."""
    expect(not moved, f"it draws from the global generator of {', '.join(moved)}; use lab.rng or the rng that a hook is given")
