"""Applies an attack's edits to a manifest and seals what was done to which row."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from benchmark.contract import Append, Attack, Edit, Replace
from benchmark.data.attack_lab import AttackLab, Surrogates
from benchmark.data.eval_sets import Suite
from benchmark.data.image import decode, pixels_sha256, png_bytes, psnr
from benchmark.data.manifest import make_ids, read_own, write_manifest
from benchmark.data.pairs import Pairs, Source
from benchmark.errors import BenchError
from benchmark.registry import Plugin
from benchmark.seeding import generator
from benchmark.settings import SCHEMA, canonical
from benchmark.stages import Stages, cost_file, write_atomically

VERSION = 1


@dataclass(frozen=True)
class Poisoned:
    """A finished poison: the manifest that training gets, and where the sealed record lies beside it."""

    manifest: Path
    record: Path

    def rows(self) -> tuple[list[str], list[str], list[str]]:
        """Ids, image references and captions."""
        return read_own(self.manifest / "manifest.tsv")


@dataclass(frozen=True)
class SealedRecord:
    """What was done. Opened by the evaluator and by controls that are told."""

    header: dict[str, Any]
    rows: pd.DataFrame
    kept: dict[str, Any]

    @property
    def n_poison(self) -> int:
        """Rows touched."""
        return int(self.header["n_poison"])


def poison(plugin: Plugin, attack: Attack, seed: int, source: Source, suite: Suite, sham: bool, stages: Stages, surrogates: Surrogates | None = None) -> Poisoned:
    """The poisoned manifest and its sealed record, from the cache or made now.

    Args:
        surrogates: where an attack with access to features or gradients gets its own model; no other attack is given them.

    Raises:
        BenchError: the attack cannot be carried out; said before anything is trained on.
    """
    if attack.access == "none":
        surrogates = None
    elif surrogates is None:
        raise BenchError(f"attack {plugin.name} needs a surrogate model (access: {attack.access}), and none is granted here")
    facts: dict[str, Any] = {
        "stage": "poison",
        "version": VERSION,
        "source": source.content,
        "files": source.folder.name,
        "suite": suite.content,
        "attack": plugin.name,
        "code": plugin.source,
        "options": attack.model_dump(mode="json"),
        "seed": seed,
        "sham": sham,
    }
    if surrogates is not None:
        facts["surrogate"] = surrogates.facts()
    folder = stages.make("poison", facts, partial(_build, AttackLab(source, suite, plugin.name, seed, sham, surrogates), attack, stages))
    return Poisoned(folder / "poisoned", folder / "poisoned.record")


def open_record(folder: Path) -> SealedRecord:
    """The sealed record in this folder."""
    header = json.loads((folder / "record.json").read_text())
    kept = dict(header["kept"])
    for path in folder.glob("*.npy"):
        kept[path.stem] = np.load(path, allow_pickle=False)
    return SealedRecord(header, pd.read_parquet(folder / "rows.parquet"), kept)


def attack_seconds(poisoned: Poisoned) -> float | None:
    """How long the attack took where the poison was made, its surrogate left out; None if that is not known any more."""
    path = cost_file(poisoned.record.parent)
    return float(json.loads(path.read_text())["seconds"]) if path.is_file() else None


def _build(lab: AttackLab, attack: Attack, stages: Stages, folder: Path) -> None:
    source, seed = lab.source, lab.seed
    began = time.perf_counter()
    edits = list(attack.poison(source.train, lab))
    if lab.sham and not lab.triggers:
        raise BenchError(f"attack {lab.attack} has no trigger that --sham could leave out: the whole attack would stay; leave --sham or that attack out")
    write_atomically(cost_file(folder), canonical({"seconds": time.perf_counter() - began - lab.seconds_waited}).encode())
    (folder / "poisoned").mkdir()
    (folder / "poisoned.record").mkdir()
    ids, refs, captions, rows = apply(source.train, edits, folder / "poisoned", seed, lab.stamps)
    manifest_sha256 = write_manifest(folder / "poisoned" / "manifest.tsv", ids, refs, captions)
    _check_disjoint(rows, source)
    _check_untested(rows, lab, stages)
    table = pd.DataFrame(rows, columns=_COLUMNS).sort_values("id", kind="stable")
    table.to_parquet(folder / "poisoned.record" / "rows.parquet", index=False)
    arrays = {key: value for key, value in lab.kept.items() if isinstance(value, np.ndarray)}
    for key, value in arrays.items():
        np.save(folder / "poisoned.record" / f"{key}.npy", value, allow_pickle=False)
    header: dict[str, Any] = {
        "schema": SCHEMA,
        "warning": "contains poisoned training data" if rows else "no poison",
        "attack": lab.attack,
        "options": attack.model_dump(mode="json"),
        "attack_seed": seed,
        "sham": lab.sham,
        "source": source.content,
        "poisoned_manifest_sha256": manifest_sha256,
        "n_rows_before": len(source.train),
        "n_rows": len(ids),
        "n_requested": lab.n_requested,
        "n_poison": len(rows),
        "poison_rate": len(rows) / len(ids),
        "edit_mode": "+".join(sorted({row["edit"] for row in rows})) or "none",
        "triggers": lab.triggers,
        "warnings": lab.warnings,
        "kept": {key: value for key, value in lab.kept.items() if key not in arrays},
    }
    if lab.surrogate_about is not None:
        header["surrogate"] = lab.surrogate_about
    (folder / "poisoned.record" / "record.json").write_text(canonical(header))


_COLUMNS = ["id", "source_id", "edit", "role", "target", "pixels_sha256_before", "pixels_sha256_after", "caption_before", "caption_after", "caption_source_id", "trigger", "psnr"]


def apply(pairs: Pairs, edits: Sequence[Edit], folder: Path, seed: int, stamps: dict[str, str]) -> tuple[list[str], list[str], list[str], list[dict[str, Any]]]:
    """The rows after the edits, and one record row an edit.

    Replaced rows keep their id; appended rows are interleaved at seeded places. New images go to a content-addressed
    store in `folder`, where their names tell nothing.

    Raises:
        BenchError: two edits of one row, or a row that does not exist.
    """
    ids, refs, captions = list(pairs.ids), list(pairs.refs), list(pairs.captions)
    rows: list[dict[str, Any]] = []
    touched: set[int] = set()
    appended: list[Append] = []
    for edit in edits:
        if isinstance(edit, Append):
            appended.append(edit)
            continue
        if not 0 <= edit.row < len(pairs) or edit.row in touched:
            raise BenchError(f"the attack edits row {edit.row} {'twice' if edit.row in touched else f'of {len(pairs)}'}; each existing row can be replaced once")
        touched.add(edit.row)
        rows.append(_replaced(pairs, edit, stamps))
        if edit.image is not None:
            refs[edit.row] = _store(edit.image, pairs.side, folder)
        if edit.caption is not None:
            captions[edit.row] = edit.caption
    new_refs = [_store(edit.image, pairs.side, folder) for edit in appended]
    new_ids = make_ids(new_refs, [edit.caption for edit in appended])
    rows += [_appended(edit, row_id, stamps) for edit, row_id in zip(appended, new_ids, strict=True)]
    # Slots of the longer list for the appended rows; the others keep their order.
    total = len(ids) + len(appended)
    slots = set(generator("interleave", seed).permutation(total)[: len(appended)].tolist())
    old, new = iter(zip(ids, refs, captions, strict=True)), iter(zip(new_ids, new_refs, [edit.caption for edit in appended], strict=True))
    woven = [next(new) if slot in slots else next(old) for slot in range(total)]
    return [row[0] for row in woven], [row[1] for row in woven], [row[2] for row in woven], rows


def read_image(ref: str, folder: Path, side: int) -> NDArray[np.uint8]:
    """A stored image of a poisoned manifest."""
    return decode(folder / ref, side)


def _store(image: NDArray[np.uint8], side: int, folder: Path) -> str:
    if image.dtype != np.uint8 or image.shape != (side, side, 3):
        raise BenchError(f"an edit's image must be uint8 ({side}, {side}, 3), got {image.dtype} {image.shape}")
    content = png_bytes(image)
    name = hashlib.sha256(content).hexdigest()
    path = folder / "images" / name[:2] / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return str(path.relative_to(folder))


def _replaced(pairs: Pairs, edit: Replace, stamps: dict[str, str]) -> dict[str, Any]:
    before = pairs.image(edit.row)
    after = before if edit.image is None else edit.image
    row_id = pairs.ids[edit.row]
    return {
        "id": row_id,
        "source_id": edit.why.source or row_id,
        "edit": "replace",
        "role": edit.why.role,
        "target": edit.why.target,
        "pixels_sha256_before": pixels_sha256(before),
        "pixels_sha256_after": pixels_sha256(after),
        "caption_before": pairs.captions[edit.row],
        "caption_after": pairs.captions[edit.row] if edit.caption is None else edit.caption,
        "caption_source_id": edit.why.caption_source or "",
        "trigger": stamps.get(row_id, ""),
        "psnr": psnr(before, after),
    }


def _appended(edit: Append, row_id: str, stamps: dict[str, str]) -> dict[str, Any]:
    return {
        "id": row_id,
        "source_id": edit.why.source or "",
        "edit": "append",
        "role": edit.why.role,
        "target": edit.why.target,
        "pixels_sha256_before": "",
        "pixels_sha256_after": pixels_sha256(edit.image),
        "caption_before": "",
        "caption_after": edit.caption,
        "caption_source_id": edit.why.caption_source or "",
        "trigger": stamps.get(edit.why.source or "", ""),
        "psnr": float("nan"),
    }


def _check_disjoint(rows: list[dict[str, Any]], source: Source) -> None:
    """No held-out image that an attack appends may stand among the clean rows already."""
    appended = {row["pixels_sha256_after"]: row["source_id"] for row in rows if row["edit"] == "append" and not row["trigger"]}
    if appended:
        hashes = (source.folder / "pixels.txt").read_text().split()[: len(source.train)]
        shared = appended.keys() & set(hashes)
        if shared:
            raise BenchError(f"held-out image {appended[next(iter(shared))]} also stands among the training pairs; take the duplicates out of the manifest")


def _check_untested(rows: list[dict[str, Any]], lab: AttackLab, stages: Stages) -> None:
    """No image that an attack appends, edits or starts from may be one that is measured, unless the attack declares it.

    Of other pairs that show a test image the sealed record has a warning: they are the user's own.
    """
    tested = _tested(lab.suite, stages)
    source = lab.source
    hashes = (source.folder / "pixels.txt").read_text().split()
    ids = [*source.train.ids, *source.held_out.ids, *source.clean.ids]
    shared = [(row_id, tested[pixels]) for row_id, pixels in zip(ids, hashes, strict=True) if pixels in tested]
    if shared:
        named = ", ".join(f"{row_id} is {image}" for row_id, image in shared[:5])
        lab.warnings.append(
            f"{len(shared)} of the {len(ids)} pairs show test images ({named}{', ...' if len(shared) > 5 else ''}), so what is measured on these was trained on or granted"
        )
    held_out = dict(zip(source.held_out.ids, hashes[len(source.train) :], strict=False))
    for row in rows:
        # A composed image has several sources, joined with a plus.
        parts = [held_out.get(name, "") for name in {row["source_id"], *row["source_id"].split("+")}]
        shown = {row["pixels_sha256_before"], row["pixels_sha256_after"], *parts} & tested.keys() - lab.declared
        if shown:
            raise BenchError(
                f"image {row['source_id']}, which the attack takes, is test image {tested[min(shown)]}; what is trained on must not be measured, so take it out of the pairs or of the evaluation set"
            )


def _tested(suite: Suite, stages: Stages) -> dict[str, str]:
    """Evaluation set and id of every test image, by the hash of its pixels; hashed once for a suite."""

    def build(folder: Path) -> None:
        found: dict[str, str] = {}
        # Sets may share their images, which are then hashed once.
        for one in {one.test.name: one for one in reversed(suite.sets.values())}.values():
            for row_id, image in zip(one.test.ids, one.test.images, strict=True):
                found.setdefault(pixels_sha256(image), f"{row_id} of {one.name}")
        (folder / "test.json").write_text(canonical(found))

    folder = stages.make("test_pixels", {"stage": "test_pixels", "version": VERSION, "suite": suite.content}, build)
    found: dict[str, str] = json.loads((folder / "test.json").read_text())
    return found
