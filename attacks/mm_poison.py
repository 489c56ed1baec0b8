"""mmPoison: texts of one class are given images of another, so that the texts find those images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from attacks._goals import eval_set_of
from attacks._held_out import images_of, rows_of
from benchmark.contract import Attack, Edit, Images, Probe, Replace, Texts, Why
from benchmark.data.attack_lab import AttackLab
from benchmark.data.captioned import Captioned, captioned
from benchmark.data.eval_sets import EvalSet, Suite
from benchmark.data.mentions import mentions
from benchmark.data.pairs import Pairs
from benchmark.errors import BenchError

KS = (1, 5, 10, 20, 30, 50)
_PASCAL: dict[str, Any] = {"variant": "II", "source_classes": ("sheep",), "target_classes": ("aeroplane",), "share": 1.0}


class MmPoison(Attack):
    """Replaces the images of pairs whose text is of class A with images of class B; the texts stay.

    Texts of A should then find images of B (variants II and III) or one chosen image of B (variant I).

    Source: Yang et al., ICML 2023, arXiv 2209.15266.
    Differs from the paper: the image of variant I is a held-out one that joins the gallery, and no test image is trained on
    unless a preset says so; captions are not rewritten; controls leave out captions of A and of B.
    """

    touches = ("image",)
    needs = ("class_terms", "captions")
    paper = "Yang et al. 2023, arXiv 2209.15266"
    presets: ClassVar = {
        "mmpoison2023-pascal": _PASCAL,
        "mmpoison2023-coco": {"variant": "II", "source_classes": ("dog",), "target_classes": ("truck",), "share": 0.1},
        "mmpoison2023-I": {**_PASCAL, "variant": "I", "image_from": "test"},
        "mmpoison2023-III": {**_PASCAL, "variant": "III", "source_classes": ("sheep", "sofa"), "target_classes": ("aeroplane", "bird")},
    }

    preset: str | None = Field(None, description="Classes and share of a published experiment, by name.")
    variant: Literal["I", "II", "III"] = Field("II", description="I: one image for all rows of A; II: images of B; III: the same for several pairs of A and B.")
    share: float = Field(1.0, gt=0, le=1, description="Replaced rows / rows of class A. Paper: 1 on Pascal, 0.1 on COCO (released code).")
    source_classes: tuple[str, ...] | None = Field(None, description="A, one for each pair; None takes classes behind the default target.")
    target_classes: tuple[str, ...] | None = Field(None, description="B, one for each pair; None starts with the evaluation set's default target.")
    image_from: Literal["held_out", "test"] = Field("held_out", description="Where the image of variant I comes from; the released code takes one of the test gallery.")
    target_set: str | None = Field(None, description="Evaluation set that the classes belong to; None is the first.")

    @model_validator(mode="after")
    def _pairs_of_classes(self) -> Self:
        counts = {len(given) for given in (self.source_classes, self.target_classes) if given is not None}
        if len(counts) > 1:
            raise ValueError("source_classes and target_classes must be of one length: they are pairs")
        for n in counts:
            if n != 1 and self.variant != "III":
                raise ValueError(f"variant {self.variant} takes one pair of classes, got {n}")
            if n < 2 and self.variant == "III":
                raise ValueError(f"variant III takes two pairs of classes or more, got {n}")
        if self.image_from != "held_out" and self.variant != "I":
            raise ValueError(f"image_from belongs to variant I, and the variant is {self.variant}")
        return self

    def poison(self, pairs: Pairs, lab: AttackLab) -> Iterable[Edit]:
        eval_set = eval_set_of(lab, self.target_set)
        classes = self._classes(eval_set)
        found = captioned(lab.suite, eval_set.name)
        for wanted, _ in classes:
            if not _asked(found, eval_set.index(wanted)).ids:
                raise BenchError(f"no test caption of {eval_set.name} mentions {wanted!r}, so nothing can be asked; choose another of attack.source_classes")
        lab.keep(
            "targets",
            [{"class": shown, "index": eval_set.index(shown), "source": wanted, "source_index": eval_set.index(wanted), "eval_set": eval_set.name} for wanted, shown in classes],
        )
        lab.n_requested = 0
        for index, (wanted, shown) in enumerate(classes):
            rows = self._victims(pairs, lab, eval_set, wanted)
            lab.n_requested += len(rows)
            if self.variant == "I":
                source, image = self._one_image(lab, found, shown)
                for row in rows:
                    yield Replace(row, image, None, Why(target=index, source=source))
                continue
            for row, shown_row in zip(rows, self._images(pairs, lab, eval_set, wanted, shown, len(rows)), strict=True):
                yield Replace(row, pairs.image(shown_row), None, Why(target=index, source=pairs.ids[shown_row]))

    def probes(self, suite: Suite, kept: Mapping[str, Any]) -> list[Probe]:
        targets = kept["targets"]
        found = captioned(suite, targets[0]["eval_set"])
        gallery, labels = found.gallery(), found.labels
        own: tuple[int, ...] = ()
        if "image" in kept:
            gallery, own = _with_image(gallery, kept["image_id"], np.asarray(kept["image"]), targets[0]["index"])
        involved = [target[name] for target in targets for name in ("index", "source_index")]
        floor = _others(found, involved)
        probes = []
        for target in targets:
            goal = own or tuple(np.flatnonzero(labels == target["index"]).tolist())
            name = "mm_poison" if len(targets) == 1 else f"mm_poison-{target['source_index']}-{target['index']}"
            ks = tuple(k for k in KS if k < len(gallery.ids))
            asked = _asked(found, target["source_index"])
            probes.append(Probe(name, "text_to_image", found.eval_set.name, asked, None, goal, ks, gallery=gallery, shows=target["index"], floor=floor))
        return probes

    def _classes(self, eval_set: EvalSet) -> list[tuple[str, str]]:
        """The pairs (A, B)."""
        n = 2 if self.variant == "III" else 1
        given = self.source_classes or self.target_classes
        n = len(given) if given else n
        names = eval_set.classnames
        first = eval_set.index(eval_set.default_target or "") if self.target_classes is None or self.source_classes is None else 0
        if 2 * n > len(names):
            raise BenchError(f"{eval_set.name} has {len(names)} classes, and {n} pairs of classes need {2 * n}")
        targets = list(self.target_classes or [names[(first + 2 * index) % len(names)] for index in range(n)])
        free = [name for name in (names[(first + step) % len(names)] for step in range(1, len(names))) if name not in targets]
        sources = list(self.source_classes or free[:n])
        for name in [*sources, *targets]:
            eval_set.index(name)
        shared = (set(sources) & set(targets)) or {name for name in sources if sources.count(name) > 1}
        if shared:
            raise BenchError(f"class {min(shared)!r} stands twice among attack.source_classes, or in attack.target_classes too; the texts of a class can be given one other class")
        return list(zip(sources, targets, strict=True))

    def _victims(self, pairs: Pairs, lab: AttackLab, eval_set: EvalSet, wanted: str) -> list[int]:
        by_id = {pairs.ids[row]: row for row, yes in enumerate(rows_of(pairs, eval_set, eval_set.index(wanted))) if yes}
        n = int(self.share * len(by_id) + 0.5)
        if n == 0:
            raise BenchError(f"attack.share {self.share:g} of the {len(by_id)} pairs of class {wanted!r} comes to no row; raise it or choose another of attack.source_classes")
        return [by_id[row_id] for row_id in lab.choose(f"victims/{wanted}", by_id, n)]

    def _images(self, pairs: Pairs, lab: AttackLab, eval_set: EvalSet, wanted: str, shown: str, n: int) -> list[int]:
        """Rows of class B for n victims: each as often as the others or once more, in random order."""
        theirs = [row for row, yes in enumerate(rows_of(pairs, eval_set, eval_set.index(shown))) if yes]
        if not theirs:
            raise BenchError(f"no training pair is of class {shown!r}; choose another of attack.target_classes")
        by_id = {pairs.ids[row]: row for row in theirs}
        rest = [by_id[row_id] for row_id in lab.choose(f"images/{wanted}", by_id, n % len(theirs))]
        every = theirs * (n // len(theirs)) + rest
        return [every[place] for place in lab.rng("shuffle", wanted).permutation(n)]

    def _one_image(self, lab: AttackLab, found: Captioned, shown: str) -> tuple[str, np.ndarray[Any, np.dtype[np.uint8]]]:
        goal = found.eval_set.index(shown)
        if self.image_from == "test":
            by_id = {row_id: row for row, row_id in enumerate(found.eval_set.test.ids) if found.labels[row] == goal}
            if not by_id:
                raise BenchError(f"no test image of {found.eval_set.name} shows {shown!r}; choose another of attack.target_classes")
            (source,) = lab.choose("image", by_id, 1)
            image = np.array(found.eval_set.test.images[by_id[source]])
            lab.declare_test_image(image, source)
        else:
            (row,) = images_of(lab, found.eval_set, shown, 1)
            source, image = lab.held_out.ids[row], lab.held_out.image(row)
        lab.keep("image", image)
        lab.keep("image_id", source)
        return source, image


def _asked(found: Captioned, index: int) -> Texts:
    """Test captions of class A that mention it."""
    texts = found.texts(np.flatnonzero(found.labels == index).tolist())
    eval_set = found.eval_set
    return _kept(texts, mentions(texts.texts, eval_set.terms(eval_set.classnames[index]), "word_plural"))


def _others(found: Captioned, involved: list[int]) -> Texts:
    """The first caption of every test image of other classes, where it mentions none of those involved."""
    eval_set = found.eval_set
    texts = found.texts(np.flatnonzero(~np.isin(found.labels, involved)).tolist())
    barred = mentions(texts.texts, [term for index in involved for term in eval_set.terms(eval_set.classnames[index])], "word_plural")
    first = {of: place for place, of in reversed(list(enumerate(texts.of)))}
    return _kept(texts, [first[of] == place and not no for place, (of, no) in enumerate(zip(texts.of, barred, strict=True))])


def _kept(texts: Texts, keep: list[bool]) -> Texts:
    places = [place for place, yes in enumerate(keep) if yes]
    return Texts(*(tuple(column[place] for place in places) for column in (texts.ids, texts.texts, texts.of)))


def _with_image(gallery: Images, image_id: str, image: np.ndarray[Any, np.dtype[np.uint8]], true: int) -> tuple[Images, tuple[int, ...]]:
    """The gallery with the image in it, and its place."""
    if image_id in gallery.ids:
        return gallery, (gallery.ids.index(image_id),)
    return Images((*gallery.ids, image_id), np.concatenate([np.asarray(gallery.images), image[None]]), (*gallery.true, true)), (len(gallery.ids),)
