"""What a record says of a defense's scores and of dropped rows, out of the saved table of poisoned rows alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from benchmark.evaluate.recompute import Recomputed


def of_rows(table: pd.DataFrame, metrics: list[dict[str, Any]]) -> dict[tuple[str, str], Recomputed]:
    """Values by metric and score; those that need the clean rows one by one are not among them.

    Args:
        table: as `detection.poisoned_rows` makes it.
        metrics: of the record, for the number of rows that were scored.
    """
    n_poison = len(table)
    found: dict[tuple[str, str], Recomputed] = {}
    if "kept" in table and n_poison:
        kept = int(table["kept"].sum())
        found["n_poison_kept", "filter"] = Recomputed(float(kept), n=n_poison, units="pairs")
        found["recall_dropped", "filter"] = Recomputed(1 - kept / n_poison, n=n_poison, units="pairs")
    for column in [column for column in table.columns if column.startswith("above_")]:
        name = column.removeprefix("above_")
        n = next((int(entry["n"]) for entry in metrics if (entry["name"], entry["of"]) == ("auroc", name)), 0)
        if n > n_poison:
            found |= {(metric, name): value for metric, value in _scored(table, name, n).items()}
    return found


def _scored(table: pd.DataFrame, name: str, n: int) -> dict[str, Recomputed]:
    n_poison, n_clean = len(table), n - len(table)
    above, level, order = (table[f"{what}_{name}"].to_numpy(np.int64) for what in ("above", "level", "order"))
    caught = np.array([(order <= one).sum() for one in order])  # poisoned rows at least as suspicious as each
    alarms = above + level
    first = np.unique(order, return_index=True)[1]
    gained = np.diff(caught[first], prepend=0) / n_poison
    needed = int(np.ceil(0.95 * n_poison))
    fpr, base_rate = alarms[caught >= needed].min() / n_clean, n_poison / n
    values = {
        "auroc": Recomputed(float(1 - (above + level / 2).mean() / n_clean), n=n, units="pairs"),
        "average_precision": Recomputed(float((gained * caught[first] / (caught + alarms)[first]).sum()), n=n, units="pairs"),
        "base_rate": Recomputed(base_rate, n=n, units="pairs"),
        "fpr_at_tpr_0.95": Recomputed(float(fpr), n=n_clean, units="pairs"),
        "precision_at_tpr_0.95": Recomputed(0.95 * base_rate / (0.95 * base_rate + fpr * (1 - base_rate)), n=n, units="pairs"),
    }
    if f"flagged_{name}" in table:
        values["tpr_own"] = Recomputed(float(table[f"flagged_{name}"].mean()), n=n_poison, units="pairs")
    return values
