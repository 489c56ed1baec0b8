"""The drawn pairs that plugins are checked on, and the labs made of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from benchmark.contract import Attack, Defense, Edit, Replace
from benchmark.data.attack_lab import AttackLab
from benchmark.data.eval_sets import Suite, open_suite
from benchmark.data.pack import Pack, pack
from benchmark.data.pairs import Pairs, Source
from benchmark.data.poison import Poisoned, open_record, poison
from benchmark.data.source import open_source
from benchmark.errors import BenchError
from benchmark.progress import silent
from benchmark.registry import plugin_of
from benchmark.settings import SCHEMA, AugmentSettings, DataSettings, EvaluationSettings, ModelSettings, PluginSettings, RunSettings, TrainSettings
from benchmark.stages import Stages
from benchmark.surrogate import Surrogates
from benchmark.train.lab import Granted, Lab, PairsView, Task, ToldLab
from benchmark.train.model import tokenizer
from benchmark.train.synonyms import resolve

DATA = DataSettings(n_pairs=192, side=32, n_held_out=64, n_clean=64, n_test=100, n_probe=200)
TRAIN = TrainSettings(epochs=3, batch_size=32)
ODD_CAPTIONS = ("", "123 !!", "a boat " * 200, "🚤 ⛵ 🏝️")


@dataclass
class World:
    """The drawn pairs and evaluation sets that plugins are checked on, made once in a folder."""

    folder: Path

    @cached_property
    def stages(self) -> Stages:
        """Where the data lie."""
        return Stages(self.folder / "data")

    @cached_property
    def source(self) -> Source:
        """192 drawn pairs."""
        return open_source(DATA, None, None, self.stages, silent())

    @cached_property
    def suite(self) -> Suite:
        """The drawn world's evaluation sets."""
        return open_suite(DATA, None, self.stages, silent())

    def poisoned(self, attack: Attack, seed: int, place: str) -> Poisoned:
        """The attack's poison, made from nothing in a place of its own."""
        plugin, stages = plugin_of("attack", type(attack)), Stages(self.folder / place)
        return poison(plugin, attack, seed, self.source, self.suite, False, stages, tiny_surrogates(self.source, self.suite, self.stages, DATA, TRAIN))

    @cached_property
    def planted(self) -> Poisoned:
        """Poison for defenses to train on: four rows with captions that nobody expects."""
        return self.poisoned(_OddCaptions(), 0, "planted")

    def lab(self, defense: Defense, place: str, augmented: bool = False) -> Lab:
        """The defender's lab on the planted poison, with a cache of its own."""
        stages = Stages(self.folder / place)
        settings = run_settings(self.source, self.suite, DATA, TRAIN, augmented, plugin_settings_of(defense))
        packed = self._pack()
        synonyms = resolve("auto", self.suite.synonyms) if augmented else ("none", None)
        given = (
            packed,
            settings,
            tokenizer(settings.model),
            Task(self.suite.main.classnames, self.suite.main.templates),
            synonyms,
            self._grant,
            stages,
            silent(),
            torch.device("cpu"),
        )
        if defense.told == "nothing":
            return Lab(*given)
        touched = set(open_record(self.planted.record).rows["id"])
        rows = [row for row, row_id in enumerate(self.planted.rows()[0]) if row_id in touched]
        return ToldLab(*given, n_poison=len(rows), poisoned_rows=rows if defense.told == "record" else None)

    def _pack(self) -> Pack:
        return pack(self.planted, self.source, tokenizer(ModelSettings()), "fixed", self.stages, silent())

    def _grant(self, n: int) -> Granted:
        clean = self.source.clean
        if n > len(clean):
            raise BenchError(f"the defense asks for {n} clean pairs, and the check has {len(clean)}; lower the number in the class attribute `tiny`")
        labels = np.array([self.suite.main.classnames.index(word) for word in clean.tags["object"][:n]])
        return Granted(PairsView(clean.images[:n], tuple(clean.captions[:n])), f"check:{n}", labels)


def plugin_settings_of(defense: Defense) -> PluginSettings:
    """What a run keeps of a defense."""
    plugin = plugin_of("defense", type(defense))
    return PluginSettings(name=plugin.name, options=defense.model_dump(mode="json"), source=plugin.source)


def run_settings(source: Source, suite: Suite, data: DataSettings, train: TrainSettings, augmented: bool = False, defense: PluginSettings | None = None) -> RunSettings:
    """A run of seed 0 on these data, on the CPU."""
    return RunSettings(
        schema_=SCHEMA,
        attack=PluginSettings(name="planted", options={}, source=""),
        defense=defense or PluginSettings(name="none", options={}, source=""),
        augmented=augmented,
        scale="check",
        seed=0,
        dataset=source.name,
        data_hash=source.content,
        suite_hash=suite.content,
        data=data,
        train=train,
        augment=AugmentSettings(),
        model=ModelSettings(),
        evaluation=EvaluationSettings(),
        device="cpu",
    )


def tiny_surrogates(source: Source, suite: Suite, stages: Stages, data: DataSettings, train: TrainSettings = TRAIN) -> Surrogates:
    """Surrogates for attacks that ask for one: trained in a moment, and kept in `stages`."""
    return Surrogates(run_settings(source, suite, data, train), source, suite, stages, silent())


class _OddCaptions(Attack):
    """Gives four rows an empty caption, one without letters, a very long one and one of emoji."""

    touches = ("caption",)

    def poison(self, pairs: Pairs, lab: AttackLab) -> Iterable[Edit]:
        for row, caption in enumerate(ODD_CAPTIONS):
            yield Replace(row * 7, caption=caption)
