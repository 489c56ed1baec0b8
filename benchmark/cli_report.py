"""`bench report`: tables, the page and figures for papers, out of recorded runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from benchmark.cli_evidence import verified
from benchmark.cli_options import Cache, Results
from benchmark.errors import BenchError

if TYPE_CHECKING:
    from benchmark.report.records import Run


def report_command(
    format: Annotated[
        str, typer.Option(help="md, csv, long (CSV with one row per metric), brief (Markdown, a row a defense and a column an attack) or html (one page with everything).")
    ] = "md",
    out: Annotated[Path | None, typer.Option(help="A file instead of the terminal.")] = None,
    attack: Annotated[list[str] | None, typer.Option(help="Only these attacks.")] = None,
    defense: Annotated[list[str] | None, typer.Option(help="Only these defenses.")] = None,
    scale: Annotated[list[str] | None, typer.Option(help="Only these scales.")] = None,
    where: Annotated[list[str] | None, typer.Option(help="Only runs with this setting, as train.epochs=12. Repeatable.")] = None,
    against: Annotated[str | None, typer.Option(help="Paired differences of every defense to this one, with tests, as CSV.")] = None,
    fit: Annotated[str | None, typer.Option(help="dose: success against the number of poisoned rows, and the count for 50 %.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Recompute values and tables from saved predictions, and say what differs.")] = False,
    figure: Annotated[str | None, typer.Option(help="heatmap, curves, dose or pareto for a paper; --out ends in .pdf, .svg or .png.")] = None,
    pictures: Annotated[bool, typer.Option("--pictures", help="With --format html: make missing pictures again, by poisoning drawn pairs anew.")] = False,
    results: Results = Path("results"),
    cache: Cache = None,
) -> None:
    """Tables from recorded runs."""
    from benchmark.report.brief import to_brief
    from benchmark.report.comparisons import against as comparisons
    from benchmark.report.controls import controls
    from benchmark.report.dose import fitted
    from benchmark.report.markdown import to_markdown
    from benchmark.report.records import load, select, superseded
    from benchmark.report.tables import groups, long_table, to_csv
    from benchmark.report.wide import wide_table

    if verify:
        if attack or defense or scale or where:
            raise BenchError("--verify checks every run of a folder and takes no --attack, --defense, --scale or --where")
        verified(results)
        return
    if format not in ("md", "csv", "long", "brief", "html"):
        raise BenchError(f"expected --format md, csv, long, brief or html, got {format!r}")
    page = figure is not None or format == "html"
    if (against is not None) + (fit is not None) + page > 1:
        raise BenchError("--against, --fit and --figure (or --format html) are reports of their own: ask for one at a time")
    runs, old = superseded(select(load(results), attack or (), defense or (), scale or (), where or ()))
    if not runs:
        raise BenchError(f"no recorded run in {results} matches")
    if page:
        drawn(figure, runs, old, out, results, (cache or Path("results/cache")) if pictures else None)
        return
    notes = old + groups(runs)[1]
    if fit is not None:
        text = fitted(runs, fit, format)
    elif against is not None:
        table, left_out = comparisons(runs, against)
        text, notes = to_csv(table), notes + left_out
    elif format == "md":
        text, notes = to_markdown(runs), old
    elif format == "brief":
        text, notes = to_brief(runs), old
    elif format == "csv":
        text, notes = to_csv(wide_table(runs)), notes + controls(groups(runs)[0]).notes
    else:
        text = to_csv(long_table(runs))
    for note in notes:
        typer.echo(note, err=True)
    _write(text, out)


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
    _write(text, out)
    if out is not None:
        typer.echo(f"wrote {out} ({len(text.encode()) / 1e6:.1f} MB)")


def _write(text: str, out: Path | None) -> None:
    from benchmark.stages import write_atomically

    if out is None:
        typer.echo(text, nl=False)
        return
    try:
        if out.is_file() or not out.exists():
            write_atomically(out.resolve(), text.encode())
        else:  # a pipe or a device
            out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BenchError(f"cannot write {out}: {error.strerror}") from None
