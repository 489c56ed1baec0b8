"""The command `bench audit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmark.cli_options import AllowOutside, CaptionColumn, Data, DialectOf, ImageColumn, ImageRoot, MaxBroken, Quoting, SkipBroken, check_device
from benchmark.data.reading import Reading
from benchmark.errors import BenchError


def audit_command(
    data: Data = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Weights of a model to look at the pairs with, as bench eval takes them.")] = None,
    model: Annotated[str | None, typer.Option(help="Architecture of the checkpoint: a name of open_clip, bench-small, or a JSON file.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the tables and the picture sheet.")] = Path("audit"),
    top: Annotated[int, typer.Option(min=1, max=10_000, help="How many suspects.")] = 50,
    image_root: ImageRoot = None,
    dialect: DialectOf = None,
    image_column: ImageColumn = None,
    caption_column: CaptionColumn = None,
    quoting: Quoting = None,
    allow_outside: AllowOutside = False,
    skip_broken: SkipBroken = False,
    max_broken: MaxBroken = 0.001,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda if there is one.")] = None,
) -> None:
    """Rank what looks planted: rows of pairs that share an image, a caption or words; with a checkpoint, outliers and unlike pairs too."""
    check_device(device)
    if data is None:
        raise BenchError("bench audit needs --data: the pairs to look at")
    if checkpoint is None and model is not None:
        raise BenchError("--model says what a checkpoint is; give one with --checkpoint, or leave --model out")
    _audit_data(data, checkpoint, model, out, top, image_root, Reading(dialect, image_column, caption_column, quoting, allow_outside, skip_broken, max_broken), device)


def _audit_data(data: Path, checkpoint: Path | None, architecture: str | None, out: Path, top: int, image_root: Path | None, reading: Reading, device: str | None) -> None:
    from benchmark.audit.pairs import ON_SHEET, audit_pairs, lines, write
    from benchmark.data.reading import check_reading
    from benchmark.progress import Progress

    check_reading(reading, True)
    progress, model = Progress(), None
    if checkpoint is not None:
        import torch

        from benchmark.train.checkpoints import Ask, load_checkpoint

        chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
        loaded = load_checkpoint(checkpoint, torch.device(chosen), Ask(model=architecture))
        progress.say(loaded.summary())
        model = loaded.model
    audit = audit_pairs(data, reading, image_root, model, top, progress)
    write(audit, out)
    for note in audit.notes:
        typer.echo(f"note: {note}", err=True)
    for line in lines(audit):
        typer.echo(line)
    typer.echo(f"{len(audit.found)} suspects among {len(audit.manifest):,} pairs: {out}/suspects.csv, rows.csv, suspects.json; the first {ON_SHEET} in sheet.png", err=True)
