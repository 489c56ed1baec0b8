"""Pairs as the program holds them: ids, captions and decoded images, with tags where the data has them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from benchmark.data.images import Images, open_images, pick

SPLITS = ("train", "held_out", "clean")


@dataclass(frozen=True)
class Pairs:
    """Rows of image and caption.

    Attributes:
        ids: stable names, one a row.
        refs: where each image comes from (a path or a drawn row).
        captions: verbatim.
        images: uint8 (n, S, S, 3), memory-mapped or decoded when asked for.
        tags: columns of words known of each row (`object`, ...); empty for data that has none.
    """

    ids: list[str]
    refs: list[str]
    captions: list[str]
    images: Images
    tags: dict[str, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def side(self) -> int:
        """Image side in pixels."""
        return int(self.images.shape[1])

    def image(self, row: int) -> NDArray[np.uint8]:
        """A copy of one image, uint8 (S, S, 3)."""
        return np.array(self.images[row])


@dataclass(frozen=True)
class Source:
    """The finished `source` stage: all splits of a data set, decoded once.

    Attributes:
        train: what an attack may poison.
        held_out: images that no training row shows, for targets.
        clean: pairs that are granted to defenses which ask for them.
        content: hash of all captions and pixels; names the data in a run id.
        warnings: what a reader of a number should know about the data.
    """

    folder: Path
    name: str
    train: Pairs
    held_out: Pairs
    clean: Pairs
    content: str
    warnings: tuple[str, ...]
    counts: dict[str, int]


def save_rows(folder: Path, split: Sequence[str], ids: Sequence[str], refs: Sequence[str], captions: Sequence[str], tags: dict[str, list[str]]) -> None:
    """Writes the row table of a source."""
    table = pd.DataFrame({"split": list(split), "id": list(ids), "image": list(refs), "caption": list(captions), **{f"tag_{name}": values for name, values in tags.items()}})
    table.to_parquet(folder / "rows.parquet", compression="zstd", index=False)


def load_splits(folder: Path, n: int, side: int) -> dict[str, Pairs]:
    """The splits of a source, images memory-mapped."""
    table = pd.read_parquet(folder / "rows.parquet")
    images = open_images(folder, n, side)
    found = {}
    for split, begin, end in _runs(table["split"].tolist()):
        part = table.iloc[begin:end]
        tags = {str(name).removeprefix("tag_"): part[name].tolist() for name in part.columns if str(name).startswith("tag_")}
        found[split] = Pairs(
            part["id"].tolist(),
            part["image"].tolist(),
            part["caption"].tolist(),
            images[begin:end] if isinstance(images, np.ndarray) else pick(images, np.arange(begin, end)),
            tags,
        )
    return found


def _runs(labels: list[str]) -> Iterator[tuple[str, int, int]]:
    begin = 0
    for position in range(1, len(labels) + 1):
        if position == len(labels) or labels[position] != labels[begin]:
            yield labels[begin], begin, position
            begin = position
