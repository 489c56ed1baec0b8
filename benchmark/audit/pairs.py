"""The audit of pairs: reads them, gathers suspects of every kind, and writes what it found."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from benchmark.audit.captions import corpus, ngrams, repeated_captions
from benchmark.audit.same_images import repeated_images, same_images
from benchmark.audit.sheet import SIDE, write_sheet
from benchmark.audit.suspects import Ranked, Suspect, as_json, ranked, row_table, table
from benchmark.data.export import CARD, TABLES
from benchmark.data.image import decode_ref
from benchmark.data.manifest import Manifest
from benchmark.data.opened import is_export, is_poison_folder
from benchmark.data.poison_folder import read_json
from benchmark.data.reader import read_pairs
from benchmark.data.reading import Reading
from benchmark.errors import BenchError
from benchmark.progress import Progress
from benchmark.settings import canonical

if TYPE_CHECKING:
    from benchmark.train.model import Model

ON_SHEET = 20


@dataclass(frozen=True)
class Audit:
    """What was read, and what was found.

    Attributes:
        notes: what a reader should know of the pairs.
    """

    manifest: Manifest
    found: list[Ranked]
    notes: tuple[str, ...]


def audit_pairs(data: Path, reading: Reading, image_root: Path | None, model: Model | None, n: int, progress: Progress) -> Audit:
    """The first n suspects among the pairs that `data` names; with a model, what it sees as well.

    Raises:
        BenchError: the pairs cannot be read.
    """
    manifest = read_pairs(_table_of(data), reading, image_root, progress)
    captions, refs = manifest.captions, manifest.images
    read = corpus(captions, progress)
    images, broken = same_images(refs, progress)
    kinds: list[Iterable[Suspect]] = [repeated_images(captions, images, read.hashes), repeated_captions(captions, read, images), ngrams(read, images, n)]
    notes = list(manifest.warnings)
    if broken:
        notes.append(f"{len(broken)} image files cannot be read")
    if model is None:
        return Audit(manifest, ranked(kinds, n), tuple(notes))
    from benchmark.audit.under_model import contradicting_words, encode, outliers, unlike

    with tempfile.TemporaryDirectory(prefix="bench-audit-") as folder:
        features, cosines, undecoded = encode(model, refs, captions, Path(folder), progress)
        if undecoded:
            notes.append(f"{len(undecoded)} images cannot be decoded and were not shown to the model")
        kinds += [
            contradicting_words(captions, features, images, read.hashes, undecoded),
            unlike(captions, cosines, images, read.hashes, undecoded),
            outliers(captions, features, images, read.hashes, undecoded),
        ]
        return Audit(manifest, ranked([list(itertools.islice(kind, n)) for kind in kinds], n), tuple(notes))


def write(audit: Audit, out: Path) -> None:
    """Writes suspects.csv, rows.csv, suspects.json and sheet.png into a folder, which may exist.

    Raises:
        BenchError: it cannot be written.
    """
    from benchmark.report.tables import to_csv

    ids, images, captions = audit.manifest.ids, audit.manifest.images, audit.manifest.captions
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "suspects.csv").write_text(to_csv(table(audit.found)), encoding="utf-8")
        (out / "rows.csv").write_text(to_csv(row_table(audit.found, ids, images, captions)), encoding="utf-8")
        (out / "suspects.json").write_text(canonical({"n_pairs": len(ids), "notes": list(audit.notes), "suspects": as_json(audit.found, ids)}) + "\n", encoding="utf-8")
    except OSError as error:
        raise BenchError(f"cannot write to {out}: {error.strerror}") from None

    def pixels(row: int) -> NDArray[np.uint8] | None:
        try:
            return decode_ref(images[row], SIDE)
        except BenchError:
            return None

    write_sheet(audit.found[:ON_SHEET], captions, pixels, out / "sheet.png")


def lines(audit: Audit, n: int = ON_SHEET) -> list[str]:
    """The first suspects, a line each."""
    found = [f"{'rank':>4}  {'kind':<20}{'rows':>6}{'images':>8}{'captions':>10}  what"]
    for one in audit.found[:n]:
        about = one.suspect
        what = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in about.what)
        found.append(f"{one.rank:>4}  {about.kind:<20}{about.n_rows:>6}{about.n_images:>8}{about.n_captions:>10}  {what[:60]}")
    return found


def _table_of(data: Path) -> Path:
    """The pairs themselves, where a folder of this program's is named."""
    if is_poison_folder(data) is not None:
        raise BenchError(
            f"{data} is a folder of bench poison, whose images lie partly elsewhere; write it out with `bench export {data} --to open_clip --out FOLDER` and audit that"
        )
    to = read_json(data / CARD).get("export", {}).get("to") if is_export(data) else None
    return data / TABLES[to] if to in TABLES else data
