"""Where the result of a stage lives: made once under a key, published whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmark.errors import BenchError
from benchmark.settings import canonical, digest

DONE = "done.json"


def cost_file(folder: Path) -> Path:
    """Where a stage's cost lies: beside it, for the same stage has the same bytes however long it took."""
    return folder.with_name(folder.name.removesuffix(".part") + ".cost.json")


@dataclass(frozen=True)
class Stages:
    """A folder of finished stages, `<root>/<kind>/<key>/`, each with a marker that lists its files.

    While a stage is made it lies in `<key>.part`, under a lock that the kernel frees when its process dies.
    """

    root: Path
    say: Callable[[str], None] = lambda line: None

    def path(self, kind: str, facts: Any) -> Path:
        """Where the stage with these facts lies, finished or not."""
        return self.root / kind / digest(facts)[:24]

    def open(self, kind: str, facts: Any) -> Path | None:
        """The finished and whole stage, or None."""
        folder = self.path(kind, facts)
        return folder if folder.is_dir() and damage(folder) is None else None

    def make(self, kind: str, facts: Any, build: Callable[[Path], None], resume: bool = False) -> Path:
        """The finished stage, made by `build(folder)` if it is not there.

        A stage whose files do not match its marker is named and made again.

        Args:
            facts: everything the result depends on; kept in the marker.
            resume: keep what an interrupted build left in the folder, for `build` to continue from.
        """
        found = self.open(kind, facts)
        if found is not None:
            return found
        folder = self.path(kind, facts)
        with self.lock(folder):
            # Under the lock, so that what another process has just mended is not taken away.
            if folder.is_dir():
                problem = damage(folder)
                if problem is None:
                    return folder
                self.say(f"{folder} is damaged ({problem}); making it again")
                shutil.rmtree(folder)
            part = folder.with_name(folder.name + ".part")
            if part.exists() and not resume:
                shutil.rmtree(part)
            part.mkdir(parents=True, exist_ok=True)
            build(part)
            seal(part, facts)
            os.replace(part, folder)
            _sync(folder.parent)
        return folder

    @contextlib.contextmanager
    def lock(self, folder: Path) -> Iterator[None]:
        """Holds the stage's lock; says so if another process has it."""
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            handle = open(folder.with_name(folder.name + ".lock"), "w")  # noqa: SIM115 - closed below, outside this try
        except OSError as error:
            raise BenchError(f"cannot write to {folder.parent}: {error.strerror}. Choose another folder with --results or --cache") from None
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.say(f"waiting for another process that makes {folder.parent.name}/{folder.name}")
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield


def seal(folder: Path, facts: Any) -> None:
    """Writes the marker of a finished folder: its files with size and SHA-256."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / DONE:
            files[str(path.relative_to(folder))] = [path.stat().st_size, file_sha256(path)]
    write_atomically(folder / DONE, canonical({"facts": facts, "files": files}).encode())


def damage(folder: Path, thorough: bool = False) -> str | None:
    """What is wrong with a finished folder, or None. Sizes always, hashes of small files too, of all if thorough."""
    try:
        listed = json.loads((folder / DONE).read_bytes())["files"]
        files = [(str(name), int(size), str(sha256)) for name, (size, sha256) in listed.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{DONE} is missing or broken"
    for name, size, sha256 in files:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if (thorough or size < 1 << 20) and file_sha256(path) != sha256:
            return f"{name} has other bytes than when it was written"
    return None


def drop_files(folder: Path, names: list[str]) -> None:
    """Removes files of a finished folder and takes them off its marker first, so that it stays whole."""
    marker = json.loads((folder / DONE).read_bytes())
    for name in names:
        marker["files"].pop(name, None)
    write_atomically(folder / DONE, canonical(marker).encode())
    for name in names:
        (folder / name).unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Writes under another name, flushes to disk, renames: a reader sees the old bytes or all of the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)
    _sync(path.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
