"""`python -m benchmark.report.insert README.md table.md "main table"`: puts a table between the two lines that bear its name."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmark.stages import write_atomically


def inserted(page: str, table: str, name: str) -> str:
    """The page with the table between its marker lines; everything else as it was.

    Raises:
        ValueError: if the page lacks a marker.
    """
    marks = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, begin, rest = page.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not begin or not end:
        raise ValueError(f"the page has no {marks[0]} ... {marks[1]}")
    return f"{before}{begin}\n\n{table.strip()}\n\n{end}{after}"


if __name__ == "__main__":
    page, table = Path(sys.argv[1]), Path(sys.argv[2])
    write_atomically(page, inserted(page.read_text(encoding="utf-8"), table.read_text(encoding="utf-8"), sys.argv[3]).encode())
