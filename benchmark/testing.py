"""The contract as tests: what `bench check` and our own tests run on every attack and every defense.

    from benchmark.testing import check_defense

    def test_my_defense_keeps_the_contract():
        check_defense(MyDefense)

Everything happens on 192 drawn pairs in a temporary folder. A plugin whose defaults do not fit them names options that do in
its class attribute `tiny`.
"""

from __future__ import annotations

import io
import itertools
import math
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmark.contract import Attack, Defense, Edit, Options, Probe, Replace
from benchmark.data.attack_lab import AttackLab
from benchmark.data.eval_sets import Suite, open_suite
from benchmark.data.pack import Pack, pack
from benchmark.data.pairs import Pairs, Source
from benchmark.data.poison import Poisoned, SealedRecord, open_record, poison, read_image
from benchmark.data.source import open_source
from benchmark.errors import BenchError, nearest
from benchmark.evaluate.attack_success import queries
from benchmark.guard import sealed
from benchmark.progress import silent
from benchmark.registry import Kind, Plugin, find, names, plugin_of
from benchmark.settings import SCALES, SCHEMA, AugmentSettings, DataSettings, EvaluationSettings, ModelSettings, PluginSettings, RunSettings, TrainSettings, canonical, digest
from benchmark.stages import Stages
from benchmark.train.lab import Granted, Lab, PairsView, Task, ToldLab
from benchmark.train.loop import Budget, TrainingData, make_batch, opening, text_lengths
from benchmark.train.model import Model, build, tokenizer
from benchmark.train.synonyms import resolve
from benchmark.train.views import TextViews

DATA = DataSettings(n_pairs=192, side=32, n_held_out=64, n_clean=64, n_test=100, n_probe=200)
TRAIN = TrainSettings(epochs=3, batch_size=32)
ODD_CAPTIONS = ("", "123 !!", "a boat " * 200, "🚤 ⛵ 🏝️")


class ContractError(AssertionError):
    """A plugin that does not keep the contract, and how."""


def check_attack(cls: type[Attack]) -> None:
    """Runs every check on an attack.

    Raises:
        ContractError: with one line for each check that failed.
    """
    _raise_all(cls, _attack_checks(cls))


def check_defense(cls: type[Defense]) -> None:
    """Runs every check on a defense.

    Raises:
        ContractError: with one line for each check that failed.
    """
    _raise_all(cls, _defense_checks(cls))


def check_plugin(file_or_name: str, say: Callable[[str], None]) -> list[str]:
    """Runs every check on a plugin, says one line a check, and returns those that failed.

    Raises:
        BenchError: no such file or name, or a file that cannot be imported or defines no plugin.
    """
    failures = []
    for kind, cls in _classes(file_or_name):
        say(f"{kind} {cls.__name__}")
        with _checks(kind, cls) as checks:
            for name, check in checks:
                reason = _reason(check)
                say(f"ok {name}" if reason is None else f"FAILED {name}: {reason}")
                if reason is not None:
                    failures.append(f"{name}: {reason}")
    return failures


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
        return poison(plugin_of("attack", type(attack)), attack, seed, self.source, self.suite, False, Stages(self.folder / place))

    @cached_property
    def planted(self) -> Poisoned:
        """Poison for defenses to train on: four rows with captions that nobody expects."""
        return self.poisoned(_OddCaptions(), 0, "planted")

    def lab(self, defense: Defense, place: str, augmented: bool = False) -> Lab:
        """The defender's lab on the planted poison, with a cache of its own."""
        stages, model = Stages(self.folder / place), ModelSettings()
        plugin = plugin_of("defense", type(defense))
        settings = RunSettings(
            schema_=SCHEMA,
            attack=PluginSettings(name="planted", options={}, source=""),
            defense=PluginSettings(name=plugin.name, options=defense.model_dump(mode="json"), source=plugin.source),
            augmented=augmented,
            scale="check",
            seed=0,
            dataset=self.source.name,
            data_hash=self.source.content,
            suite_hash=self.suite.content,
            data=DATA,
            train=TRAIN,
            augment=AugmentSettings(),
            model=model,
            evaluation=EvaluationSettings(),
            device="cpu",
        )
        packed = self._pack()
        synonyms = resolve("auto", self.suite.synonyms) if augmented else ("none", None)
        given = (packed, settings, tokenizer(model), Task(self.suite.main.classnames, self.suite.main.templates), synonyms, self._grant, stages, silent(), torch.device("cpu"))
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


class _OddCaptions(Attack):
    """Gives four rows an empty caption, one without letters, a very long one and one of emoji."""

    touches = ("caption",)

    def poison(self, pairs: Pairs, lab: AttackLab) -> Iterable[Edit]:
        for row, caption in enumerate(ODD_CAPTIONS):
            yield Replace(row * 7, caption=caption)


Check = tuple[str, Callable[[], None]]


def _raise_all(cls: type[Options], checks: AbstractContextManager[list[Check]]) -> None:
    with checks as found:
        failures = [f"{name}: {reason}" for name, check in found if (reason := _reason(check)) is not None]
    if failures:
        raise ContractError(f"{cls.__name__} does not keep the contract\n" + "\n".join(failures))


def _reason(check: Callable[[], None]) -> str | None:
    try:
        check()
    except ContractError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _expect(holds: bool, reason: str) -> None:
    if not holds:
        raise ContractError(reason)


def _classes(file_or_name: str) -> list[tuple[Kind, type[Any]]]:
    kinds: tuple[Kind, Kind] = ("attack", "defense")
    if file_or_name.endswith(".py") or "/" in file_or_name:
        if not Path(file_or_name).is_file():
            raise BenchError(f"no plugin file at {file_or_name}")
        found, problems = [], []
        for kind in kinds:
            plugin = find(kind, file_or_name)
            try:
                found.append((kind, plugin.load()))
            except BenchError as error:
                if "must define exactly one" not in str(error):
                    raise
                problems.append((str(error), error))
        if not found:
            several = next((text for text, _ in problems if "found 0" not in text), None)
            raise BenchError(several or f"{file_or_name} defines neither an Attack nor a Defense; `bench new` writes one to start from")
        return found
    known = [kind for kind in kinds if file_or_name in names(kind)]
    if not known:
        guess = nearest(file_or_name, [*names("attack"), *names("defense")])
        raise BenchError(f"no attack or defense is named {file_or_name!r}.{f' Did you mean {guess!r}?' if guess else ''} `bench list` shows what there is.")
    return [(kind, find(kind, file_or_name).load()) for kind in known]


def _checks(kind: Kind, cls: type[Any]) -> AbstractContextManager[list[Check]]:
    return _attack_checks(cls) if kind == "attack" else _defense_checks(cls)


def _instance(kind: Kind, cls: type[Any]) -> Any:
    """The plugin with options that fit 192 pairs: its own `tiny`, else the smoke scale's and a rate of 5 %."""
    plugin: Plugin = plugin_of(kind, cls)
    values: dict[str, Any] = dict(SCALES["smoke"].options.get(plugin.name, {}))
    rate = cls.model_fields.get("rate")
    if kind == "attack" and rate is not None and isinstance(rate.default, float) and rate.default > 0:
        values["rate"] = 0.05
    if "n_targets" in cls.model_fields:
        values |= {"n_targets": 2}
    if "captions_per_target" in cls.model_fields:
        values |= {"captions_per_target": 2}
    return cls(**{name: value for name, value in {**values, **cls.tiny}.items() if name in cls.model_fields or name in cls.tiny})


def _check_described(cls: type[Options]) -> None:
    _expect("Source:" in (cls.__dict__.get("__doc__") or ""), "the docstring has no line `Source: authors, venue year, arXiv id`")
    bare = [name for name, field in cls.model_fields.items() if not field.description]
    _expect(not bare, f"options without a description: {', '.join(bare)}")


def _global_state() -> tuple[Any, ...]:
    kind, keys, *rest = np.random.get_state(legacy=True)
    return random.getstate(), kind, np.asarray(keys).tobytes(), tuple(rest), torch.get_rng_state().numpy().tobytes()


def _watched(run: Callable[[], Any]) -> tuple[Any, list[str]]:
    """What the call returns, and the global generators that it moved."""
    before = _global_state()
    result = run()
    after = _global_state()
    return result, [name for name, places in (("random", (0,)), ("numpy", (1, 2, 3)), ("torch", (4,))) if any(before[place] != after[place] for place in places)]


def _expect_untouched(moved: list[str]) -> None:
    _expect(not moved, f"it draws from the global generator of {', '.join(moved)}; use lab.rng or the rng that a hook is given")


@contextmanager
def _attack_checks(cls: type[Attack]) -> Iterator[list[Check]]:
    with tempfile.TemporaryDirectory(prefix="bench-check-") as folder:
        subject = _AttackSubject(cls, World(Path(folder)))
        yield [
            ("the docstring names its source and every option says what it does", partial(_check_described, cls)),
            ("exactly n_poison rows change and the rest stay", subject.check_rows),
            ("global generators are left alone", subject.check_generators),
            ("the same seed gives the same bytes", subject.check_repeats),
            ("another seed gives other poison", subject.check_seeds),
            ("an attack that edits rows declares a probe", subject.check_declares),
            ("probes of another process name an evaluation set and a goal in it", subject.check_probes),
            ("the trigger at test is the one that was stamped", subject.check_trigger),
        ]


@dataclass
class _AttackSubject:
    cls: type[Attack]
    world: World

    @cached_property
    def watched(self) -> tuple[Poisoned, list[str]]:
        return _watched(lambda: self._poison(0, "first"))

    @property
    def first(self) -> Poisoned:
        return self.watched[0]

    def check_generators(self) -> None:
        _expect_untouched(self.watched[1])

    @cached_property
    def record(self) -> SealedRecord:
        return open_record(self.first.record)

    @cached_property
    def probes(self) -> list[Probe]:
        return list(_instance("attack", self.cls).probes(self.world.suite, self.record.kept))

    def check_rows(self) -> None:
        train, record = self.world.source.train, self.record
        before = {row_id: (ref, caption) for row_id, ref, caption in zip(train.ids, train.refs, train.captions, strict=True)}
        sealed_ids = set(record.rows["id"])
        ids, refs, captions = self.first.rows()
        _expect(len(ids) == len(set(ids)), "two rows have one id")
        _expect(set(before) <= set(ids), f"{len(set(before) - set(ids))} rows are gone; edits append or replace and never delete")
        changed = {row_id for row_id, ref, caption in zip(ids, refs, captions, strict=True) if before.get(row_id) != (ref, caption) and not self._same(row_id, ref, caption)}
        _expect(changed == sealed_ids, f"{len(changed)} rows differ from the clean ones and the record holds {len(sealed_ids)}; every edit must change its row")
        _expect(len(changed) == record.n_poison, f"expected {record.n_poison} changed rows, got {len(changed)}")

    def check_repeats(self) -> None:
        again = self._poison(0, "again")
        files = [
            {str(path.relative_to(root.manifest.parent)): path.read_bytes() for path in sorted(root.manifest.parent.rglob("*")) if path.is_file()} for root in (self.first, again)
        ]
        differing = sorted(name for name in files[0].keys() | files[1].keys() if files[0].get(name) != files[1].get(name))
        _expect(not differing, f"two runs with one seed differ in {', '.join(differing[:3])}; draw from lab.rng or lab.choose alone")

    def check_seeds(self) -> None:
        if self.record.n_poison:
            other = self._poison(1, "other")
            _expect((other.manifest / "manifest.tsv").read_bytes() != (self.first.manifest / "manifest.tsv").read_bytes(), "seeds 0 and 1 give the same poison")

    def check_declares(self) -> None:
        _expect(bool(self.probes) or not self.record.n_poison, "it edits rows and declares no probe, so nothing says what success is")

    def check_probes(self) -> None:
        seen = set()
        for probe in self.probes:
            _expect(probe.name not in seen, f"two probes are named {probe.name!r}")
            seen.add(probe.name)
            eval_set = self.world.suite.get(probe.eval_set)
            n_classes = len(eval_set.classnames)
            asked = queries(probe, self.world.suite)
            bad = sorted({int(goal) for goal in asked.goal if not 0 <= int(goal) < n_classes})
            _expect(not bad, f"probe {probe.name!r} has goal {bad[:1]}, and {eval_set.name} has classes 0 to {n_classes - 1}")
            _expect(bool(probe.ks) and probe.ks[0] == 1, f"probe {probe.name!r}: the first k must be 1, got {probe.ks}")
            _expect(max(probe.ks) < n_classes, f"probe {probe.name!r}: k = {max(probe.ks)} of {n_classes} classes is no success")
            _expect(bool(asked.attacked(probe).any()), f"probe {probe.name!r} counts no query")

    def check_trigger(self) -> None:
        stamped = set(self.record.header["triggers"])
        for probe in self.probes:
            if probe.trigger is not None:
                canonical(probe.trigger.spec())
                _expect(digest(probe.trigger.spec())[:16] in stamped, f"probe {probe.name!r} has a trigger that lab.stamp never put on a training image")

    def _poison(self, seed: int, place: str) -> Poisoned:
        return self.world.poisoned(_instance("attack", self.cls), seed, place)

    def _same(self, row_id: str, ref: str, caption: str) -> bool:
        """Whether an edited row shows the very pixels and caption it had."""
        train = self.world.source.train
        if row_id not in train.ids:
            return False
        row = train.ids.index(row_id)
        image = train.image(row) if ref == train.refs[row] else read_image(ref, self.first.manifest, train.side)
        return caption == train.captions[row] and np.array_equal(image, train.images[row])


@contextmanager
def _defense_checks(cls: type[Defense]) -> Iterator[list[Check]]:
    with tempfile.TemporaryDirectory(prefix="bench-check-") as folder:
        subject = _DefenseSubject(cls, World(Path(folder)))
        yield [
            ("the docstring names its source and every option says what it does", partial(_check_described, cls)),
            ("it trains on odd captions", subject.check_trains),
            ("global generators are left alone", subject.check_generators),
            ("it trains with augmentation", subject.check_augmented),
            ("two runs give the same weights and scores, the second killed and continued", subject.check_repeats),
            ("a short batch and a batch of one give a finite loss and gradient", subject.check_batches),
            ("its state survives save and load", subject.check_state),
        ]


@dataclass
class _DefenseSubject:
    cls: type[Defense]
    world: World

    @cached_property
    def watched(self) -> tuple[tuple[list[str], list[Any]], list[str]]:
        return _watched(lambda: self._defend(self.cls, "first", False))

    @property
    def first(self) -> tuple[list[str], list[Any]]:
        return self.watched[0]

    def check_trains(self) -> None:
        _expect(bool(self.first[0]), "defend returned no model")

    def check_generators(self) -> None:
        _expect_untouched(self.watched[1])

    def check_augmented(self) -> None:
        self._defend(self.cls, "augmented", True)

    def check_repeats(self) -> None:
        killed = _killed_once(self.cls, TRAIN.epochs)
        try:
            self._defend(killed, "again", False)
        except _Killed:
            again = self._defend(killed, "again", False)
        else:
            again = self._defend(self.cls, "again", False)
        _expect(again[0] == self.first[0], "two runs with one seed, the second killed before its last epoch and continued, give different weights; only `state` survives a restart")
        _expect(again[1] == self.first[1], "two runs with one seed hand in different scores")

    def check_batches(self) -> None:
        self._step_by_hand()

    def check_state(self) -> None:
        state = self._step_by_hand()
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        try:
            restored = torch.load(buffer, weights_only=True)
        except Exception as error:
            raise ContractError(f"`state` may hold tensors, numbers and strings, in lists and dictionaries; reading it back fails: {str(error).splitlines()[0]}") from None
        changed = [name for name in state.keys() | restored.keys() if name not in restored or name not in state or not _equal(state[name], restored[name])]
        _expect(not changed, f"state {', '.join(sorted(changed))} is not the same after save and load")

    def _defend(self, cls: type[Defense], place: str, augmented: bool) -> tuple[list[str], list[Any]]:
        """Hashes of the weights, and what was handed in."""
        defense = _instance("defense", cls)
        lab = self.world.lab(defense, place, augmented)
        with sealed(self.world.planted.record, self.world.suite.folder):
            defended = defense.defend(lab)
        models = list(defended) if isinstance(defended, list) else [defended]
        _expect(bool(models) and all(isinstance(model, Model) for model in models), f"defend must return a model or a list of models, got {type(defended).__name__}")
        for model in models:
            features = model.encode_images(lab.pairs.images[:8])
            _expect(bool(torch.isfinite(features).all()), "the model's image features are not finite")
        return [model.weights_sha256() for model in models], [(scores.name, scores.values.tolist()) for scores in lab.handed_in]

    def _step_by_hand(self) -> dict[str, Any]:
        """Runs the hooks on full, short and single batches of every epoch, and returns the state they leave."""
        defense: Defense = _instance("defense", self.cls)
        lab = self.world.lab(defense, "by_hand")
        packed = self.world._pack()
        model = build(ModelSettings(), DATA.side, 0, torch.device("cpu"))
        texts = TextViews(lab.pairs.captions, defense, None, model.tokenizer, TRAIN.eot, 0)
        now = opening(model, TrainingData(packed.images, packed.tokens, texts), Budget(TRAIN, AugmentSettings(), False, 0))
        images, tokens = torch.tensor(packed.images), torch.from_numpy(texts.epoch(1).astype(np.int64))
        lengths = text_lengths(tokens)
        model.net.train()
        for epoch in range(1, TRAIN.epochs + 1):
            now.begin(epoch)
            ends = list(itertools.accumulate((TRAIN.batch_size, TRAIN.batch_size, 5, 1)))
            for part in defense.plan(epoch, now):
                rows = torch.arange(len(packed)) if part.rows is None else torch.as_tensor(np.asarray(part.rows), dtype=torch.int64)
                for begin, end in itertools.pairwise((0, *ends)):
                    chosen = rows[begin:end]
                    batch = defense.views(make_batch(images, tokens, lengths, chosen, Budget(TRAIN, AugmentSettings(), False, 0), now), torch.Generator().manual_seed(0))
                    model.net.zero_grad()
                    loss = (part.loss or defense.loss)(model, batch, now)
                    _expect(loss.ndim == 0 and math.isfinite(float(loss.detach())), f"epoch {epoch}: a batch of {len(chosen)} gives the loss {loss.tolist()}")
                    torch.autograd.backward(loss)
                    broken = [name for name, parameter in model.net.named_parameters() if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all())]
                    _expect(not broken, f"epoch {epoch}: a batch of {len(chosen)} gives gradients that are not finite, in {', '.join(broken[:2])}")
        return dict(defense.state)


class _Killed(BaseException):
    """Stands for a process that dies; nothing catches it on the way."""


def _killed_once(cls: type[Defense], at_epoch: int) -> type[Defense]:
    """The same defense, but its first training dies when it comes to this epoch."""
    alive = [False]

    def plan(self: Any, epoch: int, now: Any) -> Any:
        if epoch == at_epoch and not alive[0]:
            alive[0] = True
            raise _Killed
        return cls.plan(self, epoch, now)

    return type(cls.__name__, (cls,), {"plan": plan, "__module__": cls.__module__, "__doc__": cls.__doc__})


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, Mapping):
        return isinstance(right, Mapping) and left.keys() == right.keys() and all(_equal(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return type(left) is type(right) and len(left) == len(right) and all(map(_equal, left, right))
    return bool(type(left) is type(right) and left == right)
