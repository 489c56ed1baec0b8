"""A benchmark of poisoning attacks on CLIP pre-training, and of defenses against them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

__version__ = "0.1.0"
__all__ = ["__version__", "load_results", "run"]


def run(
    attack: str = "backdoor", defense: str = "roclip", *, scale: str = "small", seed: int = 0, sets: tuple[str, ...] = (), results: str | Path = "results", **more: Any
) -> dict[str, Any]:
    """Runs one cell and returns its record; a finished one is read.

    Args:
        attack, defense: a name or a path; a defense may end in `+aug`.
        sets: options as `section.option=value`, as on the command line.
        more: `data`, `eval` (one set or several), `cache`, `device`, `sham` ... of `benchmark.request.Request`.

    Raises:
        BenchError: a bad request, in one sentence.
        PluginError: an exception in a plugin's own code.
    """
    from benchmark.cell import run_cell
    from benchmark.matrix import open_cell
    from benchmark.progress import Progress
    from benchmark.request import Request, plan

    progress = Progress()
    paths: dict[str, Any] = {name: Path(value) if name in ("data", "cache", "image_root", "eval_root") else value for name, value in more.items()}
    if "eval" in paths:
        paths["eval"] = (str(paths["eval"]),) if isinstance(paths["eval"], str | Path) else tuple(map(str, paths["eval"]))
    request = Request((attack,), (defense,), (seed,), scale, tuple(sets), results=Path(results), baseline=False, **paths)
    return run_cell(open_cell(plan(request)[0], progress))


def load_results(results: str | Path = "results") -> pd.DataFrame:
    """All recorded runs as a long table: one row per run and metric."""
    from benchmark.report.records import load
    from benchmark.report.tables import long_table

    return long_table(load(Path(results)))
