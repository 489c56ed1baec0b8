"""Commands that check and compare what was recorded, and that plan what is worth recording."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmark.cli_options import (
    AS_FOUND,
    Cache,
    Data,
    EvalRoot,
    Evaluation,
    ImageRoot,
    Results,
    Templates,
    reads_data,
)
from benchmark.data.reading import Reading
from benchmark.errors import BenchError


def compare_command(
    first: Annotated[str, typer.Argument(help="A run id, the start of one, or a run's folder.")],
    second: Annotated[str, typer.Argument(help="Another.")],
    results: Results = Path("results"),
) -> None:
    """Say what differs between two recorded runs: in settings, in results, in single queries."""
    from benchmark.report.difference import differing, find_run

    typer.echo("\n".join(differing(find_run(first, results), find_run(second, results))))


@reads_data
def rerun_command(
    run: Annotated[str, typer.Argument(help="A run id, the start of one, or a run's folder.")],
    attack: Annotated[str | None, typer.Option(help="Path of the attack, if it was given by file.")] = None,
    defense: Annotated[str | None, typer.Option(help="Path of the defense, if it was given by file.")] = None,
    data: Data = None,
    evaluation: Evaluation = None,
    eval_root: EvalRoot = None,
    templates: Templates = "set",
    image_root: ImageRoot = None,
    reading: Reading = AS_FOUND,
    out: Annotated[Path, typer.Option(help="Where the new run and its cache go.")] = Path("rerun"),
    cache: Cache = None,
    results: Results = Path("results"),
) -> None:
    """Run a recorded run again from its own settings, and say whether the same record comes out. A run on data of your own wants them, read as they were."""
    from benchmark.progress import Progress
    from benchmark.report.difference import find_run
    from benchmark.request import Request
    from benchmark.rerun import rerun

    plugins = {kind: path for kind, path in (("attack", attack), ("defense", defense)) if path is not None}
    given = Request(
        data=data,
        eval=tuple(evaluation or ()),
        eval_root=eval_root,
        templates=templates,
        image_root=image_root,
        reading=reading,
        results=out,
        cache=cache,
    )
    again = rerun(find_run(run, results), given, Progress(), plugins)
    typer.echo("\n".join(again.lines))
    if not again.same:
        raise typer.Exit(1)


def plan_command(
    grid: Annotated[Path | None, typer.Argument(help="A grid; its seeds and targets are taken from it.")] = None,
    targets: Annotated[int | None, typer.Option(min=1, help="Targets (or other units) of one run.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Runs of each cell.")] = None,
    rates: Annotated[str | None, typer.Option(help="Two rates to tell apart, as 0.9375,0.125.")] = None,
    sd: Annotated[float | None, typer.Option(min=0, help="Standard deviation between runs. Default: of the runs in --results.")] = None,
    results: Results = Path("results"),
) -> None:
    """Say how sure a plan's numbers will be, and the smallest difference that it can show."""
    from benchmark.report.planner import planned

    if rates is not None:
        try:
            first, second = (float(rate) for rate in rates.split(","))
        except ValueError:
            raise BenchError(f"expected --rates with two fractions, as 0.9375,0.125, got {rates!r}") from None
        pair = (first, second)
    else:
        pair = None
    typer.echo("\n".join(planned(grid, targets, seeds, pair, sd, results)))


def verified(results: Path) -> None:
    """What `bench report --verify` prints; exit status 1 if anything differs."""
    from benchmark.report.verification import verify

    found = verify(results)
    typer.echo("\n".join(found.lines()))
    if found.problems:
        raise typer.Exit(1)
