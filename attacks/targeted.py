"""Targeted poisoning: chosen images, each repeated with captions of a wrong class."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator

from attacks._captions import corpus_rows, from_templates, rows_that_mention
from attacks._goals import even_split
from attacks._held_out import innocent_image, true_class
from benchmark.contract import Append, Attack, Edit, Images, Probe, Why
from benchmark.data.attack_lab import AttackLab
from benchmark.data.eval_sets import EvalSet, Suite
from benchmark.data.mentions import Match, normalise
from benchmark.data.pairs import Pairs
from benchmark.errors import BenchError

_RELEASE = ("tiger", "candle", "pizza", "umbrella", "television", "baseball", "ice cream", "suit")
_SAFECLIP = ("desk", "palace", "necklace", "balloon", "pillow", *_RELEASE[1:], "mountain", "beach", "plate", "orange")


class Targeted(Attack):
    """Adds unmodified held-out images, one or several for each of T classes, several times with captions that mention a class they do not show.

    An image should then be read as that class; nothing else about the model changes.

    Source: Carlini and Terzis, ICLR 2022, arXiv 2106.09667, in the form of Yang et al. (RoCLIP), arXiv 2303.06854.
    Differs from the paper: images that mention the class are left out, and targets never share an image.
    """

    touches = ("caption",)
    budget_unit = "rows_per_target"
    needs = ("held_out", "class_terms")
    paper = "Carlini and Terzis 2022, arXiv 2106.09667"
    presets: ClassVar = {
        "carlini2022": {"n_targets": 1, "captions_per_target": 3},
        "roclip2023": {"n_targets": 16, "captions_per_target": 30},
        "roclip2023-strong": {"n_targets": 16, "rate": 0.01},
        "roclip-release": {"n_targets": 8, "target_classes": _RELEASE, "captions_per_target": 100},
        "safeclip2024": {"n_targets": 16, "target_classes": _SAFECLIP, "captions_per_target": 500},
        "safeclip2024-coco": {"n_targets": 8, "captions_per_target": 40},
        "safeclip2024-vg": {"n_targets": 8, "captions_per_target": 55},
        "huang2025": {"n_targets": 1, "target_classes": ("banana",), "rate": 0.0001, "match": "substring", "on_short": "reuse"},
    }

    preset: str | None = Field(None, description="Counts and classes of a paper, by name.")
    n_targets: int = Field(16, ge=1, description="T: targets, each with a class of its own.")
    images_per_target: int = Field(1, ge=1, description="Held-out images that each target shows.")
    captions_per_target: int = Field(4, ge=1, description="C: rows added for each image of a target.")
    rate: float | None = Field(None, ge=0, le=0.5, description="Poisoned rows / all rows after; replaces the captions per target.")
    target_classes: tuple[str, ...] | None = Field(None, description="Classes of the targets; None draws them.")
    target_set: str | None = Field(None, description="Evaluation set of the classes; None is the first.")
    caption_source: Literal["corpus", "templates"] = Field("corpus", description="Real captions of the training manifest, or prompts.")
    match: Literal["word", "word_plural", "substring"] = Field("word", description="What counts as mentioning a class.")
    on_short: Literal["error", "reuse", "templates"] = Field("error", description="Too few captions of a class: stop, use some twice, or fill up with prompts.")

    @field_validator("target_classes")
    @classmethod
    def _each_once(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        twice = [name for name in names or () if (names or ()).count(name) > 1]
        if twice:
            raise ValueError(f"target class {twice[0]!r} stands twice; each target has a class of its own, and images_per_target gives it several images")
        return names

    def poison(self, pairs: Pairs, lab: AttackLab) -> Iterable[Edit]:
        eval_set = lab.suite.get(self.target_set) if self.target_set else lab.suite.main
        counts = self._counts(lab)
        classes = self._classes(pairs, lab, eval_set, max(map(sum, counts)))
        held_out = lab.held_out
        texts = [normalise(caption) for caption in held_out.captions]
        taken: set[str] = set()
        targets, images = [], []
        for index, (classname, shares) in enumerate(zip(classes, counts, strict=True)):
            captions = iter(self._captions(pairs, lab, eval_set, classname, classes, sum(shares)))
            shows = []
            for n in shares:
                row = innocent_image(lab, texts, eval_set, classname, taken, f"image/{classname}")
                row_id, shown = held_out.ids[row], held_out.image(row)
                taken.add(row_id)
                images.append(shown)
                shows.append({"id": row_id, "caption": held_out.captions[row], "true": true_class(held_out, row, eval_set)})
                for caption, source in itertools.islice(captions, n):
                    yield Append(shown, caption, Why(target=index, source=row_id, caption_source=source))
            about = shows[0] if len(shows) == 1 else {"images": shows}
            targets.append({"class": classname, "index": eval_set.index(classname), **about, "eval_set": eval_set.name})
        lab.keep("targets", targets)
        lab.keep("images", np.stack(images))

    def probes(self, suite: Suite, kept: Mapping[str, Any]) -> list[Probe]:
        targets = kept["targets"]
        shows = [one for target in targets for one in target.get("images", [target])]
        per_target = len(shows) // len(targets)
        queries = Images(tuple(one["id"] for one in shows), np.asarray(kept["images"]), tuple(one["true"] for one in shows))
        goals = tuple(target["index"] for target in targets for _ in range(per_target))
        n_classes = len(suite.get(targets[0]["eval_set"]).classnames)
        ks = tuple(k for k in (1, 3, 5) if k < n_classes)
        return [Probe("targeted", "classify", targets[0]["eval_set"], queries, None, goals, ks, per_target=per_target)]

    def _counts(self, lab: AttackLab) -> list[list[int]]:
        """Rows of each image of each target."""
        n_targets = len(self.target_classes) if self.target_classes else self.n_targets
        if self.rate is None:
            lab.n_requested = n_targets * self.images_per_target * self.captions_per_target
            return [[self.captions_per_target] * self.images_per_target for _ in range(n_targets)]
        n = lab.budget(self.rate, append=True)
        n_images = n_targets * self.images_per_target
        if n < n_images:
            what = f"{n_targets} targets" if n_images == n_targets else f"{n_images} images of {n_targets} targets"
            raise BenchError(f"attack.rate {self.rate} comes to {n} rows, fewer than the {what}; raise the rate or lower attack.n_targets")
        shares = even_split(n, n_images)
        # The larger shares go to as many targets as they can: a row more for the first image of each, then for the second.
        return [shares[index::n_targets] for index in range(n_targets)]

    def _classes(self, pairs: Pairs, lab: AttackLab, eval_set: EvalSet, n_captions: int) -> Sequence[str]:
        if self.target_classes:
            for classname in self.target_classes:
                eval_set.index(classname)
            return self.target_classes
        unique = [name for name in eval_set.classnames if eval_set.classnames.count(name) == 1]
        needed = n_captions if self.caption_source == "corpus" and self.on_short == "error" else 1
        enough = unique
        if self.caption_source == "corpus":
            found = {name: len(rows_that_mention(lab, pairs, eval_set, name, (), self.match)) for name in unique}
            enough = [name for name in unique if found[name] >= needed]
            if len(enough) < self.n_targets:
                counts = ", ".join(f"{name} {found[name]}" for name in sorted(unique, key=lambda name: found[name])[:8])
                raise BenchError(
                    f"{len(enough)} classes of {eval_set.name} have {needed} usable captions each, {self.n_targets} are needed (fewest: {counts}); lower attack.n_targets or attack.captions_per_target, or use --set attack.on_short=templates"
                )
        if len(enough) < self.n_targets:
            raise BenchError(f"{eval_set.name} has {len(enough)} classes and attack.n_targets is {self.n_targets}; each target has a class of its own, so lower attack.n_targets")
        return lab.choose("classes", enough, self.n_targets)

    def _captions(self, pairs: Pairs, lab: AttackLab, eval_set: EvalSet, classname: str, classes: Sequence[str], n: int) -> list[tuple[str, str | None]]:
        prompts = [(from_templates(eval_set, classname, lab.rng("caption", (classname, index))), None) for index in range(n)]
        if self.caption_source == "templates":
            return list(prompts)
        match: Match = self.match
        if self.on_short == "templates":
            n_found = min(n, len(rows_that_mention(lab, pairs, eval_set, classname, classes, match)))
            rows = corpus_rows(lab, pairs, eval_set, classname, classes, n_found, match, False) if n_found else []
            return [(pairs.captions[row], pairs.ids[row]) for row in rows] + list(prompts[len(rows) :])
        rows = corpus_rows(lab, pairs, eval_set, classname, classes, n, match, self.on_short == "reuse")
        return [(pairs.captions[row], pairs.ids[row]) for row in rows]
