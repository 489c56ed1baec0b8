"""Templates that `bench new` writes."""

from __future__ import annotations

import keyword
from pathlib import Path

from benchmark.errors import BenchError

_DEFENSE = '''"""{title}: say here what it does."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from benchmark.contract import Batch, Defense
from benchmark.train.loop import Now
from benchmark.train.loss import contrastive
from benchmark.train.model import Model


class {title}(Defense):
    """Trains only on the part of each batch whose pairs agree best.

    A poisoned pair agrees badly until the model has learned it, so it is left out of many steps.

    Source: name the paper here.
    Differs from the paper: say what and why, or "nothing known".
    """

    keep: float = Field(0.9, gt=0, le=1, description="Share of a batch that is kept.")
    from_epoch: int = Field(2, ge=1, description="First epoch that leaves pairs out.")

    def loss(self, model: Model, batch: Batch, now: Now) -> Tensor:
        image, text = model.image(batch.images), model.text(batch.tokens[0])
        if now.epoch >= self.from_epoch:
            agreement = (image * text).sum(dim=1).detach()
            best = agreement.argsort(descending=True)[: max(2, round(self.keep * len(batch)))]
            image, text = image[best], text[best]
        return contrastive(image, text, model.scale)
'''

_ATTACK = '''"""{title}: say here what it does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import Field

from attacks._triggers import PatternTrigger, trigger_from_spec
from benchmark.contract import Attack, Edit, Probe, Replace, Why
from benchmark.data.attack_lab import AttackLab
from benchmark.data.eval_sets import Suite
from benchmark.data.pairs import Pairs


class {title}(Attack):
    """Stamps a white square on random images and captions them with the target class.

    Images with the square should then be taken for the target class.

    Source: name the paper here.
    Differs from the paper: say what and why, or "nothing known".
    """

    touches = ("image", "caption")

    rate: float = Field(0.005, gt=0, le=0.5, description="Poisoned rows / all rows.")
    size: int = Field(8, ge=1, description="Side of the square in pixels.")

    def poison(self, pairs: Pairs, lab: AttackLab) -> Iterable[Edit]:
        eval_set = lab.suite.main
        target = eval_set.default_target or eval_set.classnames[0]
        trigger = PatternTrigger("patch:white", size=self.size)
        lab.keep("targets", [{{"class": target, "index": eval_set.index(target), "eval_set": eval_set.name}}])
        lab.keep("trigger", trigger.spec())
        shown = lab.mentions(eval_set.terms(target), "word_plural")
        rows = {{pairs.ids[row]: row for row in range(len(pairs)) if not shown[row]}}
        for row_id in lab.choose("victims", rows, lab.budget(self.rate)):
            image = lab.stamp(trigger, pairs.image(rows[row_id]), row_id)
            yield Replace(rows[row_id], image, f"a photo of a {{target}}", Why(source=row_id))

    def probes(self, suite: Suite, kept: Mapping[str, Any]) -> list[Probe]:
        target = kept["targets"][0]
        return [Probe("{name}", "classify", target["eval_set"], "test", trigger_from_spec(kept["trigger"]), target["index"], (1,))]
'''


def write_template(kind: str, name: str, folder: Path) -> Path:
    """Writes `<folder>/<name>.py` and returns its path; an existing file is never overwritten."""
    templates = {"attack": _ATTACK, "defense": _DEFENSE}
    if kind not in templates:
        raise BenchError(f"expected attack or defense, got {kind!r}")
    if not name.isidentifier() or keyword.iskeyword(name) or name.startswith("_") or name != name.lower():
        raise BenchError(f"a plugin's name is a Python name in lower case that does not start with '_', got {name!r}")
    path = folder / f"{name}.py"
    if path.exists():
        raise BenchError(f"{path} exists already; choose another name or remove it")
    title = "".join(part.capitalize() for part in name.split("_"))
    try:
        path.write_text(templates[kind].format(title=title, name=name))
    except OSError as error:
        raise BenchError(f"cannot write {path}: {error.strerror}") from None
    return path
