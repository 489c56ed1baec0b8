"""The commands `bench poison`, `verify`, `diff` and `export`."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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

if TYPE_CHECKING:
    from benchmark.data.pairs import Source
    from benchmark.data.poison import Poisoned, SealedRecord
    from benchmark.progress import Progress
    from benchmark.request import Request

Seed = Annotated[int, typer.Option(min=0, help="Seed of the poison.")]
ScaleName = Annotated[str, typer.Option(help="smoke, small, medium or paper: how many pairs, of which size.")]
Options = Annotated[list[str] | None, typer.Option("--set", help="An option, as attack.rate=0.001 or data.side=64. Repeatable.")]
Sham = Annotated[bool, typer.Option("--sham", help="The attack's edits without its trigger.")]
SHOWN = 30


@reads_data
def poison_command(
    out: Annotated[Path, typer.Option(help="Folder for poisoned/ and poisoned.record/. One that holds this very poison is left as it is.")],
    attack: Annotated[str, typer.Option(help="Attack by name or file.")] = "backdoor",
    seed: Seed = 0,
    scale: ScaleName = "small",
    sets: Options = None,
    data: Data = None,
    evaluation: Evaluation = None,
    eval_root: EvalRoot = None,
    templates: Templates = "set",
    image_root: ImageRoot = None,
    reading: Reading = AS_FOUND,
    sham: Sham = False,
    results: Results = Path("results"),
    cache: Cache = None,
) -> None:
    """Write a poisoned set of pairs and its sealed record to a folder, without training on it."""
    from benchmark.data.poison_folder import sealed_record, write_folder
    from benchmark.progress import Progress

    progress = Progress()
    request = _request(attack, seed, scale, sets, data, evaluation, eval_root, templates, image_root, reading, sham, results, cache)
    made, source, asked = _made(request, progress)
    out = Path(os.path.abspath(out))
    written = write_folder(made, source, asked, out, progress)
    record = sealed_record(made.record)
    typer.echo(f"{'wrote' if written else 'the same poison is there already:'} {out}")
    typer.echo(_counts(record))
    for warning in (*source.warnings, *record.header["warnings"]):
        typer.echo(f"note: {warning}", err=True)


def verify_command(
    folder: Annotated[Path, typer.Argument(help="A folder that bench poison or bench export wrote.")],
    results: Results = Path("results"),
    cache: Cache = None,
) -> None:
    """Check every row, caption and image of a poisoned set or an export against its sealed record. Exit status 1 if anything differs."""
    from benchmark.data.verify import report, verify
    from benchmark.progress import Progress

    progress = Progress()
    stages = _stages(results, cache, progress)
    result = verify(Path(os.path.abspath(folder)), lambda request: _open_source(request, stages, progress), progress)
    for line in report(result):
        typer.echo(_visible(line))
    if result.findings:
        raise typer.Exit(1)


def diff_command(
    a: Annotated[Path, typer.Argument(help="A manifest, a folder that bench poison or bench export wrote, or a folder of tars.")],
    b: Annotated[Path, typer.Argument(help="Another one.")],
    format: Annotated[str, typer.Option(help="table, or csv with every difference.")] = "table",
    image_root: ImageRoot = None,
    results: Results = Path("results"),
    cache: Cache = None,
) -> None:
    """Say which rows, captions and images differ between two sets of pairs. Exit status 1 if any do."""
    from benchmark.data.diff import compare
    from benchmark.data.opened import open_pairs
    from benchmark.progress import Progress

    if format not in ("table", "csv"):
        raise BenchError(f"expected --format table or csv, got {format!r}")
    progress = Progress()
    stages = _stages(results, cache, progress)
    left, right = (open_pairs(Path(os.path.abspath(path)), image_root, lambda request: _open_source(request, stages, progress), progress) for path in (a, b))
    compared = compare(left, right, progress)
    if format == "csv":
        import pandas as pd

        from benchmark.report.tables import to_csv

        rows = [(one.kind, one.row, one.row_a, one.row_b, one.before, one.after) for one in compared.differences]
        text = to_csv(pd.DataFrame(rows, columns=["change", "row", "row_a", "row_b", "before", "after"], dtype=object))
        # Captions go into a file as they are, and typer.echo would take escape sequences out of them.
        sys.stdout.write("\n".join(map(_visible, text.split("\n"))) if sys.stdout.isatty() else text)
    else:
        _print_differences(compared, a, b)
    if compared.differences:
        raise typer.Exit(1)


@reads_data
def export_command(
    out: Annotated[Path, typer.Option(help="New folder for the export; the sealed record goes beside it, to <out>.record.")],
    to: Annotated[str, typer.Option(help="open_clip (TSV), cyclip (CSV) or webdataset (tars).")],
    folder: Annotated[Path | None, typer.Argument(help="A folder that bench poison wrote. Without one, the options say which poison.")] = None,
    with_ids: Annotated[bool, typer.Option("--with-ids", help="Write ids; they give replaced rows away.")] = False,
    reencode: Annotated[str, typer.Option(help="all images through one encoder, or new: only those that the attack wrote, which gives them away.")] = "all",
    image_format: Annotated[str, typer.Option(help="png keeps every pixel, jpeg does not.")] = "png",
    per_shard: Annotated[int, typer.Option(help="Pairs in a tar.")] = 10_000,
    attack: Annotated[str | None, typer.Option(help="Attack by name or file.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the poison. Default: 0.")] = None,
    scale: Annotated[str | None, typer.Option(help="smoke, small, medium or paper. Default: small.")] = None,
    sets: Options = None,
    data: Data = None,
    evaluation: Evaluation = None,
    eval_root: EvalRoot = None,
    templates: Templates = "set",
    image_root: ImageRoot = None,
    reading: Reading = AS_FOUND,
    sham: Sham = False,
    results: Results = Path("results"),
    cache: Cache = None,
) -> None:
    """Write a poisoned set with all its images in the layout of another trainer, with a first page that says it is poisoned."""
    from benchmark.data.export import export, layout
    from benchmark.data.poison_folder import open_folder, sealed_record
    from benchmark.progress import Progress

    how = layout(to, with_ids, reencode, image_format, per_shard)
    progress = Progress()
    if folder is not None:
        if any(one is not None for one in (attack, seed, scale, sets, data, evaluation, eval_root, image_root)) or templates != "set" or sham or reading != Reading():
            raise BenchError(f"the folder {folder} says which poison it holds; leave the options of the poison out")
        from benchmark.data.opened import is_poison_folder

        folder = Path(os.path.abspath(folder))
        there = open_folder(is_poison_folder(folder) or folder)
        made, asked = there.poisoned, there.request
        source = _open_source(asked, _stages(results, cache, progress), progress)
    else:
        if attack is None:
            raise BenchError("nothing to export: give a folder that `bench poison` wrote, or --attack with the options of a poison")
        request = _request(attack, seed or 0, scale or "small", sets, data, evaluation, eval_root, templates, image_root, reading, sham, results, cache)
        made, source, asked = _made(request, progress)
    done = export(made, source, asked, how, Path(os.path.abspath(out)), progress)
    typer.echo(f"{'wrote' if done.written else 'the same export is there already:'} {done.folder}, and its sealed record {done.record}")
    typer.echo(_counts(sealed_record(made.record)))
    if done.card["captions_flattened"]:
        typer.echo(f"note: {done.card['captions_flattened']:,} captions held a tab or a line end, which became a space", err=True)
    if done.card["n_copied_images"]:
        typer.echo("note: format and size of the images give poisoned rows away; --reencode all does not", err=True)
    if with_ids:
        typer.echo("note: ids give replaced rows away", err=True)


def _request(
    attack: str,
    seed: int,
    scale: str,
    sets: list[str] | None,
    data: Path | None,
    evaluation: list[str] | None,
    eval_root: Path | None,
    templates: str,
    image_root: Path | None,
    reading: Reading,
    sham: bool,
    results: Path,
    cache: Path | None,
) -> Request:
    from benchmark.request import Request

    return Request(
        attacks=(attack,),
        defenses=("clip",),
        seeds=(seed,),
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
        baseline=False,
        sham=sham,
        device="cpu",
    )


def _made(request: Request, progress: Progress) -> tuple[Poisoned, Source, dict[str, Any]]:
    """The poison as a run of the same options makes it, its source, and the request as JSON."""
    from benchmark.matrix import open_cell
    from benchmark.request import plan

    cells = plan(request)
    if len(cells) != 1:
        raise BenchError(f"one attack makes one poisoned set, got --attack {request.attacks[0]}")
    from benchmark.cell import poison_of

    cell = open_cell(cells[0], progress)
    made = poison_of(cell)
    return made, cell.source, _as_json(request, cell)


def _as_json(request: Request, cell: Any) -> dict[str, Any]:
    """What was asked for, in words that mean the same in another working directory."""
    from benchmark.settings import SCHEMA

    def absolute(path: Path | str | None) -> str | None:
        return None if path is None else os.path.abspath(path)

    return {
        "schema": SCHEMA,
        "attack": str(cell.attack_plugin.file) if cell.attack_plugin.by_path else cell.attack_plugin.name,
        "seed": request.seeds[0],
        "scale": request.scale,
        "sets": list(request.sets),
        "sham": request.sham,
        "data": None if request.data is None else "::".join(map(os.path.abspath, str(request.data).split("::"))),
        "image_root": absolute(request.image_root),
        "reading": asdict(request.reading),
        "eval": [absolute(one) if Path(one).is_dir() else one for one in request.eval],
        "eval_root": absolute(request.eval_root),
        "templates": absolute(request.templates) if Path(request.templates).is_file() else request.templates,
        "data_settings": cell.settings.data.model_dump(mode="json"),
        "source": {"name": cell.source.name, "content": cell.source.content},
    }


def _stages(results: Path, cache: Path | None, progress: Progress) -> Any:
    from benchmark.stages import Stages

    return Stages(cache or results / "cache", progress.say)


def _open_source(asked: dict[str, Any], stages: Any, progress: Progress) -> Source:
    """The data that were poisoned, from the request in a record. No attack is loaded."""
    from pydantic import ValidationError

    from benchmark.data.source import open_source
    from benchmark.settings import DataSettings

    try:
        settings = DataSettings(**asked["data_settings"])
        data, image_root = (Path(asked[name]) if asked.get(name) else None for name in ("data", "image_root"))
        reading = Reading(**asked.get("reading", {}))
    except (ValidationError, KeyError, TypeError) as error:
        raise BenchError(f"the request in the record cannot be understood: {error}") from None
    return open_source(settings, data, image_root, stages, progress, reading)


def _counts(record: SealedRecord) -> str:
    header = record.header
    if not header["n_poison"]:
        return f"{header['n_rows']:,} rows, none of them poisoned"
    trigger = ", without the trigger (sham)" if header["sham"] else ""
    roles = record.rows["role"].value_counts()
    parts = f" ({', '.join(f'{n:,} {role}' for role, n in sorted(roles.items()))})" if len(roles) > 1 else ""
    return (
        f"{header['n_rows']:,} rows, {header['n_poison']:,} of them poisoned{parts} (asked for {header['n_requested']:,}), a share of {header['poison_rate']:.6g}, "
        f"by {header['edit_mode']}{trigger}; attack {header['attack']}, seed {header['attack_seed']}"
    )


def _print_differences(compared: Any, a: Path, b: Path) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    found = ", ".join(f"{n:,} {kind}" for kind, n in compared.counts().items() if n)
    how = "ids" if compared.by == "id" else "content, as ids do not stand in both"
    lines = [f"A: {a}, {compared.n_a:,} rows", f"B: {b}, {compared.n_b:,} rows", f"{compared.n_same:,} rows are the same; matched by {how}", found or "no differences"]
    for line in lines:
        console.print(Text(line), soft_wrap=True)
    if not compared.differences:
        return
    table = Table()
    for name in ("change", "row", "in A", "in B", "A", "B"):
        table.add_column(name, overflow="fold")
    for one in compared.differences[:SHOWN]:
        numbers = ["" if row is None else str(row) for row in (one.row_a, one.row_b)]
        table.add_row(*(Text(cell) for cell in (one.kind, _shown(one.row), *numbers, _shown(one.before), _shown(one.after))))
    console.print(table)
    if len(compared.differences) > SHOWN:
        console.print(Text(f"and {len(compared.differences) - SHOWN:,} more; --format csv lists all"), soft_wrap=True)


def _shown(text: str) -> str:
    """Bounded, with control characters visible."""
    return _visible(text) if len(text) <= 200 else f"{_visible(text[:200])}... ({len(text)} characters)"


def _visible(text: str) -> str:
    """The text with control characters as escapes."""
    return "".join(character if character.isprintable() else character.encode("unicode_escape").decode() for character in text)
