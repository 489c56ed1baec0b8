"""Options that several commands share."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer

from benchmark.data.reading import Reading
from benchmark.errors import BenchError

Results = Annotated[Path, typer.Option(help="Folder of runs and, unless --cache says otherwise, of the cache.")]
Cache = Annotated[Path | None, typer.Option(help="Folder of finished stages. Default: <results>/cache.")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="An option, as attack.rate=0.001, defense.every=3, train.epochs=12. Repeatable.")]

Data = Annotated[Path | None, typer.Option(help="Your pairs (docs/data.md): .tsv, .csv or .parquet, a folder, or tars as 'shards/{00000..00099}.tar'.")]
Evaluation = Annotated[list[str] | None, typer.Option("--eval", help="Evaluation set: a folder (docs/evaluation_sets.md) or a name, as cifar10. Repeatable; the main one first.")]
EvalRoot = Annotated[Path | None, typer.Option(help="Where the data of named evaluation sets lie. Default: $BENCH_EVAL_ROOT, else ~/.cache/bench/eval.")]
Templates = Annotated[str, typer.Option(help="Prompts of the evaluation sets: set (their own), openai (the 80 for ImageNet), or a file.")]
ImageRoot = Annotated[Path | None, typer.Option(help="Folder that image paths are relative to. Default: the manifest's.")]
WriterOf = Annotated[str, typer.Option("--writer", help="Who wrote an epoch_N.pt that could be of either: open_clip or cyclip (quick GELU).")]

AS_FOUND = Reading()
_READING = {
    "dialect": Annotated[str | None, typer.Option(help="own, open_clip, cyclip, webdataset, img2dataset or folder. Default: by ending and header.")],
    "image_column": Annotated[str | None, typer.Option(help="Column of image paths. Default: the dialect's.")],
    "caption_column": Annotated[str | None, typer.Option(help="Column of captions. Default: the dialect's.")],
    "quoting": Annotated[
        str | None, typer.Option(help="minimal: fields may be quoted, over lines too. none: a quote is a character. Default: minimal, and stray quotes are refused.")
    ],
    "allow_outside": Annotated[bool, typer.Option("--allow-outside", help="Image paths may be absolute or leave their folder.")],
    "skip_broken": Annotated[bool, typer.Option("--skip-broken", help="Leave out rows and images that cannot be used, and count them.")],
    "max_broken": Annotated[float, typer.Option(help="Largest share of the rows that --skip-broken leaves out.")],
}


def reads_data(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for each choice of `Reading` in place of its parameter `reading`."""
    choices = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=getattr(AS_FOUND, name), annotation=kind) for name, kind in _READING.items()]
    signature = inspect.signature(command, eval_str=True)
    parameters = [one for given in signature.parameters.values() for one in (choices if given.name == "reading" else [given])]

    @functools.wraps(command)
    def with_options(**given: Any) -> None:
        chosen = Reading(**{name: given.pop(name) for name in _READING})
        command(reading=chosen, **given)

    with_options.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {one.name: one.annotation for one in parameters}
    return with_options


def check_writer(writer: str) -> Literal["auto", "open_clip", "cyclip"]:
    """The writer, or one sentence that lists them."""
    if writer not in ("auto", "open_clip", "cyclip"):
        raise BenchError(f"expected --writer auto, open_clip or cyclip, got {writer!r}")
    return cast(Literal["auto", "open_clip", "cyclip"], writer)


def check_device(device: str | None) -> None:
    """Refuses a device that is not there."""
    if device not in (None, "cpu", "cuda"):
        raise BenchError(f"expected --device cpu or cuda, got {device!r}")
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise BenchError("--device cuda: no GPU is available here; leave the option out")
