"""The command `bench eval`."""

from __future__ import annotations

import math
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
    WriterOf,
    check_device,
    check_writer,
    reads_data,
)
from benchmark.data.reading import Reading
from benchmark.errors import BenchError


@reads_data
def eval_command(
    checkpoint: Annotated[Path | None, typer.Option(help="Weights: a file of open_clip, open_clip_train, the CyCLIP family or this program (docs/checkpoints.md).")] = None,
    pretrained: Annotated[str | None, typer.Option(help="In place of a file, weights that open_clip knows by this tag and that are cached.")] = None,
    model: Annotated[str | None, typer.Option(help="Architecture: a name of open_clip, bench-small, or a JSON file with an open_clip configuration.")] = None,
    attack: Annotated[str | None, typer.Option(help="Measure the success of this attack, by name or file. Default: none.")] = None,
    record: Annotated[Path | None, typer.Option(help="In place of --attack, the folder poisoned.record of a poison made before.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the poison. Default: 0.")] = None,
    scale: Annotated[str, typer.Option(help="Scale of the pairs and of the evaluation: smoke, small, medium or paper.")] = "small",
    sets: Annotated[list[str] | None, typer.Option("--set", help="An option, as attack.rate=0.001, data.side=64, model.context_length=32. Repeatable.")] = None,
    data: Data = None,
    evaluation: Evaluation = None,
    eval_root: EvalRoot = None,
    templates: Templates = "set",
    image_root: ImageRoot = None,
    reading: Reading = AS_FOUND,
    precision: Annotated[str | None, typer.Option(help="fp32 or bf16. Default: what a snapshot was trained in, else fp32.")] = None,
    mean: Annotated[str | None, typer.Option(help="Normalisation of images, as 0,0,0. Default: what the file says, else CLIP's.")] = None,
    std: Annotated[str | None, typer.Option(help="Normalisation of images, as 1,1,1.")] = None,
    writer: WriterOf = "auto",
    logit_scale_is_exp: Annotated[bool, typer.Option("--logit-scale-is-exp", help="The file holds the inverse temperature and not its logarithm.")] = False,
    sham: Annotated[bool, typer.Option("--sham", help="Poison without its trigger, as in bench run --sham.")] = False,
    export: Annotated[Path | None, typer.Option(help="Also write the checkpoint to this new folder, with a self-test that is checked whenever it is read.")] = None,
    results: Results = Path("results"),
    cache: Cache = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda if there is one.")] = None,
) -> None:
    """Measure a trained checkpoint, of whatever origin, as a run is measured, and record it beside the runs."""
    if precision not in (None, "fp32", "bf16"):
        raise BenchError(f"expected --precision fp32 or bf16, got {precision!r}")
    wrote = check_writer(writer)
    colours = _colour("--mean", mean), _colour("--std", std)
    check_device(device)
    from benchmark import external
    from benchmark.progress import Progress
    from benchmark.report.terminal import print_outcomes

    asked = external.Evaluation(
        checkpoint=checkpoint,
        pretrained=pretrained,
        model=model,
        attack=attack,
        record=record,
        seed=seed,
        scale=scale,
        sets=tuple(sets or ()),
        data=data,
        eval=tuple(evaluation or ()),
        eval_root=eval_root,
        templates=templates,
        image_root=image_root,
        reading=reading,
        precision=precision,
        mean=colours[0],
        std=colours[1],
        writer=wrote,
        exponential=logit_scale_is_exp,
        sham=sham,
        export=export,
        results=results,
        cache=cache,
        device=device,
    )
    print_outcomes([external.evaluate_checkpoint(asked, Progress())])
    typer.echo(f"Tables of all runs: bench report --results {results}", err=True)


def _colour(option: str, text: str | None) -> tuple[float, float, float] | None:
    if text is None:
        return None
    try:
        red, green, blue = (float(part) for part in text.split(","))
        if not math.isfinite(red + green + blue):
            raise ValueError
    except ValueError:
        raise BenchError(f"expected {option} with three numbers, as 0,0,0, got {text!r}") from None
    return red, green, blue
