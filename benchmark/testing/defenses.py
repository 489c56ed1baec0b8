"""What is checked of a defense."""

from __future__ import annotations

import io
import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmark.contract import Audit, Certificates, Defense, View
from benchmark.evaluate.features import prototypes
from benchmark.guard import sealed
from benchmark.settings import AugmentSettings, ModelSettings
from benchmark.testing.expect import Check, ContractError, check_described, expect, expect_untouched, instance, watched
from benchmark.testing.world import DATA, TRAIN, World
from benchmark.train.lab import Lab
from benchmark.train.loop import Budget, TrainingData, make_batch, opening, text_lengths
from benchmark.train.model import Model, build
from benchmark.train.views import TextViews


@contextmanager
def defense_checks(cls: type[Defense]) -> Iterator[list[Check]]:
    """The checks of a defense, on data that lie in a folder until the block ends."""
    with tempfile.TemporaryDirectory(prefix="bench-check-") as folder:
        subject = _DefenseSubject(cls, World(Path(folder)))
        yield [
            ("the docstring names its source and every option says what it does", partial(check_described, cls)),
            ("it trains on odd captions", subject.check_trains),
            ("global generators are left alone", subject.check_generators),
            ("it trains with augmentation", subject.check_augmented),
            ("two runs give the same weights and scores, the second killed and continued", subject.check_repeats),
            ("a short batch and a batch of one give a finite loss and gradient", subject.check_batches),
            ("its state survives save and load", subject.check_state),
            ("what it says of queries, predictions and the model has the promised form", subject.check_hooks),
        ]


@dataclass
class _DefenseSubject:
    cls: type[Defense]
    world: World

    @cached_property
    def watched(self) -> tuple[tuple[list[str], list[Any]], list[str]]:
        return watched(lambda: self._defend(self.cls, "first", False))

    @property
    def first(self) -> tuple[list[str], list[Any]]:
        return self.watched[0]

    def check_trains(self) -> None:
        expect(bool(self.first[0]), "defend returned no model")

    def check_generators(self) -> None:
        expect_untouched(self.watched[1])

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
        expect(again[0] == self.first[0], "two runs with one seed, the second killed before its last epoch and continued, give different weights; only `state` survives a restart")
        expect(again[1] == self.first[1], "two runs with one seed hand in different scores")

    def check_batches(self) -> None:
        _ = self.stepped_by_hand

    def check_state(self) -> None:
        state = self.stepped_by_hand
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        try:
            restored = torch.load(buffer, weights_only=True)
        except Exception as error:
            raise ContractError(f"`state` may hold tensors, numbers and strings, in lists and dictionaries; reading it back fails: {str(error).splitlines()[0]}") from None
        changed = [name for name in state.keys() | restored.keys() if name not in restored or name not in state or not _equal(state[name], restored[name])]
        expect(not changed, f"state {', '.join(sorted(changed))} is not the same after save and load")

    def check_hooks(self) -> None:
        if not any(self.cls.overrides(hook) for hook in ("suspicion", "certify", "audit")):
            return
        defense: Defense = instance("defense", self.cls)
        lab = self.world.lab(defense, "first")
        defended = defense.defend(lab)
        models = list(defended) if isinstance(defended, list) else [defended]
        for hook in ("suspicion", "audit"):
            expect(len(models) == 1 or not self.cls.overrides(hook), f"defend returns {len(models)} models that vote, and {hook} judges one")
        with sealed(self.world.planted.record, self.world.suite.folder):
            self._check_answers(defense, lab, models)

    def _check_answers(self, defense: Defense, lab: Lab, models: list[Model]) -> None:
        main = self.world.suite.main
        queries = np.array(main.test.images[:12])
        if self.cls.overrides("suspicion"):
            (scores, threshold), (some, _) = (defense.suspicion(models[0], images, lab.task) for images in (queries, queries[:5]))
            expect(tuple(scores.shape) == (12,), f"suspicion returns scores of shape {tuple(scores.shape)} for 12 images")
            expect(math.isfinite(threshold), f"suspicion returns the threshold {threshold}")
            expect(bool(torch.allclose(scores[:5].double(), some.double(), atol=1e-4)), "the suspicion of an image depends on the other images of the call")
        if self.cls.overrides("certify"):
            labels = torch.from_numpy(np.asarray(main.train.labels))
            prompts = [template.replace("{c}", name) for name in main.classnames for template in main.templates]
            views = []
            for model in models:
                features = model.encode_images(queries)
                classes = (features @ prototypes(model.encode_texts(prompts), len(main.templates)).T).argmax(dim=1)
                views.append(View(model.encode_images(main.train.images), features, classes))
            found = defense.certify(views, labels, len(main.classnames))
            expect(
                bool(found) and all(isinstance(one, Certificates) and len(one.predicted) == 12 for one in found), "certify must return a list of Certificates, each for all queries"
            )
            expect(len({one.name for one in found}) == len(found), "two certificates of one name")
            for one in found:
                chosen = np.asarray(one.predicted)
                expect(bool(((chosen >= 0) & (chosen < len(main.classnames))).all()), f"certificate {one.name!r} predicts classes outside of 0 to {len(main.classnames) - 1}")
                most = int(np.max(one.radius, initial=-1))
                expect(
                    one.trusts == "encoder" or most <= len(models) / 2,
                    f"certificate {one.name!r} trusts nothing and has a radius of {most}, with {len(models)} models: so many changes can reach more than half of them",
                )
        if self.cls.overrides("audit"):
            answer = defense.audit(models[0], np.array(self.world.source.clean.images[: defense.clean_wanted()]))
            expect(isinstance(answer, float | Audit) and math.isfinite(Audit.of(answer).score), f"audit must return a finite number or an Audit of one, got {answer!r}")

    def _defend(self, cls: type[Defense], place: str, augmented: bool) -> tuple[list[str], list[Any]]:
        """Hashes of the weights, and what was handed in."""
        defense = instance("defense", cls)
        lab = self.world.lab(defense, place, augmented)
        with sealed(self.world.planted.record, self.world.suite.folder):
            defended = defense.defend(lab)
        models = list(defended) if isinstance(defended, list) else [defended]
        expect(bool(models) and all(isinstance(model, Model) for model in models), f"defend must return a model or a list of models, got {type(defended).__name__}")
        for model in models:
            features = model.encode_images(lab.pairs.images[:8])
            expect(bool(torch.isfinite(features).all()), "the model's image features are not finite")
        return [model.weights_sha256() for model in models], [(scores.name, scores.values.tolist()) for scores in lab.handed_in]

    @cached_property
    def stepped_by_hand(self) -> dict[str, Any]:
        """The state that the hooks leave after full, short and single batches of every epoch."""
        defense: Defense = instance("defense", self.cls)
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
            for part in defense.plan(epoch, now):
                rows = torch.arange(len(packed)) if part.rows is None else torch.as_tensor(np.asarray(part.rows), dtype=torch.int64)
                expect(len(rows) > 0, f"epoch {epoch}: a pass over no rows")
                for begin, size in ((0, TRAIN.batch_size), (TRAIN.batch_size, TRAIN.batch_size), (0, 5), (5, 1)):
                    chosen = rows.roll(-begin)[:size]
                    batch = defense.views(make_batch(images[chosen], tokens, lengths, chosen, Budget(TRAIN, AugmentSettings(), False, 0), now), torch.Generator().manual_seed(0))
                    model.net.zero_grad()
                    loss = (part.loss or defense.loss)(model, batch, now)
                    expect(loss.ndim == 0 and math.isfinite(float(loss.detach())), f"epoch {epoch}: a batch of {len(chosen)} gives the loss {loss.tolist()}")
                    torch.autograd.backward(loss)
                    broken = [name for name, parameter in model.net.named_parameters() if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all())]
                    expect(not broken, f"epoch {epoch}: a batch of {len(chosen)} gives gradients that are not finite, in {', '.join(broken[:2])}")
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
