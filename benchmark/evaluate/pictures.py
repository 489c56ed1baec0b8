"""A few pictures of a poison for the report: edited pairs before and after, targets, triggered queries.

They lie beside the runs, once for all runs of one poison: `<results>/gallery/<key>/`, where the key follows from a run's record.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from benchmark.contract import Probe
from benchmark.data.eval_sets import Suite
from benchmark.data.image import png_bytes, psnr
from benchmark.data.pairs import Source
from benchmark.data.poison import Poisoned, SealedRecord, read_image
from benchmark.evaluate.attack_success import Queries
from benchmark.evaluate.retrieval import Retrieval
from benchmark.gallery import ssim
from benchmark.settings import canonical, digest
from benchmark.stages import damage, seal

VERSION = 1
MOST_SIDE = 96
N_EDITS, N_QUERIES, N_TARGETS = 4, 6, 32
Pixels = NDArray[np.uint8]


@dataclass
class _Store:
    """Images by the hash of their bytes, so that one that is shown twice is kept once."""

    folder: Path
    known: dict[str, str] = field(default_factory=dict)

    def put(self, image: Pixels) -> str:
        """The file name of an image, at most MOST_SIDE pixels wide."""
        content = png_bytes(thumbnail(image))
        name = hashlib.sha256(content).hexdigest()[:16] + ".png"
        (self.folder / name).write_bytes(content)
        return name


def gallery_key(record: Mapping[str, Any]) -> str:
    """Names the pictures of a run by its poisoned manifest and by what its numbers refer to."""
    return digest([VERSION, record["poison"]["manifest_sha256"], sorted(record["cards"])])[:12]


def thumbnail(image: Pixels) -> Pixels:
    """The image itself, or a smaller copy where it is larger than MOST_SIDE."""
    if image.shape[0] <= MOST_SIDE:
        return image
    return np.asarray(Image.fromarray(image).resize((MOST_SIDE, MOST_SIDE), Image.Resampling.LANCZOS), dtype=np.uint8)


def keep_pictures(
    results: Path,
    run: Mapping[str, Any],
    source: Source,
    suite: Suite,
    poisoned: Poisoned,
    record: SealedRecord,
    probes: Sequence[Probe],
    asked: Callable[[], Mapping[str, Queries | Retrieval]],
) -> Path | None:
    """Writes the pictures of a run's poison, if they are not there; None for a run without poison.

    Args:
        run: its `record.json`.
        asked: the queries of each probe, by its name.
    """
    if not len(record.rows):
        return None
    folder = results / "gallery" / gallery_key(run)
    if folder.is_dir() and damage(folder) is None:
        return folder
    part = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    store = _Store(part)
    found = {
        "version": VERSION,
        "side": source.train.side,
        "classes": {name: list(one.classnames) for name, one in suite.sets.items() if name in {probe.eval_set for probe in probes}},
        "edits": _edits(_spread(record.rows), source, poisoned, record, store),
        "queries": {probe.name: [*_queries(probe, one, store)] for probe in probes if probe.control is None and isinstance(one := asked()[probe.name], Queries)},
    }
    (part / "gallery.json").write_text(canonical(found))
    seal(part, {"key": folder.name})
    shutil.rmtree(folder, ignore_errors=True)
    try:
        part.rename(folder)
    except OSError:  # another run of the same poison was faster
        shutil.rmtree(part, ignore_errors=True)
    return folder


def open_pictures(results: Path, run: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `keep_pictures` wrote, with the folder of the images as `folder`; None if there is nothing whole."""
    folder = results / "gallery" / gallery_key(run)
    if not folder.is_dir() or damage(folder) is not None:
        return None
    found: dict[str, Any] = json.loads((folder / "gallery.json").read_text())
    return found | {"folder": folder}


def _spread(rows: pd.DataFrame) -> list[Mapping[str, Any]]:
    """N_EDITS rows, of as many triggers, targets and roles as possible."""
    ranked: list[Mapping[str, Any]] = [{str(name): value for name, value in row.items()} for row in rows.sort_values("id", kind="stable").to_dict("records")]
    seen: dict[tuple[Any, ...], int] = {}
    order = []
    for row in ranked:
        kind = (row["trigger"], row["target"], row["role"])
        seen[kind] = seen.get(kind, 0) + 1
        order.append((seen[kind], row["role"] != "poison"))
    return [ranked[index] for index in sorted(range(len(ranked)), key=lambda index: order[index])[:N_EDITS]]


def _edits(rows: Sequence[Mapping[str, Any]], source: Source, poisoned: Poisoned, record: SealedRecord, store: _Store) -> list[dict[str, Any]]:
    ids, refs, _ = poisoned.rows()
    own = {str(edit["id"]) for edit in rows}
    stored = {row_id: ref for row_id, ref in zip(ids, refs, strict=True) if row_id in own}
    named = set(stored.values())
    known = {ref: row for row, ref in enumerate(source.train.refs) if ref in named}
    targets = record.kept.get("targets", [])
    found = []
    for edit in rows:
        ref = stored[str(edit["id"])]
        after = source.train.image(known[ref]) if ref in known else read_image(ref, poisoned.manifest, source.train.side)
        before = _before(str(edit["source_id"]), source)
        changed = before is not None and not np.array_equal(before, after)
        target = targets[edit["target"]] if edit["target"] < len(targets) else {}
        found.append(
            {
                **{name: str(edit[name]) for name in ("id", "source_id", "edit", "role", "caption_before", "caption_after", "trigger")},
                "goal": str(target.get("class", "")),
                "after": store.put(after),
                "before": store.put(before) if before is not None and changed else None,
                "psnr": psnr(before, after) if before is not None and changed else None,
                "ssim": ssim(before, after) if before is not None and changed and after.shape[0] >= 11 else None,
            }
        )
    return found


def _before(source_id: str, source: Source) -> Pixels | None:
    """The image that was edited or added, as it was."""
    for pairs in (source.train, source.held_out):
        if source_id in pairs.ids:
            return pairs.image(pairs.ids.index(source_id))
    return None


def _queries(probe: Probe, asked: Queries, store: _Store) -> Iterator[dict[str, Any]]:
    """All targets of a targeted attack; of a backdoor, queries that count, of different true classes."""
    counted = np.flatnonzero(asked.attacked(probe).numpy())
    if probe.trigger is None:
        chosen = counted[:N_TARGETS]
    else:
        first = {int(asked.true[index]): int(index) for index in reversed(counted)}
        chosen = np.array(sorted(first.values())[:N_QUERIES], dtype=np.int64)
    for index in chosen:
        plain, triggered = np.asarray(asked.plain[index]), np.asarray(asked.triggered[index])
        same = probe.trigger is None or np.array_equal(plain, triggered)
        yield {
            "id": asked.ids[index],
            "image": store.put(plain),
            "triggered": None if same else store.put(triggered),
            "true": int(asked.true[index]),
            "goal": int(asked.goal[index]),
        }
