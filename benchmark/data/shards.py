"""Tar shards as img2dataset and WebDataset write them: read in place, nothing extracted; and a writer with fixed bytes."""

from __future__ import annotations

import io
import itertools
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from benchmark.data.image import shard_ref
from benchmark.data.reading import Findings
from benchmark.errors import BenchError
from benchmark.progress import Progress
from benchmark.stages import write_atomically

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
MAX_IMAGE = 64 << 20
MAX_TEXT = 1 << 20
MAX_MEMBERS = 2_000_000
MAX_SHARDS = 1_000_000
_BLOCK = 512
# What tarfile raises on damaged headers, besides its own errors.
DAMAGE = (tarfile.TarError, OSError, ValueError, ArithmeticError, LookupError, RecursionError)


@dataclass
class _Sample:
    """The members of one key that stand together: image as (offset, size), caption as text."""

    key: str
    image: tuple[int, int] | None = None
    caption: str | None = None
    problems: list[str] = field(default_factory=list)


def expand(pattern: str) -> list[str]:
    """The file names of a brace pattern in order: `{00000..00331}`, `{0..10..2}`, `{a,b}`, and `::` between patterns.

    Raises:
        BenchError: more than a million names.
    """
    names = list(itertools.islice((name for part in pattern.split("::") for name in _braces(part)), MAX_SHARDS + 1))
    if len(names) > MAX_SHARDS:
        raise BenchError(f"{pattern!r} names more than {MAX_SHARDS} files")
    return names


def _braces(pattern: str) -> Iterator[str]:
    begin = pattern.find("{")
    while begin >= 0:
        depth = 0
        commas: list[int] = []
        for end in range(begin, len(pattern)):
            mark = pattern[end]
            depth += (mark == "{") - (mark == "}")
            if mark == "," and depth == 1:
                commas.append(end)
            if depth == 0:
                break
        else:
            end = -1
        inside = _alternatives(pattern, begin, end, commas) if end > 0 else None
        if inside is not None:
            for middle in inside:
                for tail in _braces(pattern[end + 1 :]):
                    yield pattern[:begin] + middle + tail
            return
        begin = pattern.find("{", begin + 1)
    yield pattern


def _alternatives(pattern: str, begin: int, end: int, commas: Sequence[int]) -> Iterator[str] | None:
    """What stands for the braces from `begin` to `end`, or None if they are part of a name."""
    if commas:
        edges = [begin, *commas, end]
        return (name for left, right in itertools.pairwise(edges) for name in _braces(pattern[left + 1 : right]))
    first, dots, rest = pattern[begin + 1 : end].partition("..")
    last, _, step = rest.partition("..")
    numbers = [first.removeprefix("-"), last.removeprefix("-"), step or "1"]
    if not dots or not all(number.isascii() and number.isdigit() and len(number) < 16 for number in numbers) or int(step or 1) == 0:
        return None
    padded = any(len(number) > 1 and number.startswith("0") for number in numbers[:2])
    width = max(len(first), len(last)) if padded else 0
    by = int(step or 1) * (1 if int(last) >= int(first) else -1)
    return (f"{number:0{width}d}" for number in range(int(first), int(last) + (1 if by > 0 else -1), by))


def find_shards(data: str) -> list[Path]:
    """The tars that `--data` names: a folder with tars (in folders too), one tar, or a brace pattern.

    Raises:
        BenchError: there are none, or one of a pattern is missing.
    """
    if Path(data).is_dir():
        shards = sorted(Path(data).rglob("*.tar"), key=lambda path: path.relative_to(data).as_posix())
        if not shards:
            raise BenchError(f"{data} holds no tars")
        return shards
    shards = [Path(name) for name in expand(data)]
    odd = next((path for path in shards if path.suffix != ".tar"), None)
    if odd is not None:
        raise BenchError(f"a shard ends in .tar, got {odd.name!r}; compressed tars must be unpacked to plain ones")
    missing = [path for path in shards if not path.is_file()]
    if missing:
        more = f", and {len(missing) - 1} more of {len(shards)}" if len(missing) > 1 else ""
        raise BenchError(f"no shard at {missing[0]}{more}")
    return shards


def shard_stamp(shards: Sequence[Path]) -> list[list[Any]]:
    """Path, size and time of each shard; changes when one is replaced."""
    stats = [(str(path.resolve()), path.stat()) for path in shards]
    return [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats]


def read_shards(shards: Sequence[Path], findings: Findings, progress: Progress) -> tuple[pa.Table, dict[str, int]]:
    """The pairs of all shards in order, and how many members were no pairs.

    An image column holds references that `image.decode_ref` takes. The id of a pair is its key; keys that more than one
    shard has get the shard's path before them.

    Args:
        findings: gets every sample without image or caption, with two, too large or not UTF-8, and every damaged tar.

    Raises:
        BenchError: nothing is left, or `findings` does not let the damage pass.
    """
    tables: list[pa.Table] = []
    counts: Counter[str] = Counter()
    expected = sizes_of(shards)
    n_rows = 0
    with progress.bar("reading shards", len(shards), "shards") as advance:
        for path in shards:
            table, n_broken = _read_shard(path, findings, counts)
            n_rows += len(table) + n_broken
            wanted = expected.get(path)
            if wanted is not None and wanted > len(table) + n_broken:
                lost = wanted - len(table) - n_broken
                findings.add("missing_samples", path.name, f"{len(table) + n_broken} samples, and sizes.json says {wanted}", n=lost)
                n_rows += lost
            tables.append(table)
            advance(1)
    findings.settle(n_rows)
    rows = pa.concat_tables(tables).combine_chunks()
    if len(rows) == 0:
        raise BenchError(f"{findings.where} holds no pairs: samples are an image ({', '.join(IMAGE_SUFFIXES)}) and a .txt of the same name")
    return _unique_ids(rows, shards, [len(table) for table in tables]), dict(counts)


def _read_shard(path: Path, findings: Findings, counts: Counter[str]) -> tuple[pa.Table, int]:
    """Whole samples of one tar, and how many broken ones it has."""
    ids: list[str] = []
    refs: list[str] = []
    captions: list[str] = []
    seen: set[str] = set()
    n_broken = 0
    try:
        for sample in _samples(path, counts):
            problems = list(sample.problems)
            if sample.key in seen:
                problems.append("its key stands twice")
            elif not problems:
                problems += ["no image"] * (sample.image is None) + ["no caption (.txt)"] * (sample.caption is None)
            seen.add(sample.key)
            if problems:
                n_broken += 1
                findings.add("broken_samples", f"{path.name}:{_shown(sample.key)}", " and ".join(problems))
            elif sample.image is not None and sample.caption is not None:
                ids.append(sample.key)
                refs.append(shard_ref(path.resolve(), *sample.image))
                captions.append(sample.caption)
    except DAMAGE as error:
        n_broken += 1
        findings.add("damaged_shards", path.name, f"not a whole tar: {error}")
    columns = [pa.array(values, pa.large_string()) for values in (ids, refs, captions)]
    return pa.table(columns, names=["id", "image", "caption"]), n_broken


def _samples(path: Path, counts: Counter[str]) -> Iterator[_Sample]:
    """Samples as they stand in the tar. The last one before damage is not given: its members may be missing.

    Raises:
        tarfile.ReadError, OSError, ...: the tar is damaged or cut off; samples before that have been given.
    """
    sample: _Sample | None = None
    with open(path, "rb", buffering=0) as file, tarfile.open(fileobj=_Bounded(file), mode="r:") as tar:
        end = n_members = 0
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header it has seen
            n_members += 1
            if n_members > MAX_MEMBERS:
                raise tarfile.ReadError(f"more than {MAX_MEMBERS} members")
            if member.size < 0 or member.offset_data < end:
                raise tarfile.ReadError(f"a header that leads back, at byte {member.offset}")
            end = member.offset_data
            folder, _, base = member.name.removeprefix("./").rpartition("/")
            stem, dot, suffix = base.partition(".")
            suffix = suffix.lower()
            if "." in suffix and suffix.rpartition(".")[2] in (*IMAGE_SUFFIXES, "txt"):
                counts["members_with_a_dot_before_their_ending"] += 1  # WebDataset cuts keys at the first dot
            if member.isdir() or not stem or not dot or suffix not in (*IMAGE_SUFFIXES, "txt"):
                continue
            key = f"{folder}/{stem}" if folder else stem
            if sample is None or sample.key != key:
                if sample is not None:
                    yield sample
                sample = _Sample(key)
            if not member.isreg() or member.issparse():
                counts["members_that_are_no_files"] += 1
                continue
            _fill(sample, suffix, member, file.fileno())
        check_end(file, tar.offset)
    if sample is not None:
        yield sample


def _fill(sample: _Sample, suffix: str, member: tarfile.TarInfo, descriptor: int) -> None:
    limit = MAX_TEXT if suffix == "txt" else MAX_IMAGE
    if member.size > limit:
        sample.problems.append(f".{suffix} of {member.size} bytes, at most {limit} are read")
        return
    if suffix == "txt":
        if sample.caption is not None:
            sample.problems.append("two captions")
        raw = os.pread(descriptor, member.size, member.offset_data)
        if len(raw) != member.size:
            raise tarfile.ReadError("unexpected end of data")
        try:
            sample.caption = raw.decode().removeprefix("\ufeff")
            sample.key.encode()
        except UnicodeDecodeError:
            sample.problems.append("a caption that is not UTF-8")
        except UnicodeEncodeError:
            sample.problems.append("a name that is not UTF-8")
        if b"\0" in raw:
            sample.problems.append("a caption with a NUL character")
    else:
        if sample.image is not None:
            sample.problems.append("two images")
        sample.image = (member.offset_data, member.size)


class _Bounded(io.RawIOBase):
    """A file that hands out no more than a header's worth at once: tarfile reads a long name into memory whole."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_TEXT:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return bytes(self._file.read(size))

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True


def check_end(file: Any, offset: int) -> None:
    """Raises where the end is none: tarfile stops without a word at a header it cannot read, and at a file cut off between two members."""
    file.seek(offset)
    first = file.read(_BLOCK)
    if len(first) < _BLOCK:
        raise tarfile.ReadError(f"cut off at byte {offset + len(first)}")
    if first.strip(b"\0"):
        raise tarfile.ReadError(f"damaged at byte {offset}")
    position = offset + _BLOCK
    while block := file.read(MAX_TEXT):
        if block.strip(b"\0"):
            raise tarfile.ReadError(f"it goes on behind its end at byte {position}; join tars by naming them, not by appending one to another")
        position += len(block)


def sizes_of(shards: Sequence[Path]) -> dict[Path, int]:
    """Samples of each shard, where a `sizes.json` beside it says so."""
    expected: dict[Path, int] = {}
    for folder in dict.fromkeys(path.parent for path in shards):
        path = folder / "sizes.json"
        if not path.is_file():
            continue
        try:
            if path.stat().st_size > MAX_IMAGE:
                raise ValueError("too large")
            sizes = json.loads(path.read_bytes())
            entries = {folder / str(name): int(n) for name, n in sizes.items()}
        except (ValueError, TypeError, AttributeError, RecursionError, OverflowError):
            raise BenchError(f"{path} is damaged: expected a JSON object of shard names and their numbers of samples") from None
        expected |= entries
    return expected


def _unique_ids(rows: pa.Table, shards: Sequence[Path], sizes: Sequence[int]) -> pa.Table:
    counted = Counter(rows["id"].to_pylist())
    if len(counted) == len(rows):
        return rows
    # Paths from the folder that all shards share, so that the ids stay when that folder is moved.
    base = Path(os.path.commonpath([path.absolute().parent for path in shards]))
    names = (str(path.absolute().relative_to(base).with_suffix("")) for path, n in zip(shards, sizes, strict=True) for _ in range(n))
    ids = [f"{name}/{key}" if counted[key] > 1 else key for name, key in zip(names, rows["id"].to_pylist(), strict=True)]
    again = Counter(ids)
    if len(again) < len(ids):
        twice = next(row_id for row_id, n in again.items() if n > 1)
        raise BenchError(f"sample {twice!r} stands twice; is a shard named twice?")
    return rows.set_column(0, "id", pa.array(ids, pa.large_string()))


def _shown(key: str) -> str:
    return ascii(key)[1:-1][:100]


def write_shards(folder: Path, samples: Iterable[tuple[str, bytes, str, str]], per_shard: int) -> list[Path]:
    """Writes `00000.tar`, `00001.tar` ... and `sizes.json`, and returns the tars; equal samples give equal bytes.

    Args:
        folder: made if it is not there; it must hold no tars.
        samples: key, bytes of the image file, its suffix (`jpg`, `.png` ...) and caption, in the order they are stored.
        per_shard: samples in a tar, at least 1; the last one may hold fewer.

    Raises:
        BenchError: tars in the folder, a key that stands twice or cannot be one, an unknown suffix.
    """
    if per_shard < 1:
        raise BenchError(f"expected at least 1 sample in a shard, got {per_shard}")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("*.tar")):
        raise BenchError(f"{folder} holds tars already; choose an empty folder")
    shards: list[Path] = []
    sizes: dict[str, int] = {}
    seen: set[str] = set()
    rest = iter(samples)
    while (first := next(rest, None)) is not None:
        path = folder / f"{len(shards):05d}.tar"
        part = path.with_suffix(".tar.part")
        n = 0
        with tarfile.open(part, "w", format=tarfile.PAX_FORMAT) as out:
            for key, image, suffix, caption in itertools.chain([first], itertools.islice(rest, per_shard - 1)):
                _check_key(key, seen)
                ending = suffix.lower().removeprefix(".")
                if ending not in IMAGE_SUFFIXES:
                    raise BenchError(f"sample {key!r}: {suffix!r} is no image suffix of a shard; known: {', '.join(IMAGE_SUFFIXES)}")
                for name, content in ((f"{key}.{ending}", image), (f"{key}.txt", caption.encode())):
                    member = tarfile.TarInfo(name)
                    member.size, member.mode = len(content), 0o644
                    out.addfile(member, io.BytesIO(content))
                n += 1
        part.rename(path)
        shards.append(path)
        sizes[path.name] = n
    write_atomically(folder / "sizes.json", (json.dumps(sizes, indent=1, sort_keys=True) + "\n").encode())
    return shards


def _check_key(key: str, seen: set[str]) -> None:
    parts = key.split("/")
    if not parts[-1] or "." in parts[-1] or not all(parts[:-1]) or any(part in (".", "..") for part in parts) or "\0" in key:
        raise BenchError(f"{key!r} cannot be a key of a shard: it names a file, so it has no dot, no empty part and no NUL")
    if key in seen:
        raise BenchError(f"key {key!r} stands twice")
    seen.add(key)
