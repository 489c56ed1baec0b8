"""What a snapshot makes of the training pairs themselves: how alike image and caption are, and which caption of a pool is nearest.

With the sealed record, so the evaluator's business alone; training and defenses never see these numbers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from benchmark.data.eval_sets import Suite
from benchmark.data.pack import Pack
from benchmark.data.pairs import Source
from benchmark.data.poison import SealedRecord
from benchmark.seeding import generator
from benchmark.settings import canonical
from benchmark.train.model import Model

VERSION = 3
N_PAIRS = 500
POOL_SHARE, MIN_POOL, POOLED = 0.02, 128, 1024
NO_CLASSES = "the data have no tags that say what a poisoned image shows"
NO_ONE_CLASS = "the poisoned images are composed of several, so they have no one true class"


@dataclass(frozen=True)
class Asked:
    """The rows that each snapshot of a training is asked about; positions in the pack.

    Attributes:
        poisoned: of role `poison`, at most N_PAIRS, drawn once for all epochs.
        clean: untouched rows, as many at most.
        pools: (k, P), captions drawn from all rows, poisoned ones among them at their rate: 2 % of the pairs, whatever the size of a defense's own pool.
        true, goal: class number of what each poisoned image shows (-1 for a composed one, which has no one class) and of what its caption says; empty
            where the data do not say.
        of_caption: class number of each caption in `pools`, (k, P, poisoned): equal numbers mean the class of that poisoned row.
    """

    poisoned: NDArray[np.int64]
    clean: NDArray[np.int64]
    pools: NDArray[np.int64]
    true: NDArray[np.int64]
    goal: NDArray[np.int64]
    of_caption: list[NDArray[np.int64]]


def ask(ids: Sequence[str], record: SealedRecord, source: Source, suite: Suite) -> Asked:
    """The questions about these rows of the poisoned manifest."""
    position = {row_id: row for row, row_id in enumerate(ids)}
    rows = record.rows[record.rows["role"] == "poison"]
    known = [(position[row_id], index) for index, row_id in enumerate(rows["id"])]
    known = [known[at] for at in _draw("poisoned", len(known), N_PAIRS)]
    touched = {position[row_id] for row_id in record.rows["id"]}
    untouched = np.array([row for row in range(len(ids)) if row not in touched], dtype=np.int64)
    clean = untouched[_draw("clean", len(untouched), N_PAIRS)]
    poisoned = np.array([row for row, _ in known], dtype=np.int64)
    size = min(len(ids), max(MIN_POOL, round(POOL_SHARE * len(ids))))
    n_pools = max(1, POOLED // size) if known else 0
    pools = np.stack([np.sort(generator("pairs", "pool", index).permutation(len(ids))[:size]) for index in range(n_pools)]) if n_pools else np.zeros((0, size), dtype=np.int64)
    none = np.zeros(0, dtype=np.int64)
    classes = _Classes.of(record, source, suite) if known else None
    if classes is None:
        return Asked(poisoned, clean, pools[:0], none, none, [])
    chosen = rows.iloc[[index for _, index in known]]
    columns = [classes.column[target] for target in chosen["target"]]
    true = np.array([classes.of_image(source_id, column) for source_id, column in zip(chosen["source_id"], columns, strict=True)], dtype=np.int64)
    goal = np.array([classes.of_caption(row_id, column) for row_id, column in zip(chosen["id"], columns, strict=True)], dtype=np.int64)
    by_column = {column: np.array([[classes.of_caption(ids[row], column) for row in pool] for pool in pools], dtype=np.int64) for column in dict.fromkeys(columns)}
    return Asked(poisoned, clean, pools, true, goal, [by_column[column] for column in columns])


def measure(model: Model, packed: Pack, asked: Asked) -> dict[str, float]:
    """The values of one snapshot, as `name/pairs`; what cannot be had is left out.

    `poisoned_similarity`, `clean_similarity`: mean cosine of image and caption, both as training holds them, without augmentation.
    `pool_true_class`, `pool_goal_class`: share of poisoned images whose nearest caption in a pool is of the class that the image
    shows, or of the one that the image's own caption says: the attack's target class, or the caption's as it was where the attack
    changed the image alone. Means over pools, each over the images whose class is known.
    """
    found = {}
    features = {}
    for name, rows in (("poisoned", asked.poisoned), ("clean", asked.clean)):
        if len(rows):
            image, text = model.encode_images(packed.images[rows]), model.encode_tokens(packed.tokens[rows])
            features[name] = image
            found[f"{name}_similarity/pairs"] = float((image * text).sum(dim=1).double().mean())
    if len(asked.pools) and len(asked.true):
        used, places = np.unique(asked.pools, return_inverse=True)
        captions = model.encode_tokens(packed.tokens[used])
        said = np.stack([_nearest(features["poisoned"], captions[places.reshape(asked.pools.shape)[pool]], asked, pool) for pool in range(len(asked.pools))])
        for name, classes in (("true", asked.true), ("goal", asked.goal)):
            known = classes >= 0
            if known.any():
                found[f"pool_{name}_class/pairs"] = float((said == classes)[:, known].mean(axis=1).mean())
    return found


def write(load: Callable[[], Sequence[Model]], packed: Pack, asked: Asked, folder: Path) -> None:
    """Writes `pairs.json` of a snapshot to a stage folder."""
    (folder / "pairs.json").write_text(canonical(measure(load()[0], packed, asked)))


def read(folder: Path) -> dict[str, float]:
    """What `write` wrote."""
    found: dict[str, float] = json.loads((folder / "pairs.json").read_text())
    return found


def not_run(points: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Values that the metrics of a curve's points lack, and why."""
    asked = [point for point in points if "poisoned_similarity/pairs" in point]
    lacking = [name for name in ("pool_true_class", "pool_goal_class") if any(f"{name}/pairs" not in point for point in asked)]
    return {name: NO_CLASSES if len(lacking) == 2 else NO_ONE_CLASS for name in lacking}


def _nearest(images: Tensor, captions: Tensor, asked: Asked, pool: int) -> NDArray[np.int64]:
    """The class of each image's nearest caption."""
    chosen = (images @ captions.T).argmax(dim=1).numpy()
    return np.array([asked.of_caption[row][pool][place] for row, place in enumerate(chosen)], dtype=np.int64)


def _draw(purpose: str, n: int, most: int) -> NDArray[np.int64]:
    return np.sort(generator("pairs", purpose).permutation(n)[:most]) if n else np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class _Classes:
    """What rows show, by tag column; numbers stand for words of a column, -1 for none."""

    numbers: dict[str, int]
    images: dict[str, dict[str, str]]
    edited: dict[str, tuple[str, str]]
    column: dict[int, str]

    @staticmethod
    def of(record: SealedRecord, source: Source, suite: Suite) -> _Classes | None:
        """None where the data have no tag that matches the targets' evaluation sets."""
        targets: list[Mapping[str, Any]] = list(record.kept.get("targets", []))
        tags = source.train.tags
        column, word = {}, {}
        for index, target in enumerate(targets):
            eval_set = suite.sets.get(str(target.get("eval_set")))
            fitting = [name for name, values in tags.items() if eval_set is not None and set(values) <= set(eval_set.classnames)]
            if not fitting or "class" not in target:
                return None
            column[index], word[index] = fitting[0], str(target["class"])
        rows = record.rows
        if not targets or not set(rows["target"]) <= set(column):
            return None
        words = sorted({value for name in column.values() for pairs in (source.train, source.held_out) for value in pairs.tags[name]} | set(word.values()))
        numbers = {value: number for number, value in enumerate(words)}
        images = {
            name: {row_id: value for pairs in (source.held_out, source.train) for row_id, value in zip(pairs.ids, pairs.tags[name], strict=True)}
            for name in dict.fromkeys(column.values())
        }
        changed = rows[rows["caption_before"] != rows["caption_after"]]
        edited = {row_id: (column[target], word[target]) for row_id, target in zip(changed["id"], changed["target"], strict=True)}
        return _Classes(numbers, images, edited, column)

    def of_image(self, source_id: str, column: str) -> int:
        """The class of the image with this id."""
        return self.numbers.get(self.images[column].get(source_id, ""), -1)

    def of_caption(self, row_id: str, column: str) -> int:
        """The class of the row that a caption belongs to; of an edited one, the class that the attack wrote there."""
        if row_id in self.edited and self.edited[row_id][0] == column:
            return self.numbers[self.edited[row_id][1]]
        return self.of_image(row_id, column)
