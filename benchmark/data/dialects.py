"""Which columns of a table are image and caption: by the file's ending and its header, or as the user says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmark.data.reading import TABLES, Reading
from benchmark.errors import BenchError, nearest

_COLUMNS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "own": (("image",), ("caption",)),
    "open_clip": (("filepath",), ("title",)),
    "cyclip": (("image", "path"), ("caption",)),
}
_SEPARATORS = {"own": "\t", "open_clip": "\t", "cyclip": ","}
_BY_SUFFIX: dict[str, tuple[str | None, tuple[str, ...]]] = {".tsv": ("\t", ("own", "open_clip")), ".csv": (",", ("cyclip",)), ".parquet": (None, ("own",))}
GCC = (
    "is in the form of the Conceptual Captions release, captions and addresses without a header; it holds no images."
    " Give it the header caption<TAB>url and download them with img2dataset: img2dataset --url_list FILE.tsv --input_format tsv"
    " --url_col url --caption_col caption --output_format webdataset --output_folder shards. Then: --data shards"
)


@dataclass(frozen=True)
class Layout:
    """How a file is cut into columns (None for Parquet), and the dialects that its header may be in."""

    separator: str | None
    dialects: tuple[str, ...]


def choose_layout(path: Path, reading: Reading) -> Layout:
    """The layout by ending, or of the dialect that the user names. The content is not looked at.

    Raises:
        BenchError: an unknown ending, or a dialect that is no table.
    """
    dialect = reading.dialect
    if dialect == "gcc":
        raise BenchError(f"{path} {GCC}")
    if dialect is None:
        if path.suffix not in _BY_SUFFIX:
            raise BenchError(f"a manifest ends in .tsv, .csv or .parquet, got {path.name!r}; --dialect says what a file of another name is")
        return Layout(*_BY_SUFFIX[path.suffix])
    if dialect not in TABLES:
        raise BenchError(f"{path} is a file, and dialect {dialect!r} is a folder; dialects of files: {', '.join(TABLES)}")
    return Layout(None if path.suffix == ".parquet" else _SEPARATORS[dialect], (dialect,))


def columns(path: Path, header: list[str], layout: Layout, reading: Reading) -> tuple[str, str]:
    """The columns of images and captions.

    Raises:
        BenchError: the header fits no dialect or more than one, or lacks a column that the user names.
    """
    for name in (reading.image_column, reading.caption_column):
        if name is not None and name not in header:
            guess = nearest(name, header)
            raise BenchError(f"{path} has no column {name!r}.{f' Did you mean {guess!r}?' if guess else ''} Its header: {', '.join(header[:8])}")
    fitting = [pair for dialect in layout.dialects for pair in _pairs(_COLUMNS[dialect], reading) if pair[0] in header and pair[1] in header]
    fitting = list(dict.fromkeys(fitting))
    if len(fitting) == 1:
        return fitting[0]
    if layout.separator == "\t" and len(header) == 2 and header[1].startswith(("http://", "https://")):
        raise BenchError(f"{path} {GCC}")
    known = "; ".join(f"{dialect}: {' or '.join(_COLUMNS[dialect][0])}, {_COLUMNS[dialect][1][0]}" for dialect in layout.dialects)
    problem = "fits no dialect" if not fitting else "fits more than one dialect"
    tabs = layout.separator == "," and any("\t" in name for name in header)
    hint = "it holds tabs: --dialect open_clip reads tab-separated files" if tabs else "--image-column and --caption-column name others"
    raise BenchError(f"{path}: the header {', '.join(header[:8])} {problem}. Columns of a {path.suffix} manifest: {known}; {hint}")


def _pairs(known: tuple[tuple[str, ...], tuple[str, ...]], reading: Reading) -> list[tuple[str, str]]:
    images = known[0] if reading.image_column is None else (reading.image_column,)
    captions = known[1] if reading.caption_column is None else (reading.caption_column,)
    return [(image, caption) for image in images for caption in captions]
