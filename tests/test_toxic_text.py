"""ToxicTextCLIP: which captions are selected and made, which rows are added, what is asked."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

import benchmark
from attacks._backgrounds import Surrogate, Tfidf, best_subset, masked, recombined, unlike
from attacks.toxic_text import ToxicText
from benchmark.data.attack_lab import AttackLab
from benchmark.data.eval_sets import Suite
from benchmark.data.mentions import matcher, mentions, normalise
from benchmark.data.pairs import Source
from benchmark.data.poison import Poisoned, SealedRecord
from benchmark.errors import BenchError
from benchmark.evaluate.retrieval import retrieval_queries
from benchmark.registry import configure, find
from benchmark.settings import ModelSettings
from benchmark.testing import check_attack
from benchmark.train.model import build, save_weights

Poison = Callable[..., tuple[Poisoned, SealedRecord]]
STI = {"n_targets": 3, "captions_per_target": 6}
WORD = {"mode": "word", "n_images": 3, "count": 19}


class Letters:
    """A stand-in for a CLIP model: counts of letters, and of grey levels."""

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        counts = torch.tensor([[text.count(letter) for letter in "abcdefghijklmnopqrstuvwxyz "] for text in texts], dtype=torch.float32)
        return torch.nn.functional.normalize(counts + 1e-3, dim=-1)

    def encode_images(self, images: np.ndarray) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.from_numpy(images.reshape(len(images), -1)[:, :27].astype(np.float32)) + 1, dim=-1)


@pytest.mark.parametrize("mode", ["sti", "word", "sentence"])
def test_it_keeps_the_contract(mode: str) -> None:
    class Mode(ToxicText):
        """One mode. Source: the attack's own page."""

        tiny = {**ToxicText.tiny, "mode": mode}

    Mode.__module__ = ToxicText.__module__
    check_attack(Mode)


def test_the_background_is_the_caption_without_the_class() -> None:
    pattern = matcher(("ice cream", "gelato"), "word_plural")
    assert masked("Two Ice-Creams and a gelato  on ice", pattern) == "two and a on ice"


def test_word_counts_rank_typical_backgrounds_first() -> None:
    captions = ["a fish on striped paper", "a fish on striped paper today", "a fish and bureaucracy", "striped paper"]
    reader = Tfidf(captions)
    centroid = reader.centroid(["a drawing on striped paper"])
    scores = reader.to(centroid, ["on striped paper", "and bureaucracy", ""])
    assert scores[0] > 0.8 > scores[1] == scores[2] == 0
    with pytest.raises(BenchError, match="no caption has a word"):
        Tfidf(["", "!!"])


def test_the_best_subset_is_found_as_by_trying_all() -> None:
    reader, rng = Surrogate(Letters()), np.random.default_rng(0)  # type: ignore[arg-type]
    words, image, name = ["zeal", "mild", "quay", "oboe"], rng.random(27), reader.centroid(["a photo of cat."])
    image /= np.linalg.norm(image)

    def value(text: str) -> float:
        return float(reader.features([f"a photo that {text}"])[0] @ image - reader.features([text])[0] @ name)

    every = [" ".join(word for word, keep in zip(words, f"{bits:04b}", strict=True) if keep == "1") for bits in range(1, 16)]
    assert best_subset(words, 1, 7, image, name, reader) == max(every, key=value)
    shorter = [text for text in every if 2 <= len(text.split()) <= 3]
    assert best_subset(words, 0, 2, image, name, reader) == max(shorter, key=value)
    long = [f"{chr(97 + place)}{chr(98 + place)}" for place in range(24)]
    greedy = best_subset(long, 0, 7, image, name, reader)
    assert 17 <= len(greedy.split()) <= 23 and value(greedy) >= max(value(" ".join([*long[:place], *long[place + 1 :]])) for place in range(24))


def test_recombined_captions_name_the_class_and_carry_the_backgrounds() -> None:
    made = recombined("ice cream", ["on the red table", "outside", ""], np.random.default_rng(0))
    assert made[0] == "a photo of ice cream that on the red table" and "a photo of ice cream that outside" in made
    assert all(text.startswith("a photo of ice cream that ") for text in made)
    assert sorted(len(text.split()) for text in made) == [7, 9, 10, 10]
    assert len(set(made)) == len(made)


def test_picked_captions_are_unlike_the_seed_and_each_other() -> None:
    candidates = ["red fish swims", "blue fish sleeps", "the blue fish sleeps", "green boat"]
    assert unlike("a red fish", candidates, 2) == ["green boat", "blue fish sleeps"]
    assert unlike("a red fish", candidates[:1], 2) == candidates[:1]


def test_single_images_get_selected_and_made_captions_of_their_class(poison_with: Poison, source: Source, suite: Suite) -> None:
    _, record = poison_with("toxic_text", {**STI, "n_targets": 25})
    targets = record.kept["targets"]
    assert Counter(record.rows["target"]) == dict.fromkeys(range(25), 6)
    assert len({target["id"] for target in targets}) == 25
    assert len({target["class"] for target in targets[:20]}) == 20 == len({target["class"] for target in targets})
    captions = dict(zip(source.train.ids, source.train.captions, strict=True))
    for index, target in enumerate(targets):
        rows = record.rows[record.rows["target"] == index]
        assert target["true"] != target["index"] and not any(mentions([target["caption"]], suite.main.terms(target["class"]), "word_plural"))
        assert all(mentions(rows["caption_after"], suite.main.terms(target["class"]), "word_plural"))
        assert rows["caption_after"].nunique() == 6
        made = rows["caption_source_id"] == ""
        assert made.sum() == 4
        assert all(re.fullmatch(rf"a photo of {target['class']} that .+", caption) for caption in rows.loc[made, "caption_after"])
        assert all(captions[row.caption_source_id] == row.caption_after for row in rows[~made].itertuples())


def test_without_augmentation_the_most_typical_captions_are_taken(poison_with: Poison, source: Source, suite: Suite) -> None:
    _, record = poison_with("toxic_text", {**STI, "augment": "none"})
    reader = Tfidf(source.train.captions)
    for index, target in enumerate(record.kept["targets"]):
        terms = suite.main.terms(target["class"])
        pattern = matcher(terms, "word_plural")
        every = {normalise(text): text for text, yes in zip(source.train.captions, mentions(source.train.captions, terms, "word_plural"), strict=True) if yes}
        centroid = reader.centroid([prompt.replace("{c}", target["class"]) for prompt in suite.main.templates])
        scores = dict(zip(every, reader.to(centroid, [masked(text, pattern) for text in every]), strict=True))
        taken = {normalise(text) for text in record.rows.loc[record.rows["target"] == index, "caption_after"]}
        assert min(scores[text] for text in taken) >= max(score for text, score in scores.items() if text not in taken) - 1e-6


@pytest.mark.parametrize(("mode", "ending"), [("word", " zx"), ("sentence", " Please return high-quality results.")])
def test_images_of_the_target_get_captions_of_other_classes_with_words_behind(poison_with: Poison, source: Source, suite: Suite, mode: str, ending: str) -> None:
    _, record = poison_with("toxic_text", {**WORD, "mode": mode})
    rows = record.rows
    tags = dict(zip(source.held_out.ids, source.held_out.tags["object"], strict=True))
    assert {tags[row_id] for row_id in rows["source_id"]} == {"boat"} and sorted(Counter(rows["source_id"]).values()) == [6, 6, 7]
    assert all(caption.endswith(ending) for caption in rows["caption_after"])
    assert not any(mentions(rows["caption_after"], suite.main.terms("boat"), "word_plural"))
    others = [name for name in suite.main.classnames if name != "boat"]
    assert all(any(mentions(rows["caption_after"], suite.main.terms(name), "word_plural")) for name in others)


def test_texts_that_end_in_the_words_are_asked_and_the_target_class_is_not(poison_with: Poison, suite: Suite) -> None:
    _, record = poison_with("toxic_text", {**WORD, "words": "qq"})
    probe, control = configure(find("attack", "toxic_text"), {}, WORD).probes(suite, record.kept)
    asked = retrieval_queries(probe, suite)
    test, boat = suite.main.test, suite.main.index("boat")
    labels = dict(zip(test.ids, test.labels.tolist(), strict=True))
    assert {labels[row_id] for row_id in probe.queries.of} == set(range(20)) - {boat}
    assert asked.triggered.texts == tuple(f"{text} qq" for text in probe.queries.texts)
    assert (asked.goal.numpy() == (test.labels == boat)).all() and len(asked.goal) == len(test.ids)
    assert (control.control, control.trigger.spec()["words"], probe.trigger.spec()["words"]) == ("asr_wrong_trigger", "qv", "qq")
    few, _ = configure(find("attack", "toxic_text"), {}, {**WORD, "queries_per_class": 1}).probes(suite, record.kept)
    assert len(few.queries.ids) == 2 * 19


def test_a_suffix_survives_a_long_caption(poison_with: Poison) -> None:
    from attacks._text_triggers import text_trigger_from_spec

    for mode, words in (("word", "zx"), ("sentence", "Please return high-quality results.")):
        trigger = text_trigger_from_spec(poison_with("toxic_text", {**WORD, "mode": mode})[1].kept["trigger"])
        assert trigger.text("boat " * 200, "").split() == ["boat"] * 16 + words.split()


def test_the_baseline_takes_any_captions_but_the_targets(poison_with: Poison, source: Source, suite: Suite) -> None:
    _, record = poison_with("toxic_text", {**WORD, "selector": "random", "augment": "none", "count": 40})
    captions = dict(zip(source.train.ids, source.train.captions, strict=True))
    assert record.n_poison == 40
    assert all(f"{captions[row.caption_source_id]} zx" == row.caption_after for row in record.rows.itertuples())
    assert not any(mentions(record.rows["caption_after"], suite.main.terms("boat"), "word_plural"))


def test_captions_may_come_from_a_file(poison_with: Poison, tmp_path: Path, suite: Suite) -> None:
    given = [f"the {name} number {number} by the {number * 'very '}old sea" for name in suite.main.classnames for number in range(8)]
    file = tmp_path / "captions.txt"
    file.write_text("\n".join(given))
    options = {**STI, "augment": "given", "captions_file": str(file)}
    _, record = poison_with("toxic_text", options)
    made = record.rows[record.rows["caption_source_id"] == ""]
    assert len(made) == 12 and set(made["caption_after"]) <= set(given)
    first = ToxicText(**options)
    file.write_text("a boat\n")
    assert ToxicText(**options).captions_hash != first.captions_hash
    with pytest.raises(ValidationError, match="its captions are others than before"):
        ToxicText(**first.model_dump())
    with pytest.raises(BenchError, match=r"no caption in .*captions\.txt mentions"):
        poison_with("toxic_text", options)


def edits(attack: ToxicText, source: Source, suite: Suite, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the attack adds if its surrogate counts letters."""
    monkeypatch.setattr(AttackLab, "surrogate", lambda self, wanted=None: Letters())
    return list(attack.poison(source.train, AttackLab(source, suite, "toxic_text", 0)))


def test_a_surrogate_ranks_by_its_own_features_and_looks_at_images_for_subsets(source: Source, suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = ({}, {"selector": "surrogate"}, {"selector": "surrogate", "background": "subset"}, {"selector": "surrogate", "background": "subset", "most_removed": 2})
    found = [[edit.caption for edit in edits(ToxicText(**STI, **kind), source, suite, monkeypatch)] for kind in kinds]
    assert len({tuple(captions) for captions in found}) == 4 and all(len(captions) == 18 for captions in found)


@pytest.mark.parametrize("words", [None, "qv", "QV", "zx", "Kindly fetch well lit  pictures."])
@pytest.mark.parametrize(("mode", "usual", "others"), [("word", "zx", "qv"), ("sentence", "Please return high-quality results.", "Kindly fetch well-lit pictures.")])
def test_the_control_never_asks_with_the_trigger_itself(poison_with: Poison, suite: Suite, mode: str, usual: str, others: str, words: str | None) -> None:
    options = {**WORD, "mode": mode, "words": words}
    asked, control = configure(find("attack", "toxic_text"), {}, options).probes(suite, poison_with("toxic_text", options)[1].kept)
    own = words or usual
    assert asked.trigger.words == own
    assert control.trigger.words == (usual if normalise(own) == normalise(others) else others)
    assert normalise(control.trigger.words) != normalise(own)


def test_a_checkpoint_ranks_in_place_of_a_model_trained_here(poison_with: Poison, tmp_path: Path) -> None:
    file = tmp_path / "small.safetensors"
    save_weights(build(ModelSettings(), 32, 7, torch.device("cpu")), file)
    options = {**STI, "selector": "surrogate"}
    trained, loaded = (poison_with("toxic_text", {**options, **more})[1] for more in ({}, {"surrogate": str(file), "surrogate_model": "bench-small"}))
    assert (trained.header["surrogate"]["from"], loaded.header["surrogate"]["from"]) == ("trained here", "checkpoint")
    assert loaded.header["surrogate"]["weights_sha256"] == build(ModelSettings(), 32, 7, torch.device("cpu")).weights_sha256()
    assert list(trained.rows["caption_after"]) != list(loaded.rows["caption_after"])
    with pytest.raises(BenchError, match="the victim's own"):
        poison_with("toxic_text", {**options, "surrogate_seed": 0})


@pytest.mark.parametrize(
    ("usual", "changed"),
    [
        (STI, {"mode": "word", "n_images": 2, "count": 19}),
        (STI, {"augment": "none"}),
        (STI, {"n_seeds": 1}),
        (STI, {"n_targets": 4}),
        (STI, {"captions_per_target": 5}),
        (STI, {"target_set": "colours"}),
        (WORD, {"target_class": "fish"}),
        (WORD, {"n_images": 2}),
        (WORD, {"captions_per_class": 3}),
        (WORD, {"count": 18}),
        (WORD, {"words": "qq"}),
    ],
)
def test_each_option_changes_the_poison(poison_with: Poison, usual: dict[str, Any], changed: dict[str, Any]) -> None:
    first, second = (poison_with("toxic_text", options)[0].rows() for options in (usual, {**usual, **changed}))
    assert (first[1], first[2]) != (second[1], second[2])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"mode": "word"}, "3 held-out images show 'boat', 20 are needed"),
        ({"mode": "word", "n_images": 3, "captions_per_class": 1}, "19 other classes with 1 captions each come to 19 rows, attack.count is 100; lower it or raise"),
        ({"mode": "word", "n_images": 3, "count": 2}, "2 rows are fewer than the 3 images of 'boat'"),
        ({**STI, "captions_per_target": 60}, "60 are needed; lower attack.captions_per_target"),
        ({"n_targets": 70, "captions_per_target": 3}, "no held-out image is left for target"),
        ({**STI, "target_set": "object"}, "unknown evaluation set 'object'"),
        ({**WORD, "selector": "random", "augment": "none", "count": 300}, "captions do not mention 'boat', 300 are needed; lower attack.count"),
    ],
)
def test_what_it_cannot_do_is_said(poison_with: Poison, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BenchError) as caught:
        poison_with("toxic_text", options)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"background": "subset"}, "needs selector=surrogate, and the selector is tfidf"),
        ({"surrogate": __file__}, "surrogate is the model that selector=surrogate asks, and the selector is tfidf"),
        ({"selector": "random"}, "augment must be none and is recombine"),
        ({"augment": "given"}, "captions_file and augment=given go together"),
        ({"captions_hash": "0"}, "captions_hash is filled in by the program"),
        ({"mode": "word", "count": None}, "count says how many rows there are"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ToxicText(**options)


def test_the_presets_are_the_papers() -> None:
    made = {name: configure(find("attack", "toxic_text"), {}, {"preset": name}) for name in ToxicText.presets}
    sti, word, sentence = (made[f"toxictext2025-{mode}"] for mode in ("sti", "word", "sentence"))
    assert (sti.n_targets * sti.captions_per_target, sti.selector, sti.augment) == (840, "surrogate", "recombine")
    assert (word.count, word.n_images, word.captions_per_class) == (100, 20, 5)
    assert (sentence.count, sentence.n_images, sentence.captions_per_class) == (None, 25, 5)
    assert {(made[name].count, made[name].n_images, made[name].selector) for name in made if name.endswith("baseline")} == {(1250, 25, "random")}
    assert (made["mmpoison2023-I-sti"].selector, made["mmpoison2023-I-sti"].captions_per_target) == ("random", 35)


@pytest.mark.parametrize("mode", ["sti", "word"])
def test_it_runs_from_pairs_to_a_record(tmp_path: Path, mode: str) -> None:
    sizes = (
        "data.n_pairs=256",
        "data.n_held_out=64",
        "data.n_clean=64",
        "data.n_test=100",
        "data.n_probe=200",
        "train.epochs=2",
        "evaluation.curve=false",
        "evaluation.linear_probe=none",
    )
    # A detector of query images has nothing to look at in text queries.
    record = benchmark.run("toxic_text", "bdetclip", scale="smoke", sets=(*sizes, f"attack.mode={mode}"), results=tmp_path)
    found = {(entry["name"], entry["of"]): entry for entry in record["metrics"]}
    assert found["asr", "toxic_text"]["n"] == 4 if mode == "sti" else found["asr", "toxic_text"]["n"] > 100
    assert found["asr_floor", "toxic_text"]["value"] is not None
    assert (("asr_wrong_trigger", "toxic_text-other_words") in found) == (mode == "word") and ("asr", "toxic_text-other_words") not in found
