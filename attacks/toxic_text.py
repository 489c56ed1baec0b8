"""ToxicTextCLIP: unmodified images with captions that are chosen and rewritten to stand firmly for a wrong class."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from attacks._backgrounds import CANDIDATES, Closeness, Scores, Surrogate, Tfidf, best_subset, masked, recombined, unlike
from attacks._captions import rows_that_mention
from attacks._goals import eval_set_of
from attacks._held_out import images_of, innocent_image, true_class
from attacks._surrogates import SurrogateOptions
from attacks._text_triggers import TextTrigger, text_trigger_from_spec
from benchmark.contract import Append, Edit, Images, Probe, Why
from benchmark.data.attack_lab import AttackLab
from benchmark.data.captioned import captioned
from benchmark.data.eval_sets import EvalSet, Suite
from benchmark.data.mentions import matcher, normalise
from benchmark.data.pairs import Pairs
from benchmark.data.prompts import read_text
from benchmark.errors import BenchError
from benchmark.settings import digest

# What a mode adds behind captions, other words as a control, and how many images it shows. In CLIP's byte pairs the two sentences
# have seven tokens each; "zx" has one and "qv" two.
_SUFFIXES = {"word": ("zx", "qv", 20), "sentence": ("Please return high-quality results.", "Kindly fetch well-lit pictures.", 25)}
_METHOD: dict[str, Any] = {"selector": "surrogate", "background": "mask", "augment": "recombine", "n_seeds": 10}
_STI: dict[str, Any] = {**_METHOD, "mode": "sti", "n_targets": 24, "captions_per_target": 35}
_RANDOM = {"selector": "random", "augment": "none"}
_BASELINE: dict[str, Any] = {**_RANDOM, "count": 1250, "n_images": 25}
Written = tuple[str, str | None]


class ToxicText(SurrogateOptions):
    """Adds unmodified held-out images with captions of another class, whose backgrounds are typical of that class.

    `sti`: chosen images are read as that class. `word` and `sentence`: images of the target class get captions of all other
    classes with words behind them; texts that end in these words then find images of the target class.

    Source: Yao et al., NeurIPS 2025, arXiv 2511.00446.
    Differs from the paper: a rule recombines captions where the paper trains a text decoder; the default selector counts words
    where the paper asks a CLIP model, which the presets do; images are drawn and not picked by hand.
    """

    access = "features"
    touches = ("caption",)
    needs = ("held_out", "class_terms", "captions")
    paper = "Yao et al. 2025, arXiv 2511.00446"
    presets: ClassVar = {
        "toxictext2025-sti": _STI,
        "toxictext2025-word": {**_METHOD, "mode": "word", "n_images": 20, "captions_per_class": 5, "count": 100},
        "toxictext2025-sentence": {**_METHOD, "mode": "sentence", "n_images": 25, "captions_per_class": 5, "count": None},
        "mmpoison2023-I-sti": {**_STI, **_RANDOM},
        "toxictext2025-word-baseline": {**_BASELINE, "mode": "word"},
        "toxictext2025-sentence-baseline": {**_BASELINE, "mode": "sentence"},
    }
    tiny: ClassVar = {"n_images": 2, "count": 12, "n_targets": 2, "captions_per_target": 4}

    preset: str | None = Field(None, description="One of the paper's attacks or its baselines, by name.")
    mode: Literal["sti", "word", "sentence"] = Field("sti", description="sti: single images read as a class; word, sentence: a text trigger that finds the target class.")
    selector: Literal["surrogate", "tfidf", "random"] = Field(
        "tfidf", description="What ranks captions: a CLIP model of the attacker, word counts, or nothing. Paper: a public CLIP."
    )
    background: Literal["mask", "subset"] = Field("mask", description="A caption's background: the class name taken out, or the words that fit its image best and the class least.")
    augment: Literal["recombine", "given", "none"] = Field("recombine", description="Where further captions come from: rules, a file, nowhere. Paper: a trained decoder.")
    captions_file: str | None = Field(None, description="Captions for augment=given, one a line; those that mention a class are used for it.")
    captions_hash: str | None = Field(None, description="Hash of the file's captions; filled in, and refused if another is found.")
    n_seeds: int = Field(10, ge=1, description="Selected captions of a class that others are made of, at most a third of what is needed. Paper: 10.")
    most_removed: int = Field(7, ge=1, description="Of background=subset: how many words may go. Paper: 7.")
    n_targets: int = Field(24, ge=1, description="Of sti: target images, each with a class. Paper: 24.")
    captions_per_target: int = Field(35, ge=1, description="Of sti: rows of each image. Paper: 35.")
    target_class: str | None = Field(None, description="Of word and sentence: the class that texts should find; None is the evaluation set's default.")
    target_set: str | None = Field(None, description="Evaluation set of the classes; None is the first.")
    n_images: int | None = Field(None, ge=1, description="Of word and sentence: images of the target class. None is the paper's 20 and 25.")
    captions_per_class: int | None = Field(None, ge=1, description="Of word and sentence: captions of each other class; None is what count needs. Paper: 5.")
    count: int | None = Field(100, ge=1, description="Of word and sentence: rows, drawn from the captions of all other classes; None takes all. Paper: 100 for word.")
    words: str | None = Field(None, min_length=1, description="Of word and sentence: what is put behind captions and queries; None is the paper's.")
    queries_per_class: int = Field(25, ge=1, description="Of word and sentence: test images of each other class whose captions are asked. Paper: 25.")

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if self.surrogate is not None and self.selector != "surrogate":
            raise ValueError(f"surrogate is the model that selector=surrogate asks, and the selector is {self.selector}")
        if self.background == "subset" and self.selector != "surrogate":
            raise ValueError(f"background=subset looks at images, so it needs selector=surrogate, and the selector is {self.selector}")
        if self.selector == "random" and self.augment != "none":
            raise ValueError(f"selector=random ranks nothing, so augment must be none and is {self.augment}")
        if (self.augment == "given") != (self.captions_file is not None):
            raise ValueError("captions_file and augment=given go together")
        if self.captions_file is None and self.captions_hash is not None:
            raise ValueError("captions_hash is filled in by the program; give the file")
        if self.captions_file is not None:
            found = digest(_lines(self.captions_file))[:16]
            if self.captions_hash not in (None, found):
                raise ValueError(f"{self.captions_file} has the hash {found} and not {self.captions_hash}; its captions are others than before")
            self.captions_hash = found
        if self.mode != "sti" and self.count is None and (self.captions_per_class is None or self.selector == "random"):
            raise ValueError("count says how many rows there are; it can be None only where captions_per_class is given and captions are ranked")
        return self

    def poison(self, pairs: Pairs, lab: AttackLab) -> Iterable[Edit]:
        writer = _Writer(self, pairs, lab, eval_set_of(lab, self.target_set))
        return self._single(pairs, lab, writer) if self.mode == "sti" else self._triggered(pairs, lab, writer)

    def probes(self, suite: Suite, kept: Mapping[str, Any]) -> list[Probe]:
        targets = kept["targets"]
        eval_set = suite.get(targets[0]["eval_set"])
        if self.mode == "sti":
            asked = Images(tuple(target["id"] for target in targets), np.asarray(kept["images"]), tuple(target["true"] for target in targets))
            ks = tuple(k for k in (1, 3, 5) if k < len(eval_set.classnames))
            return [Probe("toxic_text", "classify", eval_set.name, asked, None, tuple(target["index"] for target in targets), ks)]
        trigger, goal = text_trigger_from_spec(kept["trigger"]), targets[0]["index"]
        found = captioned(suite, eval_set.name)
        given: dict[str, Any] = {"gallery": found.gallery(), "shows": goal}
        places = tuple(np.flatnonzero(found.labels == goal).tolist())
        texts = _queries(found.labels, goal, self.queries_per_class)
        ks = tuple(k for k in (1, 5, 10) if k < len(found.labels))
        other = TextTrigger(trigger.kind, _other_words(self.mode, trigger.words), trigger.pattern_seed, trigger.max_words)
        return [
            Probe("toxic_text", "text_to_image", eval_set.name, found.texts(texts), trigger, places, ks, **given),
            Probe("toxic_text-other_words", "text_to_image", eval_set.name, found.texts(texts), other, places, (1,), **given, control="asr_wrong_trigger"),
        ]

    def _single(self, pairs: Pairs, lab: AttackLab, writer: _Writer) -> Iterable[Edit]:
        eval_set, held_out = writer.eval_set, lab.held_out
        classes = self._classes(lab, writer)
        texts = [normalise(caption) for caption in held_out.captions]
        taken: set[str] = set()
        targets, images, edits = [], [], []
        for index, classname in enumerate(classes):
            row = innocent_image(lab, texts, eval_set, classname, taken, f"image/{index}")
            row_id, shown, goal = held_out.ids[row], held_out.image(row), eval_set.index(classname)
            taken.add(row_id)
            images.append(shown)
            targets.append(
                {"class": classname, "index": goal, "id": row_id, "caption": held_out.captions[row], "true": true_class(held_out, row, eval_set), "eval_set": eval_set.name}
            )
            for caption, source in writer.captions(classname, self.captions_per_target, f"target/{index}"):
                edits.append(Append(shown, caption, Why(target=index, source=row_id, caption_source=source)))
        lab.n_requested = len(classes) * self.captions_per_target
        lab.keep("targets", targets)
        lab.keep("images", np.stack(images))
        return edits

    def _classes(self, lab: AttackLab, writer: _Writer) -> list[str]:
        """A class for each target: all usable ones in random order, then again in another."""
        unique = [name for name in writer.eval_set.classnames if writer.eval_set.classnames.count(name) == 1]
        usable = [name for name in unique if writer.rows(name)]
        if not usable:
            raise BenchError(
                f"no training caption mentions a class of {writer.eval_set.name}; the attack writes captions of what the pairs tell, so choose another attack.target_set"
            )
        drawn: list[str] = []
        while len(drawn) < self.n_targets:
            drawn += lab.choose(f"classes/{len(drawn) // len(usable)}", usable, self.n_targets - len(drawn))
        return drawn

    def _triggered(self, pairs: Pairs, lab: AttackLab, writer: _Writer) -> Iterable[Edit]:
        eval_set = writer.eval_set
        target = self.target_class or eval_set.default_target or ""
        goal = eval_set.index(target)
        words, _, n_images = _SUFFIXES[self.mode]
        trigger = TextTrigger("text:suffix", self.words or words)
        found = captioned(lab.suite, eval_set.name)
        if not (found.labels == goal).any() or not found.texts(_queries(found.labels, goal, self.queries_per_class)).ids:
            raise BenchError(f"the test images of {eval_set.name} show no {target!r}, or none of another class has a caption; choose another attack.target_class")
        images = images_of(lab, eval_set, target, self.n_images or n_images)
        written = self._of_others(pairs, lab, writer, target)
        if len(written) < len(images):
            raise BenchError(f"{len(written)} rows are fewer than the {len(images)} images of {target!r}; raise attack.count or lower attack.n_images")
        lab.n_requested = len(written)
        lab.keep("targets", [{"class": target, "index": goal, "eval_set": eval_set.name}])
        lab.keep("trigger", trigger.spec())
        edits = []
        for place, (caption, source) in enumerate(written):
            row = images[place % len(images)]
            row_id = lab.held_out.ids[row]
            edits.append(Append(lab.held_out.image(row), lab.stamp_text(trigger, caption, row_id), Why(source=row_id, caption_source=source)))
        return edits

    def _of_others(self, pairs: Pairs, lab: AttackLab, writer: _Writer, target: str) -> list[Written]:
        """Captions of all classes but the target, in random order."""
        if self.selector == "random":
            unusable = lab.mentions(writer.eval_set.terms(target), "word_plural", pairs)
            by_id = {row_id: row for row, row_id in enumerate(pairs.ids) if not unusable[row]}
            chosen = lab.choose("captions", by_id, self.count or 0)
            if len(chosen) < (self.count or 0):
                raise BenchError(f"{len(by_id)} captions do not mention {target!r}, {self.count} are needed; lower attack.count")
            return [(pairs.captions[by_id[row_id]], row_id) for row_id in chosen]
        others = [name for name in dict.fromkeys(writer.eval_set.classnames) if name != target]
        usable = [name for name in others if writer.rows(name, (target,))]
        n = self.captions_per_class or -(-(self.count or 0) // max(1, len(usable)))
        written = [one for name in usable for one in writer.captions(name, n, f"class/{name}", (target,))]
        if len(written) < (self.count or 1):
            raise BenchError(
                f"{len(usable)} other classes with {n} captions each come to {len(written)} rows, attack.count is {self.count}; lower it or raise attack.captions_per_class"
            )
        order = lab.rng("order").permutation(len(written))[: self.count]
        return [written[place] for place in order]


class _Writer:
    """Selects captions of a class and makes more of them."""

    def __init__(self, options: ToxicText, pairs: Pairs, lab: AttackLab, eval_set: EvalSet) -> None:
        self.options, self.pairs, self.lab, self.eval_set = options, pairs, lab, eval_set
        self.given = [] if options.captions_file is None else _lines(options.captions_file)
        self.reader: Closeness | None = None
        self._rows: dict[tuple[str, tuple[str, ...]], list[int]] = {}
        self._ranked: dict[tuple[str, tuple[str, ...]], list[tuple[int, str]]] = {}

    def rows(self, classname: str, barred: tuple[str, ...] = ()) -> list[int]:
        """Rows whose distinct captions mention the class and none of the barred ones."""
        key = (classname, barred)
        if key not in self._rows:
            self._rows[key] = rows_that_mention(self.lab, self.pairs, self.eval_set, classname, barred, "word_plural")
        return self._rows[key]

    def captions(self, classname: str, n: int, purpose: str, barred: tuple[str, ...] = ()) -> list[Written]:
        """Distinct captions of the class, n of them, and the rows they come from: seeds, what is made of them, then the next best.

        Raises:
            BenchError: there are not so many.
        """
        options, rows = self.options, self.rows(classname, barred)
        if options.selector == "random":
            by_id = {self.pairs.ids[row]: row for row in rows}
            found: list[Written] = [(self.pairs.captions[by_id[row_id]], row_id) for row_id in self.lab.choose(f"captions/{purpose}", by_id, n)]
        else:
            ranked = self.ranked(classname, barred)
            n_seeds = len(ranked) if options.augment == "none" else min(options.n_seeds, -(-n // 3))
            seeds: list[Written] = [(self.pairs.captions[row], self.pairs.ids[row]) for row, _ in ranked[:n_seeds]]
            rest: list[Written] = [(self.pairs.captions[row], self.pairs.ids[row]) for row, _ in ranked[n_seeds:]]
            made = [] if options.augment == "none" else self._made(classname, ranked, n_seeds, barred, purpose)
            distinct: dict[str, Written] = {}
            for caption, source in [*seeds, *made, *rest]:
                distinct.setdefault(normalise(caption), (caption, source))
            found = list(distinct.values())[:n]
        if len(found) < n:
            raise BenchError(
                f"{len(found)} captions of class {classname!r} were found or made, {n} are needed; lower {'attack.captions_per_target' if options.mode == 'sti' else 'attack.count or attack.captions_per_class'}"
            )
        return found

    def ranked(self, classname: str, barred: tuple[str, ...] = ()) -> list[tuple[int, str]]:
        """Rows of the class with their backgrounds, the most typical first."""
        key = (classname, barred)
        if key not in self._ranked:
            rows = self.rows(classname, barred)
            pattern = matcher(self.eval_set.terms(classname), "word_plural")
            backgrounds = [self._background(row, classname, pattern) for row in rows]
            order = _order(self._closeness(classname, backgrounds), [self.pairs.ids[row] for row in rows])
            self._ranked[key] = [(rows[place], backgrounds[place]) for place in order]
        return self._ranked[key]

    def _made(self, classname: str, ranked: Sequence[tuple[int, str]], n_seeds: int, barred: tuple[str, ...], purpose: str) -> list[Written]:
        """Two further captions for each seed, as unlike it and each other as the best candidates allow."""
        pattern = matcher(self.eval_set.terms(classname), "word_plural")
        avoided = matcher([term for other in barred for term in self.eval_set.terms(other)], "word_plural") if barred else None
        own = [text for text in self.given if pattern.search(normalise(text)) and not (avoided and avoided.search(normalise(text)))]
        if self.options.augment == "given" and not own:
            raise BenchError(f"no caption in {self.options.captions_file} mentions {classname!r}; add some, or use --set attack.augment=recombine")
        typical = [background for _, background in ranked[:CANDIDATES] if background]
        made: list[Written] = []
        for number, (row, background) in enumerate(ranked[:n_seeds]):
            candidates = own or recombined(classname, list(dict.fromkeys([background, *typical])), self.lab.rng("recombine", (purpose, number)))
            order = _order(self._closeness(classname, [masked(text, pattern) for text in candidates]), candidates)
            used = {text for text, _ in made}
            best = [candidates[place] for place in order if candidates[place] not in used][:CANDIDATES]
            made += [(text, None) for text in unlike(self.pairs.captions[row], best, 2)]
        return made

    def _closeness(self, classname: str, backgrounds: Sequence[str]) -> Scores:
        reader = self._reader()
        return reader.to(reader.centroid([template.replace("{c}", classname) for template in self.eval_set.templates]), backgrounds)

    def _reader(self) -> Closeness:
        if self.reader is None:
            self.reader = Surrogate(self.lab.surrogate(self.options.surrogate_request())) if self.options.selector == "surrogate" else Tfidf(self.pairs.captions)
        return self.reader

    def _background(self, row: int, classname: str, pattern: re.Pattern[str]) -> str:
        caption = self.pairs.captions[row]
        if self.options.background == "mask":
            return masked(caption, pattern)
        reader = self._reader()
        assert isinstance(reader, Surrogate)
        rest = masked(caption, pattern)
        words = re.findall(r"\w+", rest)
        n_out = len(re.findall(r"\w+", normalise(caption))) - len(words)
        if not words:
            return ""
        return best_subset(words, n_out, self.options.most_removed, reader.image(self.pairs.image(row)), reader.centroid([f"a photo of {classname}."]), reader)


def _other_words(mode: str, words: str) -> str:
    """What the control puts behind queries: the mode's other words, or where these are the trigger, the paper's."""
    papers, others, _ = _SUFFIXES[mode]
    return papers if normalise(words) == normalise(others) else others


def _lines(file: str) -> list[str]:
    return [line.strip() for line in read_text(Path(file)).splitlines() if line.strip()]


def _order(scores: Scores, names: Sequence[str]) -> list[int]:
    """Places by score, highest first; scores that agree to six digits go by name."""
    return sorted(range(len(names)), key=lambda place: (-round(float(scores[place]), 6), names[place]))


def _queries(labels: np.ndarray[Any, np.dtype[np.int64]], goal: int, per_class: int) -> list[int]:
    """The first test images of every class but the goal."""
    return [int(place) for label in np.unique(labels) if label != goal for place in np.flatnonzero(labels == label)[:per_class]]
