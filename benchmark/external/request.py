"""What the user asks for of a checkpoint, and whether it goes together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmark.data.eval_names import known_name
from benchmark.data.reading import Reading, check_reading
from benchmark.errors import BenchError
from benchmark.request import SECTIONS, Request, parse_set, scale_of
from benchmark.settings import Scale
from benchmark.train.checkpoints import Writer
from benchmark.train.model import Colour


@dataclass(frozen=True)
class Evaluation:
    """What the user asks for.

    Attributes:
        checkpoint: a file or folder of weights; `pretrained` names cached ones of open_clip instead.
        model: an architecture's name or a configuration file; not needed for what this program wrote.
        attack: whose poison and trigger to measure with; None for no attack.
        record: the sealed record of a poison made before, in place of making it.
        sets: options of `attack.`, `data.`, `evaluation.`, and `model.context_length`, `train.threads`.
        export: a new folder that the checkpoint is written to in this program's own form.
    """

    checkpoint: Path | None = None
    pretrained: str | None = None
    model: str | None = None
    attack: str | None = None
    record: Path | None = None
    seed: int | None = None
    scale: str = "small"
    sets: tuple[str, ...] = ()
    data: Path | None = None
    eval: tuple[str, ...] = ()
    eval_root: Path | None = None
    templates: str = "set"
    image_root: Path | None = None
    reading: Reading = field(default_factory=Reading)
    precision: str | None = None
    mean: Colour | None = None
    std: Colour | None = None
    writer: Writer = "auto"
    exponential: bool = False
    sham: bool = False
    export: Path | None = None
    results: Path = Path("results")
    cache: Path | None = None
    device: str | None = None

    def request(self, sets: Sequence[str] | None = None) -> Request:
        """The part that a run asks for in the same words; the defense is a stand-in that nothing trains."""
        return Request(
            attacks=(self.attack or "none",),
            defenses=("clip",),
            seeds=(self.seed or 0,),
            scale=self.scale,
            sets=self.sets if sets is None else tuple(sets),
            data=self.data,
            eval=self.eval,
            eval_root=self.eval_root,
            templates=self.templates,
            image_root=self.image_root,
            reading=self.reading,
            results=self.results,
            cache=self.cache,
            baseline=False,
            sham=self.sham,
            device=self.device,
        )


def checked(asked: Evaluation) -> Scale:
    """The scale with the request's changes.

    Raises:
        BenchError: options that do not go together.
    """
    if (asked.checkpoint is None) == (asked.pretrained is None):
        raise BenchError("give one of --checkpoint FILE and --pretrained TAG")
    if asked.export is not None and asked.export.exists():
        raise BenchError(f"{asked.export} exists; name another folder for the checkpoint")
    attack = () if asked.attack is None else ("attack", Path(asked.attack).stem)
    for section, option, _ in map(parse_set, asked.sets):
        if (section, option) == ("model", "name"):
            raise BenchError("--set model.name: use --model here")
        if section not in ("data", "evaluation", *attack) and (section, option) not in (("model", "context_length"), ("train", "threads")):
            why = "there is no --attack" if section == "attack" else "a checkpoint is trained already" if section in ("defense", *SECTIONS) else "there is no such section"
            raise BenchError(f"--set {section}.{option}: {why}; --set takes attack, data, evaluation, model.context_length and train.threads here")
    if asked.record is not None:
        for option, given in (("--data", asked.data is not None), ("--sham", asked.sham), ("--seed", asked.seed is not None)):
            if given:
                raise BenchError(f"{option} and --record do not go together: the record says what was poisoned, and how")
    if asked.attack == "all":
        raise BenchError("--attack all: one measurement asks for what one attack wants; name an attack")
    check_reading(asked.reading, asked.data is not None)
    for one in asked.eval:
        known_name(one)
    return scale_of(asked.request())
