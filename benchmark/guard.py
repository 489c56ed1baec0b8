"""Fails a run whose defense opens a sealed record or an evaluation set. Catches mistakes, not malice."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pyarrow import parquet

from benchmark.errors import PluginError

_forbidden: list[str] = []
_depth = 0
_installed = False


@contextlib.contextmanager
def sealed(*folders: Path) -> Iterator[None]:
    """While the block runs, opening a file under one of the folders, or under any `*.record` folder, raises."""
    global _depth, _installed
    if not _installed:
        sys.addaudithook(_hook)
        _watch_parquet()
        _installed = True
    # Both spellings of a folder that lies behind a symbolic link.
    added = [str(path) + os.sep for folder in folders for path in (folder.absolute(), folder.resolve())]
    _forbidden.extend(added)
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        for folder in added:
            _forbidden.remove(folder)


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open":
        _check(arguments[0])


def _check(file: Any) -> None:
    if not _depth or not isinstance(file, (str, bytes, os.PathLike)):
        return
    path = os.path.abspath(os.fsdecode(file))
    inside = path + os.sep  # a folder may be opened as one table
    if f".record{os.sep}" in inside or any(inside.startswith(folder) for folder in _forbidden):
        raise PluginError(f"a defense must not open {path}: it holds what a defender does not know")


def _watch_parquet() -> None:
    """Arrow opens files in C++, where Python sees no event; `pandas.read_parquet` and `read_table` go through these two classes."""
    for reader in (parquet.ParquetDataset, parquet.ParquetFile):

        def watched(self: Any, source: Any, *arguments: Any, _begin: Any = reader.__init__, **named: Any) -> None:
            for file in source if isinstance(source, (list, tuple)) else (source,):
                _check(file)
            _begin(self, source, *arguments, **named)

        reader.__init__ = functools.update_wrapper(watched, reader.__init__)
