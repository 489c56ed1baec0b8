"""Reads chosen columns of a TSV, CSV or Parquet file as text, a few rows at a time, so that captions stay captions."""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from benchmark.data.reading import Findings
from benchmark.errors import BenchError

_BYTES = 1 << 22
ROWS = 1 << 16
_ODD = re.compile("[\0\udc80-\udcff]")

Choose = Callable[[list[str]], Sequence[str]]


def read_text(path: Path, separator: str, quoting: str | None, choose: Choose, findings: Findings) -> tuple[pa.Table, NDArray[np.int64], str]:
    """The columns that `choose(header)` names, as text.

    Args:
        quoting: `minimal`; `none`, where a quote is a character like any other; or None for minimal with a guard against
            stray quotes that swallow rows.
        findings: gets rows of another length, with bytes that are no UTF-8, or with NUL.

    Returns:
        The table, the number of each of its rows in the file (from 1, empty lines not counted), and the file's SHA-256.

    Raises:
        BenchError: an empty file, a header with a column that stands twice, quotes that do not fit.
    """
    blocks = _Blocks(path)
    reader = csv.reader(blocks.lines(), delimiter=separator, quoting=csv.QUOTE_NONE if quoting == "none" else csv.QUOTE_MINIMAL, strict=True)
    header = _header(path, reader, blocks)
    names = choose(header)
    indices = [header.index(name) for name in names]
    parts: list[pa.Table] = []
    numbers: list[NDArray[np.int64]] = []
    for first, rows in _runs(path, reader, findings, len(header), quoting is None, separator):
        good = _whole(rows, first, len(header), blocks, findings)
        columns = [pa.array([rows[row][index] for row in good], pa.large_string()) for index in indices]
        parts.append(pa.table(columns, names=names))
        numbers.append(first + np.array(good, dtype=np.int64))
    return _joined(parts, names), np.concatenate([np.zeros(0, dtype=np.int64), *numbers]), blocks.hasher.hexdigest()


class _Blocks:
    """The text of a file by physical lines, which end in LF alone; bytes that are no UTF-8 become surrogates.

    Attributes:
        odd: whether a surrogate or a NUL has been met, so that rows must be looked at.
        first: the offset of the first byte that is no UTF-8.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.hasher, self.odd, self.first = path, hashlib.sha256(), False, -1

    def lines(self) -> Iterator[str]:
        return itertools.chain.from_iterable(io.StringIO(text, newline="\n") for text in self._texts())

    def _texts(self) -> Iterator[str]:
        position, rest = 0, b""
        with open(self.path, "rb") as file:
            while block := file.read(_BYTES):
                self.hasher.update(block)
                whole, newline, tail = block.rpartition(b"\n")
                if not newline:
                    rest += block
                    continue
                raw = rest + whole + newline
                yield self._text(raw, position)
                position, rest = position + len(raw), tail
        if rest:
            yield self._text(rest, position)

    def _text(self, raw: bytes, position: int) -> str:
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            if self.first < 0:
                self.first = position + error.start
            self.odd = True
            text = raw.decode(errors="surrogateescape")
        self.odd = self.odd or "\0" in text
        return text.removeprefix("\ufeff") if position == 0 else text


def _header(path: Path, reader: Any, blocks: _Blocks) -> list[str]:
    try:
        header: list[str] | None = next(reader, None)
    except csv.Error as error:
        raise _unreadable(path, 0, error) from None
    if header is None or not any(header):
        raise BenchError(f"{path} is empty" if header is None else f"{path}: the first line is empty; it names the columns")
    if _ODD.search("".join(header)):
        problem = "holds a NUL character" if "\0" in "".join(header) else f"byte {blocks.first} is not UTF-8"
        raise BenchError(f"{path} row 0: {problem}; save the file as UTF-8")
    _check_repeated(path, header)
    return header


def _runs(path: Path, reader: Any, findings: Findings, width: int, guarded: bool, separator: str) -> Iterator[tuple[int, list[list[str]]]]:
    """Rows that follow each other, with the number of the first. Empty lines are no rows."""
    n, done = 0, False
    while not done:
        rows: list[list[str]] = []
        before, refused = reader.line_num, False
        try:
            rows.extend(itertools.islice(reader, ROWS))
            done = len(rows) < ROWS
        except csv.Error as error:
            # The reader goes on behind this line, and the rows before it stay. Only after a carriage return there is no
            # doubt about where the next row begins.
            if not _carriage_return(error):
                raise _unreadable(path, reader.line_num - 1, error) from None
            refused = True
        several = reader.line_num - before != len(rows) + refused
        rows = [row for row in rows if row]
        if several and guarded:
            _check_quotes(path, rows, n, width, separator)
        yield n + 1, rows
        n += len(rows)
        if refused:
            n += 1
            findings.add("bad_rows", n, "a carriage return within a field", "; quote the field")


def _whole(rows: list[list[str]], first: int, width: int, blocks: _Blocks, findings: Findings) -> list[int]:
    """Positions of the rows that have all fields and no odd characters."""
    if not blocks.odd and all(len(row) == width for row in rows):
        return list(range(len(rows)))
    good = []
    for index, row in enumerate(rows):
        number = first + index
        odd = _ODD.search("\t".join(row)) if blocks.odd else None
        if odd is not None and odd[0] == "\0":
            findings.add("bad_encodings", number, "holds a NUL character")
        elif odd is not None:
            known = f"byte {blocks.first} is" if "bad_encodings" not in findings.counts else "holds bytes that are"
            findings.add("bad_encodings", number, f"{known} not UTF-8", "; save the file as UTF-8")
        elif len(row) != width:
            findings.add("bad_rows", number, f"{len(row)} fields, the header has {width}; starts with {row[0][:60]!r}")
        else:
            good.append(index)
    return good


def _check_quotes(path: Path, rows: list[list[str]], before: int, width: int, separator: str) -> None:
    """Whole rows within a quoted field mean that its first quote was a stray one."""
    for number, row in enumerate(rows, start=before + 1):
        for value in row:
            if "\n" in value and any(line.count(separator) == width - 1 for line in value.split("\n")[1:]):
                raise BenchError(
                    f"{path} row {number}: a quoted field swallows the next row; starts with {value[:60]!r}. Double the stray quote and quote its field,"
                    " or read a file that is written without quoting by --quoting none; --quoting minimal takes the field as it is"
                )


def _carriage_return(error: csv.Error) -> bool:
    return "new-line character" in str(error)


def _unreadable(path: Path, row: int, error: csv.Error) -> BenchError:
    if _carriage_return(error):
        return BenchError(f"{path} row {row}: a carriage return within a field; quote the field, and end lines with LF or CR LF")
    return BenchError(
        f"{path} near row {row}: {error}; a quote that is part of a caption must be doubled and its field quoted. --quoting none reads a file written without quoting"
    )


def read_parquet(path: Path, choose: Choose, findings: Findings) -> tuple[pa.Table, NDArray[np.int64]]:
    """The columns that `choose(header)` names, as text, with the number of each row, as `read_text`.

    Args:
        findings: gets rows with a missing value, with bytes that are no UTF-8, or with NUL.

    Raises:
        BenchError: no whole Parquet file, or a column that is not text.
    """
    from pyarrow import parquet

    parts: list[pa.Table] = []
    numbers: list[NDArray[np.int64]] = []
    before = 0
    try:
        with parquet.ParquetFile(path) as file:
            header = list(file.schema_arrow.names)
            _check_repeated(path, header)
            names = choose(header)
            for name in names:
                _check_type(path, file.schema_arrow.field(name))
            for batch in file.iter_batches(ROWS, columns=list(names)):
                columns = [_as_bytes(batch.column(name)) for name in names]
                good = _without_odd(columns, names, before, findings)
                parts.append(pa.table(columns, names=names).filter(pa.array(good)).cast(pa.schema([(name, pa.large_string()) for name in names])))
                numbers.append(before + 1 + np.flatnonzero(good))
                before += len(good)
    except (pa.ArrowException, OSError) as error:
        raise BenchError(f"{path} is not a whole Parquet file: {str(error).splitlines()[0]}") from None
    return _joined(parts, names), np.concatenate([np.zeros(0, dtype=np.int64), *numbers])


def _joined(parts: Sequence[pa.Table], names: Sequence[str]) -> pa.Table:
    empty = pa.table([pa.array([], pa.large_string())] * len(names), names=names)
    return pa.concat_tables([empty, *parts])


def _check_repeated(path: Path, header: list[str]) -> None:
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise BenchError(f"{path}: column {repeated[0]!r} stands twice in the header")


def _check_type(path: Path, column: Any) -> None:
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    texts = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    if not texts and not (column.name == "id" and pa.types.is_integer(kind)):
        raise BenchError(f"{path}: column {column.name!r} holds {column.type}, not text")


def _as_bytes(column: Any) -> Any:
    """A column of text as it is stored: Parquet does not promise that it is UTF-8."""
    plain = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
    return plain.cast(pa.large_string()).cast(pa.large_binary())


def _without_odd(columns: Sequence[Any], names: Sequence[str], before: int, findings: Findings) -> NDArray[np.bool_]:
    """Which rows are whole, bool (n,)."""
    good = np.ones(len(columns[0]), dtype=np.bool_)
    for name, column in zip(names, columns, strict=True):
        for row, value in enumerate(column.to_pylist()):
            problem = "is missing" if value is None else "holds a NUL character" if b"\0" in value else None if _is_utf8(value) else "is not UTF-8"
            if problem and good[row]:
                good[row] = False
                findings.add("bad_rows" if value is None else "bad_encodings", before + row + 1, f"the {name} {problem}")
    return good


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True
