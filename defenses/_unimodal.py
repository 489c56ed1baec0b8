"""Losses within one modality: a view against another view of its row, or against that view's neighbour in a bank."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmark.contract import Rewrite
from benchmark.train.eda import Eda
from benchmark.train.loop import Now
from benchmark.train.loss import contrastive
from benchmark.train.views import as_it_is
from defenses._pool import Wrap, enqueue, nearest

BankInit = Literal["empty", "noise_unit", "noise_raw"]


def against(view: Tensor, columns: Tensor, scale: Tensor, symmetric: bool = False) -> Tensor:
    """Cross-entropy of scaled cosines between views (b, d) and columns (b, d), row i belonging to column i.

    Of one direction, each view among the columns; `symmetric` takes the mean of both.
    """
    if symmetric:
        return contrastive(view, columns, scale)
    return functional.cross_entropy(scale * view @ columns.T, torch.arange(len(view), device=view.device))


def open_bank(state: dict[str, Any], name: str, size: int, width: int, init: BankInit, now: Now, device: torch.device) -> None:
    """Puts a bank of `size` features into the state, unless it is there."""
    if f"{name}_bank" in state:
        return
    bank = torch.zeros(size, width) if init == "empty" else torch.randn(size, width, generator=now.generator(f"{name}_bank"))
    bank = functional.normalize(bank, dim=-1) if init == "noise_unit" else bank
    state.update({f"{name}_bank": bank.to(device), f"{name}_pointer": 0, f"{name}_count": 0})


def neighbours(state: dict[str, Any], name: str, features: Tensor, wrap: Wrap, while_filling: bool) -> tuple[Tensor, Tensor]:
    """The bank's nearest entries (b, d) to detached features (b, d), and the share of them that nothing was written to.

    The bank is searched before the features are put into it, so that a row cannot find itself. While it is filling,
    and unless `while_filling`, the features themselves come back.
    """
    bank, count = state[f"{name}_bank"], state[f"{name}_count"]
    found, unwritten = features, torch.zeros((), device=features.device)
    if while_filling or count >= len(bank):
        chosen = nearest(features, bank)
        found, unwritten = bank[chosen], (chosen >= count).float().mean()
    state[f"{name}_pointer"] = enqueue(bank, state[f"{name}_pointer"], features, wrap)
    state[f"{name}_count"] = min(count + len(features), len(bank))
    return found, unwritten


def text_views(text: str, rng: np.random.Generator, rewrite: Rewrite) -> list[str]:
    """Two views of a caption under `+aug`, each as the run rewrites texts; otherwise the caption and two views behind it.

    Those swap two words or leave some out: synonyms belong to the run's augmentation.
    """
    if rewrite is as_it_is:
        return [text, *(Eda(None).rewrite(text, rng) for _ in range(2))]
    return [rewrite(text, rng) for _ in range(2)]
