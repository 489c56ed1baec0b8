"""The command line: arguments in, one call out. Heavy imports live inside commands."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmark.cli_audit import audit_command
from benchmark.cli_data import diff_command, export_command, poison_command, verify_command
from benchmark.cli_eval import eval_command
from benchmark.cli_evidence import compare_command, plan_command, rerun_command
from benchmark.cli_options import (
    AS_FOUND,
    Cache,
    Data,
    EvalRoot,
    Evaluation,
    ImageRoot,
    Results,
    Sets,
    Templates,
    check_device,
    reads_data,
)
from benchmark.cli_report import report_command
from benchmark.cli_status import status_command
from benchmark.data.reading import Reading
from benchmark.errors import BenchError, PluginError

app = typer.Typer(
    name="bench",
    help="Poison image-caption pairs, train CLIP defenses on them, and measure attack success, zero-shot and linear-probe accuracy.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command("run")
@reads_data
def run_command(
    attack: Annotated[list[str] | None, typer.Option(help="Attack by name or file; repeatable; `all`. Default: backdoor.")] = None,
    defense: Annotated[list[str] | None, typer.Option(help="Defense by name or file, with +aug for augmentation; repeatable; `all`. Default: roclip.")] = None,
    scale: Annotated[str, typer.Option(help="smoke, small, medium or paper.")] = "small",
    seed: Annotated[int | None, typer.Option(min=0, help="One seed.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Several, as 0,1,2 or 0-4.")] = None,
    sets: Sets = None,
    data: Data = None,
    evaluation: Evaluation = None,
    eval_root: EvalRoot = None,
    templates: Templates = "set",
    image_root: ImageRoot = None,
    reading: Reading = AS_FOUND,
    results: Results = Path("results"),
    cache: Cache = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Cells side by side. Default: as many as the cores or the GPU hold.")] = None,
    baseline: Annotated[bool, typer.Option(help="Run clip (and clip+aug) on the same poison beside the defense.")] = True,
    sham: Annotated[bool, typer.Option(help="The attack's edits without its trigger: what re-encoding and captions do alone.")] = False,
    clean_model: Annotated[
        bool,
        typer.Option(
            "--clean-model", help="Train on the pairs before the attack, and measure what the attack asks for: whether its trigger or targets look like the goal by themselves."
        ),
    ] = False,
    keep_snapshots: Annotated[bool, typer.Option(help="Keep the weights of every epoch.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda if there is one.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Say what would run, what is done already, and how long it takes.")] = False,
) -> None:
    """Poison, train, evaluate: one cell, or every combination of what is repeated."""
    from benchmark.registry import check_names

    check_names("attack", attack or ())  # before settings are imported, for a typing error wants a quick answer
    check_names("defense", defense or ())
    from benchmark.request import Request, plan

    request = Request(
        attacks=tuple(attack or ("backdoor",)),
        defenses=tuple(defense or ("roclip",)),
        seeds=_seeds(seed, seeds),
        scale=scale,
        sets=tuple(sets or ()),
        data=data,
        eval=tuple(evaluation or ()),
        eval_root=eval_root,
        templates=templates,
        image_root=image_root,
        reading=reading,
        results=results,
        cache=cache,
        jobs=jobs,
        baseline=baseline,
        keep_snapshots=keep_snapshots,
        sham=sham,
        clean_model=clean_model,
        device=device,
    )
    check_device(device)
    cells = plan(request)
    _run_cells(cells, dry_run, f"bench report --results {results}")


@app.command("matrix")
@reads_data
def matrix_command(
    grid: Annotated[Path, typer.Argument(help="A TOML file with [[part]] tables: attacks, defenses, seeds, set.")],
    sets: Sets = None,
    data: Data = None,
    evaluation: Evaluation = None,
    eval_root: EvalRoot = None,
    templates: Templates = "set",
    image_root: ImageRoot = None,
    reading: Reading = AS_FOUND,
    results: Results = Path("results"),
    cache: Cache = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Cells side by side. Default: as many as the cores or the GPU hold.")] = None,
    keep_snapshots: Annotated[bool, typer.Option(help="Keep the weights of every epoch.")] = False,
    on: Annotated[str | None, typer.Option(help="ray: run the cells on a Ray cluster instead of here.")] = None,
    address: Annotated[str | None, typer.Option(help="With --on ray: the cluster's address. Default: the one that this machine belongs to.")] = None,
    gpus: Annotated[float | None, typer.Option(min=0, max=8, help="With --on ray: GPUs of one cell. Default: a quarter of one for bench-small, else one.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Say what would run and how long it takes.")] = False,
) -> None:
    """Run a grid of cells; finished records are kept beside the grid, and cells that have one are not run again."""
    from benchmark.grid import read_grid
    from benchmark.request import Request

    request = Request(
        sets=tuple(sets or ()),
        data=data,
        eval=tuple(evaluation or ()),
        eval_root=eval_root,
        templates=templates,
        image_root=image_root,
        reading=reading,
        results=results,
        cache=cache,
        jobs=jobs,
        keep_snapshots=keep_snapshots,
    )
    asked = read_grid(grid, request)
    if asked.about:
        typer.echo(asked.about, err=True)
    _run_cells(asked.cells, dry_run, f"bench report --results {grid.parent}", asked.expected, _cluster(on, address, gpus))


app.command("status")(status_command)
app.command("eval")(eval_command)
app.command("poison")(poison_command)
app.command("verify")(verify_command)
app.command("diff")(diff_command)
app.command("export")(export_command)
app.command("audit")(audit_command)


app.command("report")(report_command)
app.command("compare")(compare_command)
app.command("rerun")(rerun_command)
app.command("plan")(plan_command)


@app.command("list")
def list_command(what: Annotated[str, typer.Argument(help="attacks, defenses, scales, triggers or eval-sets; nothing for all.")] = "all") -> None:
    """Known attacks, defenses, scales, triggers, evaluation sets."""
    from benchmark.show import listing

    typer.echo(listing(what))


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="An attack, a defense or a scale, by name or file; `world` for a picture of the drawn pairs, `trigger` for one of triggers.")],
    trigger: Annotated[str | None, typer.Argument(help="After `trigger`: which one. Default: all.")] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", help="With `trigger`: an option, as attack.alpha=0.1 or data.side=224. Repeatable.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the picture goes. Default: world.png or gallery.png.")] = None,
) -> None:
    """What a plugin does: its paper, its options with defaults, its presets."""
    from benchmark.show import describe, gallery, picture

    if name == "trigger":
        typer.echo(f"wrote {gallery(trigger, sets or (), out or Path('gallery.png'))}")
        return
    if trigger is not None or sets:
        raise BenchError(f"`bench show {name}` takes no more than a name; `bench show trigger NAME --set attack.OPTION=VALUE` draws a trigger")
    if name == "world":
        typer.echo(f"wrote {picture(out or Path('world.png'))}")
        return
    typer.echo(describe(name))


@app.command()
def new(
    kind: Annotated[str, typer.Argument(help="attack or defense.")],
    name: Annotated[str, typer.Argument(help="Name of the plugin and its file, in lower_case.")],
    folder: Annotated[Path, typer.Option(help="Where the file goes.")] = Path(),
) -> None:
    """Write a template to start from."""
    from benchmark.templates import write_template

    path = write_template(kind, name, folder)
    typer.echo(f"wrote {path}. Next: bench check {path if path.is_absolute() else f'./{path}'}")


@app.command()
def check(file: Annotated[str, typer.Argument(help="A plugin's file or name.")]) -> None:
    """Run the contract's tests on a plugin."""
    from benchmark.testing import check_plugin

    failures = check_plugin(file, typer.echo)
    if failures:
        raise typer.Exit(1)


@app.command()
def doctor(results: Results = Path("results")) -> None:
    """Say whether this installation can run, and with what."""
    from benchmark.show import diagnose

    lines, healthy = diagnose(results)
    typer.echo("\n".join(lines))
    if not healthy:
        raise typer.Exit(1)


@app.command()
def clean(
    results: Results = Path("results"),
    cache: Cache = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove the cache of finished stages. Records of runs stay."""
    import shutil

    folder = cache or results / "cache"
    if not folder.is_dir():
        typer.echo(f"nothing to remove: there is no {folder}")
        return
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if not yes and not typer.confirm(f"remove {folder} ({size / 1e6:,.0f} MB)?"):
        raise typer.Exit(1)
    shutil.rmtree(folder)
    typer.echo(f"removed {folder} ({size / 1e6:,.0f} MB)")


def main() -> None:
    """The `bench` command: errors are one sentence, exit 2; a failed run is 1, Ctrl-C 130."""
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    try:
        app()
    except BenchError as error:
        if debug:
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except PluginError as error:
        if debug:
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)


def _cluster(on: str | None, address: str | None, gpus: float | None) -> Any:
    if on is None:
        if address is not None or gpus is not None:
            raise BenchError("--address and --gpus go with --on ray")
        return None
    if on != "ray":
        raise BenchError(f"expected --on ray, got {on!r}; without the option cells run on this machine")
    from benchmark.cluster import Cluster

    return Cluster(address, gpus)


def _run_cells(cells: list[Any], dry_run: bool, next_command: str, expected: Sequence[Any] = (), cluster: Any = None) -> None:
    from benchmark.matrix import several_processes

    if several_processes():
        from benchmark.train.distributed import together

        with together():
            _run_and_print(cells, dry_run, next_command, expected, None)
    else:
        _run_and_print(cells, dry_run, next_command, expected, cluster)


def _run_and_print(cells: list[Any], dry_run: bool, next_command: str, expected: Sequence[Any], cluster: Any) -> None:
    from benchmark.matrix import run_all
    from benchmark.progress import Progress
    from benchmark.report.terminal import print_expected, print_outcomes
    from benchmark.status import preview

    progress = Progress()
    lines, hours = preview(cells, look=dry_run)
    if dry_run:
        typer.echo("\n".join(lines))
        return
    if hours > 2:
        progress.say(f"about {hours:.1f} hours of work on this machine; --dry-run lists it")
    try:
        outcomes = run_all(cells, progress, cluster)
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command continues from here", err=True)
        raise typer.Exit(130) from None
    print_outcomes(outcomes)
    if expected:
        print_expected(expected, outcomes)
    for outcome in outcomes:
        if outcome.error:
            typer.echo(f"error: {outcome.asked.name}: {outcome.error}" if len(outcomes) > 1 else f"error: {outcome.error}", err=True)
    if any(outcome.record for outcome in outcomes):
        typer.echo(f"Tables of all runs: {next_command}", err=True)
    if any(outcome.bad_request for outcome in outcomes):
        raise typer.Exit(2)
    if any(outcome.error for outcome in outcomes):
        raise typer.Exit(1)


def _seeds(seed: int | None, seeds: str | None) -> tuple[int, ...]:
    if seed is not None and seeds is not None:
        raise BenchError("give --seed or --seeds, not both")
    if seeds is None:
        return (seed or 0,)
    found: list[int] = []
    for part in seeds.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise BenchError(f"expected --seeds like 0,1,2 or 0-4, got {seeds!r}")
        if int(last or first) < int(first):
            raise BenchError(f"--seeds {part.strip()} goes from a larger seed to a smaller one; write {last}-{first}")
        found += range(int(first), int(last or first) + 1)
    return tuple(dict.fromkeys(found))
