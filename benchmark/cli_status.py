"""The command `bench status`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmark.cli_options import Data, EvalRoot, Evaluation, ImageRoot, Results, Sets, Templates


def status_command(
    grid: Annotated[Path | None, typer.Argument(help="A grid, as given to bench matrix. Default: whatever the results folder holds.")] = None,
    sets: Sets = None,
    data: Data = None,
    evaluation: Evaluation = None,
    eval_root: EvalRoot = None,
    templates: Templates = "set",
    image_root: ImageRoot = None,
    results: Results = Path("results"),
    jobs: Annotated[int | None, typer.Option(min=1, help="Cells side by side, for the time left. Default: as many as the cores or the GPU hold.")] = None,
) -> None:
    """What is done, running, failed (and why) and to do, and how long the rest takes."""
    from benchmark.request import Asked, Request
    from benchmark.status import report

    cells: list[Asked] = []
    if grid is not None:
        from benchmark.grid import read_grid

        request = Request(
            sets=tuple(sets or ()),
            data=data,
            eval=tuple(evaluation or ()),
            eval_root=eval_root,
            templates=templates,
            image_root=image_root,
            results=results,
            jobs=jobs,
        )
        cells = read_grid(grid, request).cells
    typer.echo("\n".join(report(cells, results)))
