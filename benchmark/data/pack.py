"""What training reads: decoded images and tokens of the (poisoned) manifest, and nothing about poison."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmark.data.images import Images, PickedImages, Veiled, open_images, resident
from benchmark.data.pairs import Source
from benchmark.data.poison import Poisoned, read_image
from benchmark.data.tokens import Tokenizer
from benchmark.progress import Progress
from benchmark.stages import Stages, file_sha256

VERSION = 1


@dataclass(frozen=True)
class Pack:
    """Pairs as training reads them; rows are positions.

    Attributes:
        images: uint8 (n, S, S, 3). Decoded sources are copied with the attack's images in their places; over encoded ones
            the attack's images are laid when a row is read, behind a veil.
        tokens: uint16 (n, L).
        captions: verbatim.
        content: hash of all of it.
    """

    images: Images
    tokens: NDArray[np.uint16]
    captions: list[str]
    content: str
    n_long: int

    def __len__(self) -> int:
        return len(self.captions)


def pack(poisoned: Poisoned, source: Source, tokenizer: Tokenizer, eot: str, stages: Stages, progress: Progress) -> Pack:
    """The packed pairs, from the cache or made now. Images that the source has decoded are not decoded again."""
    facts = {
        "stage": "pack",
        "version": VERSION,
        "poison": poisoned.manifest.parent.name,
        "source": source.content,
        "tokenizer": tokenizer.name,
        "context": tokenizer.context_length,
        "eot": eot,
    }
    if not resident(source.train.images):
        facts |= {"codec": "bytes"}
    return load_pack(stages.make("pack", facts, partial(_build, poisoned, source, tokenizer, eot, progress)), source)


def load_pack(folder: Path, source: Source) -> Pack:
    """The pack in a finished stage folder."""
    about = json.loads((folder / "pack.json").read_text())
    n, side, length = about["n"], about["side"], about["length"]
    images = open_images(folder, about.get("n_new", n), side)
    if "n_new" in about:
        images = Veiled(PickedImages(source.train.images, np.load(folder / "places.npy", allow_pickle=False), images))
    tokens = np.fromfile(folder / "tokens.u16", dtype=np.uint16).reshape(n, length)
    captions = json.loads((folder / "captions.json").read_text())
    return Pack(images, tokens, captions, about["content"], about["n_long"])


def _build(poisoned: Poisoned, source: Source, tokenizer: Tokenizer, eot: str, progress: Progress, folder: Path) -> None:
    _, refs, captions = poisoned.rows()
    known = {ref: row for row, ref in enumerate(source.train.refs)}
    files = ["images.u8", "tokens.u16", "captions.json"]
    about: dict[str, Any] = {"n": len(refs), "side": source.train.side}
    written = refs
    if not resident(source.train.images):
        written = list(dict.fromkeys(ref for ref in refs if ref not in known))
        places = known | {ref: -1 - index for index, ref in enumerate(written)}
        np.save(folder / "places.npy", np.array([places[ref] for ref in refs], dtype=np.int64))
        files.append("places.npy")
        about["n_new"] = len(written)
    with open(folder / "images.u8", "wb") as out, progress.bar("packing", len(written), "pairs") as advance:
        for ref in written:
            row = known.get(ref)
            image = source.train.images[row] if row is not None else read_image(ref, poisoned.manifest, source.train.side)
            out.write(image.tobytes())
            advance(1)
    tokens, n_long = tokenizer.encode(captions, eot)
    tokens.tofile(folder / "tokens.u16")
    (folder / "captions.json").write_text(json.dumps(captions))
    content = "-".join(file_sha256(folder / name)[:16] for name in files)
    if "n_new" in about:
        content += f"-{source.content[:16]}"
    about |= {"length": int(tokens.shape[1]), "content": content, "n_long": n_long}
    (folder / "pack.json").write_text(json.dumps(about, sort_keys=True))
