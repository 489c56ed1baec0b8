"""Fails a run whose defense opens a sealed record or an evaluation set. Catches mistakes, not malice."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
    if not _depth or event != "open" or not isinstance(arguments[0], (str, bytes, os.PathLike)):
        return
    path = os.path.abspath(os.fsdecode(arguments[0]))
    if f".record{os.sep}" in path or any(path.startswith(folder) for folder in _forbidden):
        raise PluginError(f"a defense must not open {path}: it holds what a defender does not know")
