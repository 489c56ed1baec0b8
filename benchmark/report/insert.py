"""`python -m benchmark.report.insert README.md table.md`: puts a table between its two marker lines."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmark.stages import write_atomically

BEGIN, END = "<!-- main table -->", "<!-- end of main table -->"


def inserted(page: str, table: str) -> str:
    """The page with the table between the markers; everything else as it was."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n\n{table.strip()}\n\n{END}{after}"


if __name__ == "__main__":
    page, table = Path(sys.argv[1]), Path(sys.argv[2])
    write_atomically(page, inserted(page.read_text(encoding="utf-8"), table.read_text(encoding="utf-8")).encode())
