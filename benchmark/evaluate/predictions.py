"""A run's predictions on disk: a Parquet file for each table, or all of them slim in one file, as committed records have them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from benchmark.errors import BenchError

FOLDER = "predictions"
SLIM = "predictions.parquet"
ROWS = "rows-poisoned"
_FORM = "predictions"
_DROPPED_BITS = 13  # of the 23 of a float32: ten are kept, a relative error of at most 2 ** -11
PRECISION = 2.0**-11


def read_predictions(run: Path) -> dict[str, pd.DataFrame]:
    """The tables of a run's folder by name (`attack-<probe>`, `zero_shot-<set>`, ...), slim or not; empty if it has none.

    In the slim form floats are rounded to a relative error of 2 ** -11; everything else is as it was.

    Raises:
        BenchError: a file that is not what this module wrote.
    """
    if (run / SLIM).is_file():
        try:
            return _restored(pq.read_table(run / SLIM))
        except (pa.ArrowInvalid, KeyError, ValueError, TypeError) as error:
            raise BenchError(f"{run / SLIM} cannot be read ({error}); run its cell again, or take it from the repository anew") from None
    return {path.stem: pd.read_parquet(path) for path in sorted((run / FOLDER).glob("*.parquet"))}


def write_slim(tables: Mapping[str, pd.DataFrame], path: Path) -> None:
    """Writes all tables into one file: whole numbers in their narrowest type, floats rounded, counted ids by rule."""
    form: dict[str, Any] = {}
    parts: dict[str, list[pa.Array]] = {}
    filled = 0
    for name, table in tables.items():
        entry: dict[str, Any] = {"rows": len(table), "dtypes": {column: str(table[column].dtype) for column in table.columns}, "counted": {}, "stored": {}}
        for column in table.columns:
            counted = _counted(table[column])
            if counted is not None:
                entry["counted"][column] = counted
                continue
            values = _narrow(table[column])
            stored = column if column not in parts or _kind(parts[column][-1].type) == _kind(values.type) else f"{name}.{column}"
            entry["stored"][column] = stored
            column_parts = parts.setdefault(stored, [])
            missing = filled - sum(map(len, column_parts))
            if missing:
                column_parts.append(pa.nulls(missing, values.type))
            column_parts.append(values)
        form[name] = entry
        filled += len(table)
    columns = {}
    for column, arrays in parts.items():
        missing = filled - sum(map(len, arrays))
        columns[column] = _joined([*arrays, *([pa.nulls(missing, arrays[-1].type)] if missing else [])])
    packed = pa.table(columns)
    encodings = {column: "BYTE_STREAM_SPLIT" for column, values in columns.items() if pa.types.is_floating(values.type)}
    sizes: dict[str, Any] = {"compression": "zstd", "compression_level": 19, "use_dictionary": False, "store_schema": False, "write_statistics": False}
    with pq.ParquetWriter(path, packed.schema, column_encoding=encodings or None, **sizes) as writer:
        writer.write_table(packed)
        writer.add_key_value_metadata({_FORM: json.dumps(form, separators=(",", ":"))})


def _restored(packed: pa.Table) -> dict[str, pd.DataFrame]:
    form: dict[str, Any] = json.loads((packed.schema.metadata or {})[_FORM.encode()])
    tables, begin = {}, 0
    for name, entry in form.items():
        part = packed.slice(begin, entry["rows"])
        begin += entry["rows"]
        columns = {}
        for column, dtype in entry["dtypes"].items():
            if column in entry["counted"]:
                prefix, first = entry["counted"][column]
                values = pd.Series([f"{prefix}{first + index}" for index in range(entry["rows"])])
            else:
                values = part.column(entry["stored"][column]).to_pandas()
            columns[column] = values.astype(dtype)
        tables[name] = pd.DataFrame(columns)
    return tables


def _counted(values: pd.Series) -> list[Any] | None:
    """Prefix and first number of texts that count up by one, as `test/3`, `test/4`, ...; None for anything else."""
    if len(values) < 2 or not isinstance(values.iloc[0], str):
        return None
    prefix = values.iloc[0].rstrip("0123456789")
    digits = values.iloc[0][len(prefix) :]
    if not digits.isdecimal():
        return None
    first = int(digits)
    return [prefix, first] if all(value == f"{prefix}{first + index}" for index, value in enumerate(values)) else None


def _narrow(values: pd.Series) -> pa.Array:
    kind = values.dtype.kind
    if kind == "f":
        return pa.array(_rounded(values.to_numpy(np.float32)))
    if kind in "iu" and len(values):
        return pa.array(values.to_numpy(), type=_width(int(values.min()), int(values.max())))
    return pa.Array.from_pandas(values)


def _rounded(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Floats (n,) whose last bits are 0, rounded to the nearest: they compress well."""
    bits = values.view(np.uint32).astype(np.uint64) + (1 << (_DROPPED_BITS - 1))
    rounded = (bits & ~np.uint64((1 << _DROPPED_BITS) - 1)).astype(np.uint32).view(np.float32)
    return np.where(np.isfinite(values), rounded, values).astype(np.float32)


def _width(low: int, high: int) -> pa.DataType:
    for width in (pa.int8(), pa.int16(), pa.int32()):
        limit = 1 << (width.bit_width - 1)
        if -limit <= low and high < limit:
            return width
    return pa.int64()


def _kind(dtype: pa.DataType) -> str:
    return "integer" if pa.types.is_integer(dtype) else str(dtype)


def _joined(arrays: list[pa.Array]) -> pa.ChunkedArray:
    """Arrays of one kind end to end, whole numbers in the widest of their types."""
    widest = max((array.type for array in arrays), key=lambda dtype: dtype.bit_width) if _kind(arrays[0].type) == "integer" else arrays[0].type
    return pa.chunked_array([array.cast(widest) for array in arrays])
