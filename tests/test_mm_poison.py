"""mmPoison: which rows get which images, what is asked, and what it cannot do."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

import benchmark
from attacks._held_out import rows_of
from attacks.mm_poison import MmPoison
from attacks.toxic_text import ToxicText
from benchmark.contract import Attack
from benchmark.data.attack_lab import AttackLab
from benchmark.data.eval_sets import Suite
from benchmark.data.image import decode
from benchmark.data.mentions import mentions
from benchmark.data.pairs import Source
from benchmark.data.poison import Poisoned, SealedRecord
from benchmark.errors import BenchError
from benchmark.evaluate.retrieval import retrieval_queries
from benchmark.registry import configure, find
from benchmark.testing import check_attack

Poison = Callable[..., tuple[Poisoned, SealedRecord]]
FISH_STAR = {"source_classes": ("fish",), "target_classes": ("star",)}


def of(source: Source, classname: str) -> set[str]:
    return {row_id for row_id, tag in zip(source.train.ids, source.train.tags["object"], strict=True) if tag == classname}


@pytest.mark.parametrize("variant", ["I", "II", "III"])
def test_it_keeps_the_contract(variant: str) -> None:
    class Variant(MmPoison):
        """One variant. Source: the attack's own page."""

        tiny = {"variant": variant}

    Variant.__module__ = MmPoison.__module__
    check_attack(Variant)


def test_every_row_of_the_class_gets_an_image_of_the_other_and_keeps_its_text(poison_with: Poison, source: Source) -> None:
    _, record = poison_with("mm_poison", FISH_STAR)
    rows = record.rows
    assert set(rows["id"]) == of(source, "fish") and set(rows["source_id"]) <= of(source, "star")
    assert (rows["caption_before"] == rows["caption_after"]).all()
    pixels = dict(zip(source.train.ids, source.train.images, strict=True))
    poisoned, _ = poison_with("mm_poison", FISH_STAR)
    refs = dict(zip(*poisoned.rows()[:2], strict=True))
    for row in rows.itertuples():
        np.testing.assert_array_equal(decode(poisoned.manifest / refs[row.id], 32), pixels[row.source_id])


def test_images_are_used_equally_often_or_once_more(poison_with: Poison, source: Source) -> None:
    _, record = poison_with("mm_poison", {"source_classes": ("ball",), "target_classes": ("house",)})
    uses = Counter(record.rows["source_id"])
    n, theirs = len(of(source, "ball")), len(of(source, "house"))
    assert len(uses) == theirs and sorted(set(uses.values())) == [n // theirs, n // theirs + 1]


def test_variant_one_shows_one_held_out_image_that_joins_the_gallery(poison_with: Poison, source: Source, suite: Suite) -> None:
    options = {**FISH_STAR, "variant": "I"}
    _, record = poison_with("mm_poison", options)
    assert len(set(record.rows["pixels_sha256_after"])) == 1
    row = source.held_out.ids.index(record.kept["image_id"])
    assert source.held_out.tags["object"][row] == "star"
    (probe,) = configure(find("attack", "mm_poison"), {}, options).probes(suite, record.kept)
    asked = retrieval_queries(probe, suite)
    assert len(asked.goal) == len(suite.main.test.ids) + 1 and asked.goal.nonzero().tolist() == [[len(suite.main.test.ids)]]
    np.testing.assert_array_equal(probe.gallery.images[-1], source.held_out.images[row])


def test_variant_one_may_train_on_a_test_image_and_says_so(poison_with: Poison, suite: Suite) -> None:
    options = {**FISH_STAR, "variant": "I", "image_from": "test"}
    _, record = poison_with("mm_poison", options)
    (probe,) = configure(find("attack", "mm_poison"), {}, options).probes(suite, record.kept)
    test = suite.main.test
    place = test.ids.index(record.kept["image_id"])
    assert suite.main.classnames[test.labels[place]] == "star" and probe.goal == (place,) and len(probe.gallery.ids) == len(test.ids)
    assert f"test image {record.kept['image_id']} is trained on" in record.header["warnings"][0]


def test_queries_are_test_captions_of_the_class_and_the_floor_is_of_neither(poison_with: Poison, suite: Suite) -> None:
    options = {"variant": "III", "source_classes": ("fish", "ball"), "target_classes": ("star", "ring")}
    _, record = poison_with("mm_poison", options)
    probes = configure(find("attack", "mm_poison"), {}, options).probes(suite, record.kept)
    main = suite.main
    labels = dict(zip(main.test.ids, main.test.labels.tolist(), strict=True))
    for probe, wanted, shown in zip(probes, ("fish", "ball"), ("star", "ring"), strict=True):
        assert {main.classnames[labels[row_id]] for row_id in probe.queries.of} == {wanted}
        assert all(mentions(probe.queries.texts, main.terms(wanted), "word_plural"))
        assert {main.classnames[labels[probe.gallery.ids[place]]] for place in probe.goal} == {shown}
        involved = ("fish", "ball", "star", "ring")
        assert {main.classnames[labels[row_id]] for row_id in probe.floor.of}.isdisjoint(involved)
        assert not any(mentions(probe.floor.texts, [term for name in involved for term in main.terms(name)], "word_plural"))
        assert len(set(probe.floor.of)) == len(probe.floor.of) > 50
        assert retrieval_queries(probe, suite).counts.all()


def test_classes_follow_the_default_target_without_overlap(poison_with: Poison) -> None:
    def pairs(**options: Any) -> list[tuple[str, str]]:
        return [(target["source"], target["class"]) for target in poison_with("mm_poison", options)[1].kept["targets"]]

    assert pairs() == [("bolt", "boat")]
    assert pairs(variant="III") == [("bolt", "boat"), ("cross", "bottle")]
    assert pairs(target_classes=("bolt",)) == [("bottle", "bolt")]
    assert pairs(source_classes=("fish",)) == [("fish", "boat")]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"source_classes": ("fihs",)}, "unknown target class 'fihs'. Did you mean 'fish'?"),
        ({"source_classes": ("boat",)}, "class 'boat' stands twice among attack.source_classes, or in attack.target_classes too"),
        ({"share": 0.01}, "attack.share 0.01 of the 8 pairs of class 'bolt' comes to no row"),
        (
            {"variant": "III", "target_set": "backgrounds", "source_classes": tuple("abc"), "target_classes": tuple("def")},
            "backgrounds has 5 classes, and 3 pairs of classes need 6",
        ),
    ],
)
def test_what_it_cannot_do_is_said(poison_with: Poison, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BenchError) as caught:
        poison_with("mm_poison", options)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source_classes": ("a", "b"), "target_classes": ("c",)}, "must be of one length"),
        ({"source_classes": ("a", "b"), "target_classes": ("c", "d")}, "variant II takes one pair of classes, got 2"),
        ({"variant": "III", "target_classes": ("c",)}, "variant III takes two pairs of classes or more, got 1"),
        ({"image_from": "test"}, "image_from belongs to variant I"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MmPoison(**options)


@pytest.mark.parametrize("preset", sorted(MmPoison.presets))
def test_presets_ask_for_their_papers_classes(poison_with: Poison, preset: str) -> None:
    attack = configure(find("attack", "mm_poison"), {}, {"preset": preset})
    with pytest.raises(BenchError, match=f"unknown target class '{attack.source_classes[0]}'"):
        poison_with("mm_poison", attack.model_dump())


def test_it_runs_from_pairs_to_a_record(tmp_path: Any) -> None:
    sizes = ("data.n_pairs=256", "data.n_held_out=64", "data.n_clean=64", "data.n_test=200", "data.n_probe=200", "train.epochs=2")
    record = benchmark.run("mm_poison", "clip", scale="smoke", sets=sizes, results=tmp_path)
    found = {entry["name"]: entry for entry in record["metrics"] if entry["of"] == "mm_poison"}
    assert found["asr"]["n"] > 10 and found["asr_floor"]["n"] > 100 and found["asr_top50"]["value"] is not None
    assert "linear_probe_asr" not in found and found["asr"]["card"] in record["cards"]
    assert all({"asr/mm_poison", "asr_floor/mm_poison"} <= point["metrics"].keys() for point in record["curve"])


@pytest.mark.parametrize("attack", [MmPoison(), ToxicText(mode="word", n_images=2, count=19)])
def test_without_captions_of_test_images_nothing_is_poisoned(source: Source, suite: Suite, attack: Attack) -> None:
    bare = dataclasses.replace(suite, world_seed=None)
    with pytest.raises(BenchError, match=r"evaluation set 'objects' has no captions, and retrieval asks by caption; put a captions\.tsv"):
        list(attack.poison(source.train, AttackLab(source, bare, "test", 0)))


def test_rows_without_tags_are_told_by_their_captions(source: Source, suite: Suite) -> None:
    bare = dataclasses.replace(source.train, tags={})
    fish = rows_of(bare, suite.main, suite.main.index("fish"))
    assert 0 < sum(fish) <= len(of(source, "fish"))
    assert {row_id for row_id, yes in zip(bare.ids, fish, strict=True) if yes} <= of(source, "fish")
    both = dataclasses.replace(bare, captions=["a fish and a star", *bare.captions[1:]])
    assert not rows_of(both, suite.main, suite.main.index("fish"))[0]
