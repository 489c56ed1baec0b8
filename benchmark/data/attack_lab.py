"""What an attack may use while it poisons: random streams, budgets, caption search, held-out images, objects, a model of its own."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from benchmark.contract import Trigger
from benchmark.data.eval_sets import Suite
from benchmark.data.image import pixels_sha256
from benchmark.data.mentions import Match, mentions
from benchmark.data.objects import Cutout, Shelf, backgrounds_in, drawn_backgrounds, drawn_objects, is_drawn, objects_in
from benchmark.data.pairs import Pairs, Source
from benchmark.errors import BenchError
from benchmark.progress import Progress, silent
from benchmark.seeding import generator, stream_key
from benchmark.settings import digest

if TYPE_CHECKING:
    from benchmark.train.model import Model

SURROGATE_SEED = 1_000_003


@dataclass(frozen=True)
class SurrogateRequest:
    """Which surrogate an attack asks for: a checkpoint, or plain CLIP trained here with this seed.

    Attributes:
        architecture: of a checkpoint that does not say it.
        writer: who wrote the checkpoint, where the file leaves that open.
    """

    seed: int = SURROGATE_SEED
    checkpoint: Path | None = None
    architecture: str | None = None
    writer: Literal["auto", "open_clip", "cyclip"] = "auto"


@dataclass(frozen=True)
class Surrogate:
    """A frozen model of the attacker's own, and what the sealed record says of it."""

    model: Model
    about: dict[str, Any]


class Surrogates(Protocol):
    """Where a run's surrogate comes from."""

    @property
    def progress(self) -> Progress:
        """Where long work says how far it is."""
        ...

    def facts(self) -> dict[str, Any]:
        """What a surrogate depends on beside the pairs and the attack's own options."""
        ...

    def find(self, wanted: SurrogateRequest) -> Surrogate:
        """The surrogate, from the cache or made now."""
        ...


@dataclass
class AttackLab:
    """The attacker's side of the harness.

    Attributes:
        held_out: pairs whose images no training row shows.
        suite: evaluation sets: class names, synonyms, templates.
        kept: what `keep` was given; sealed, and handed to `probes`.
        warnings: lines for the run record.
        declared: pixel hashes of test images that the attack says it trains on.
        surrogate_about: what the sealed record says of the surrogate; None if none was asked for.
        seconds_waited: time spent on the surrogate.
    """

    source: Source
    suite: Suite
    attack: str
    seed: int
    sham: bool = False
    surrogates: Surrogates | None = None
    kept: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    triggers: dict[str, dict[str, Any]] = field(default_factory=dict)
    stamps: dict[str, str] = field(default_factory=dict)
    n_requested: int = 0
    declared: set[str] = field(default_factory=set)
    surrogate_about: dict[str, Any] | None = None
    seconds_waited: float = 0.0

    @property
    def held_out(self) -> Pairs:
        """Held-out pairs."""
        return self.source.held_out

    @cached_property
    def unseen(self) -> list[int]:
        """Rows of `held_out` whose image no training row shows, and no earlier held-out row."""
        hashes = (self.source.folder / "pixels.txt").read_text().split()
        n = len(self.source.train)
        seen = set(hashes[:n])
        rows = []
        for row, pixels in enumerate(hashes[n : n + len(self.held_out)]):
            if pixels not in seen:
                seen.add(pixels)
                rows.append(row)
        return rows

    @property
    def side(self) -> int:
        """Image side in pixels."""
        return self.source.train.side

    def rng(self, purpose: str, key: object = "") -> np.random.Generator:
        """A generator of its own for each decision, so that adding a target moves no other target's draw."""
        return generator("attack", self.seed, self.attack, purpose, key)

    def choose(self, purpose: str, ids: Iterable[str], n: int) -> list[str]:
        """The n ids with the smallest keyed hash: uniform, and independent of row order and of other rows."""
        return sorted(ids, key=lambda row_id: stream_key("attack", self.seed, self.attack, purpose, row_id))[:n]

    def budget(self, rate: float | None = None, count: int | None = None, append: bool = False) -> int:
        """How many rows to touch: an exact count, never a Bernoulli draw.

        Args:
            rate: poisoned rows / all rows trained on, in [0, 0.5].
            append: rows are added, so the rate's denominator grows with them.

        Raises:
            BenchError: a rate above 0 that comes to no row.
        """
        n_rows = len(self.source.train)
        if count is None:
            rate = rate or 0.0
            if not 0 <= rate <= 0.5:
                raise BenchError(f"expected attack.rate in [0, 0.5], got {rate}. A rate is a fraction: 3 % is 0.03.")
            count = int(rate * n_rows / (1 - rate) + 0.5) if append else int(rate * n_rows + 0.5)
            if rate > 0 and count == 0:
                raise BenchError(f"attack.rate {rate} of {n_rows} pairs comes to no row; {int(np.ceil(0.5 / rate))} pairs would be enough for one")
        if not append and count > n_rows:
            raise BenchError(f"attack.count {count} is more than the {n_rows} pairs there are")
        self.n_requested = count
        return count

    def mentions(self, terms: Iterable[str], match: Match = "word", pairs: Pairs | None = None) -> list[bool]:
        """For each training pair (or pair of `pairs`), whether its caption mentions one of the terms."""
        return mentions((self.source.train if pairs is None else pairs).captions, list(terms), match)

    def stamp(self, trigger: Trigger, image: NDArray[np.uint8], key: str) -> NDArray[np.uint8]:
        """The image with the trigger, written down for the sealed record; in a sham run, the image as it was."""
        spec = trigger.spec()
        name = digest(spec)[:16]
        self.triggers[name] = spec
        self.stamps[key] = name
        return image.copy() if self.sham else trigger.image(image, key)

    def stamp_text(self, trigger: Trigger, text: str, key: str) -> str:
        """The text with the trigger, written down for the sealed record; in a sham run, the text as it was.

        Args:
            key: id of the row that is replaced, or of the image that an appended row shows.
        """
        spec = trigger.spec()
        name = digest(spec)[:16]
        self.triggers[name] = spec
        self.stamps[key] = name
        return text if self.sham else trigger.text(text, key)

    def keep(self, name: str, value: Any) -> None:
        """Hands JSON or an array to the sealed record and to `probes`."""
        if not isinstance(value, np.ndarray):
            value = json.loads(json.dumps(value, allow_nan=False))
        self.kept[name] = value

    def declare_test_image(self, image: NDArray[np.uint8], name: str) -> None:
        """Says that a test image, uint8 (S, S, 3), is trained on because it is itself the goal; every other one is refused."""
        self.declared.add(pixels_sha256(image))
        self.warnings.append(f"{self.attack}: test image {name} is trained on, because it is the goal of the attack")

    def objects(self, classname: str, folder: Path | None = None) -> Shelf[Cutout]:
        """Objects of a class with masks, that no training row shows.

        Args:
            folder: `CLASS/NAME.jpg` with `CLASS/NAME.mask.png`; None for the drawn world's own.

        Raises:
            BenchError: the data have no masks, or the folder none of this class.
        """
        if folder is not None:
            return objects_in(folder, classname)
        if not is_drawn(self.held_out):
            raise BenchError(
                f"attack {self.attack} needs objects with masks and {self.source.name} has none; give a folder of CLASS/NAME.jpg and CLASS/NAME.mask.png with --set attack.masks=FOLDER"
            )
        return drawn_objects(self.held_out, self.unseen, classname)

    def backgrounds(self, folder: Path | None = None) -> Shelf[NDArray[np.uint8]]:
        """Empty scenes uint8 (h, w, 3): images of a folder; None for the drawn world's held-out papers.

        Raises:
            BenchError: the data have none, or the folder holds no image.
        """
        if folder is not None:
            return backgrounds_in(folder)
        if not is_drawn(self.held_out):
            raise BenchError(
                f"attack {self.attack} needs backgrounds and {self.source.name} has none; give a folder of scenes without the target class with --set attack.scenes=FOLDER"
            )
        return drawn_backgrounds(self.held_out, self.unseen)

    @property
    def progress(self) -> Progress:
        """Where an attack that computes for long says how far it is."""
        return silent() if self.surrogates is None else self.surrogates.progress

    def surrogate(self, wanted: SurrogateRequest | None = None) -> Model:
        """A frozen model of the attacker's own, in eval mode, for attacks that declare `access` other than `none`.

        By default plain CLIP of the run's scale, trained on the clean pairs with another seed than the victim's. The first
        request of a run takes the time of a training; see docs/decisions/007-surrogates.md.

        Raises:
            BenchError: an attack that does not declare it, or a surrogate that cannot be had.
        """
        if self.surrogates is None:
            raise BenchError(f"attack {self.attack} asks for a surrogate model and declares access 'none'; declare 'features' or 'gradients'")
        began = time.perf_counter()
        found = self.surrogates.find(wanted or SurrogateRequest())
        self.seconds_waited += time.perf_counter() - began
        self.surrogate_about = found.about
        return found.model
