"""Which targets or queries reached the goal, out of saved predictions, and the two-way bootstrap over runs and targets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmark.errors import BenchError
from benchmark.evaluate.bootstrap import MIN_RUNS, two_way
from benchmark.evaluate.predictions import read_predictions
from benchmark.evaluate.statistics import Interval
from benchmark.report.records import Run


def hits(run: Run) -> dict[str, dict[str, bool]]:
    """Success of each query that counts, by probe; controls and the queries of a retrieval's floor are none. Empty without predictions.

    Raises:
        BenchError: predictions that cannot be read.
    """
    found: dict[str, dict[str, bool]] = {}
    probes = {f"attack-{entry['of']}": str(entry["of"]) for entry in run.values("asr")}
    for name, table in read_predictions(run.folder).items() if run.folder.parts else ():
        if name in probes and "rank_goal" in table:
            counted = table[table["counted"] & ~table["floor"]] if "floor" in table else table[table["counted"]]
            found[probes[name]] = {str(query): bool(rank <= 1) for query, rank in zip(counted["query_id"], counted["rank_goal"], strict=True)}
    return found


def over_runs_and_targets(runs: Sequence[Run]) -> dict[str, Interval]:
    """The two-way bootstrap of the ASR of runs of one cell, by probe that counts targets.

    Targets that all runs share are resampled once for all of them, targets drawn with each seed within each run. Nothing for fewer
    than five runs or eight targets, nor where a run has no predictions.
    """
    probes = [str(entry["of"]) for entry in runs[0].values("asr") if entry["units"] == "targets"]
    if len(runs) < MIN_RUNS or not probes:
        return {}
    try:
        tables = [hits(run) for run in runs]
    except (BenchError, OSError):
        return {}
    found = {}
    for probe in probes:
        if all(probe in table for table in tables):
            crossed = len({frozenset(table[probe]) for table in tables}) == 1
            names = sorted(tables[0][probe])
            successes = [np.array([table[probe][name] for name in names] if crossed else list(table[probe].values()), dtype=bool) for table in tables]
            interval = two_way(successes, crossed)
            if interval.low is not None:
                found[probe] = interval
    return found
