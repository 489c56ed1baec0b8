"""The command `bench audit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from benchmark.cli_options import (
    AS_FOUND,
    Data,
    EvalRoot,
    ImageRoot,
    WriterOf,
    check_device,
    check_writer,
    reads_data,
)
from benchmark.data.reading import Reading
from benchmark.errors import BenchError


@reads_data
def audit_command(
    data: Data = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Weights, as bench eval takes them. With --data: of a model to look at the pairs with. Without: of the model to audit.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Architecture of the checkpoint: a name of open_clip, bench-small, or a JSON file.")] = None,
    reference: Annotated[Path | None, typer.Option(help="With --checkpoint alone: a model of the same architecture that is known to be clean.")] = None,
    audit: Annotated[str, typer.Option(help="With --checkpoint alone: the audit, a defense of that kind by name or file.")] = "decree",
    sets: Annotated[list[str] | None, typer.Option("--set", help="An option of the audit, as defense.epochs=200. Repeatable.")] = None,
    writer: WriterOf = "auto",
    evaluation: Annotated[str | None, typer.Option("--eval", help="With --checkpoint alone: the evaluation set whose images the model is shown. Default: drawn images.")] = None,
    eval_root: EvalRoot = None,
    out: Annotated[Path, typer.Option(help="Folder for the tables and the picture sheet.")] = Path("audit"),
    top: Annotated[int, typer.Option(min=1, max=10_000, help="How many suspects.")] = 50,
    image_root: ImageRoot = None,
    reading: Reading = AS_FOUND,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda if there is one.")] = None,
) -> None:
    """Rank what looks planted: rows of pairs that share an image, a caption or words; with --checkpoint alone, audit that model."""
    check_device(device)
    wrote = check_writer(writer)
    given = {"--reference": reference is not None, "--set": bool(sets), "--eval": evaluation is not None, "--eval-root": eval_root is not None, "--audit": audit != "decree"}
    if data is None:
        if checkpoint is None:
            raise BenchError("bench audit needs --data, the pairs to look at, or --checkpoint, the model to look at")
        return _audit_model(checkpoint, model, wrote, reference, audit, tuple(sets or ()), evaluation, eval_root, out, device)
    if any(given.values()):
        raise BenchError(f"{next(name for name, is_given in given.items() if is_given)} is for a model alone; leave out --data, or it")
    says = "--model" if model is not None else "--writer" if wrote != "auto" else None
    if checkpoint is None and says is not None:
        raise BenchError(f"{says} says what a checkpoint is; give one with --checkpoint, or leave {says} out")
    _audit_data(data, checkpoint, model, wrote, out, top, image_root, reading, device)


def _audit_model(
    checkpoint: Path,
    architecture: str | None,
    writer: Literal["auto", "open_clip", "cyclip"],
    reference: Path | None,
    audit: str,
    sets: tuple[str, ...],
    evaluation: str | None,
    eval_root: Path | None,
    out: Path,
    device: str | None,
) -> None:
    from benchmark.audit.model import ModelAudit, audit_model, lines, write
    from benchmark.progress import Progress

    found = audit_model(ModelAudit(checkpoint, architecture, reference, audit, sets, evaluation, eval_root, out, device, writer), Progress())
    for line in lines(found):
        typer.echo(line)
    typer.echo(f"wrote {write(found, out)}", err=True)


def _audit_data(
    data: Path,
    checkpoint: Path | None,
    architecture: str | None,
    writer: Literal["auto", "open_clip", "cyclip"],
    out: Path,
    top: int,
    image_root: Path | None,
    reading: Reading,
    device: str | None,
) -> None:
    from benchmark.audit.pairs import ON_SHEET, audit_pairs, lines, write
    from benchmark.data.reading import check_reading
    from benchmark.progress import Progress

    check_reading(reading, True)
    progress, model = Progress(), None
    if checkpoint is not None:
        import torch

        from benchmark.train.checkpoints import Ask, load_checkpoint

        chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
        loaded = load_checkpoint(checkpoint, torch.device(chosen), Ask(model=architecture, writer=writer))
        progress.say(loaded.summary())
        model = loaded.model
    audit = audit_pairs(data, reading, image_root, model, top, progress)
    write(audit, out)
    for note in audit.notes:
        typer.echo(f"note: {note}", err=True)
    for line in lines(audit):
        typer.echo(line)
    typer.echo(f"{len(audit.found)} suspects among {len(audit.manifest):,} pairs: {out}/suspects.csv, rows.csv, suspects.json; the first {ON_SHEET} in sheet.png", err=True)
