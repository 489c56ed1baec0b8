"""What `bench report` draws: the page and figures for papers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from benchmark.errors import BenchError

if TYPE_CHECKING:
    from benchmark.report.records import Run


def drawn(figure: str | None, runs: Sequence[Run], notes: Sequence[str], out: Path | None, results: Path, pictures: Path | None) -> None:
    """Writes a figure, or the HTML page.

    Args:
        figure: its name; None for the page.
        notes: lines for the reader of the page.
        pictures: the cache in which missing pictures of drawn pairs are made again; None to show those that are there.
    """
    if figure is not None:
        from benchmark.report.figures import draw

        if out is None:
            raise BenchError(f"--figure {figure} needs --out, a file that ends in .pdf, .svg or .png")
        typer.echo(f"wrote {draw(figure, runs, out)}")
        return
    from benchmark.report.page import html

    if pictures is not None:
        from benchmark.progress import Progress
        from benchmark.report.remake import remake_pictures

        notes = [*notes, *remake_pictures(runs, pictures, Progress())]
    text = html(runs, notes, source=results.name if results.is_absolute() else str(results))
    if out is None:
        typer.echo(text, nl=False)
        return
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BenchError(f"cannot write {out}: {error.strerror}") from None
    typer.echo(f"wrote {out} ({len(text.encode()) / 1e6:.1f} MB)")
