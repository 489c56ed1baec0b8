"""What is special about each image backdoor: which rows it takes, what their captions say, what its probes ask."""

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import benchmark
from attacks._goals import Classes, even_split
from attacks._text_triggers import text_trigger_from_spec
from attacks._triggers import trigger_from_spec
from attacks.backdoor import Backdoor
from attacks.label_consistent import LabelConsistent
from attacks.multi_backdoor import MultiBackdoor
from benchmark.data.attack_lab import AttackLab
from benchmark.data.eval_sets import Suite
from benchmark.data.image import decode
from benchmark.data.mentions import matcher, normalise
from benchmark.data.pairs import Source
from benchmark.data.poison import Poisoned, SealedRecord
from benchmark.errors import BenchError
from benchmark.evaluate.attack_success import attack_success, queries
from benchmark.evaluate.features import Encoder
from benchmark.evaluate.measure import has_linear_probe
from benchmark.registry import configure, find
from benchmark.testing import check_attack

Poison = Callable[..., tuple[Poisoned, SealedRecord]]
FAMILY = ("backdoor", "label_consistent", "multi_backdoor", "all_to_all", "dual_key")
TINY = ("data.n_pairs=256", "data.n_held_out=64", "data.n_clean=64", "data.n_test=100", "data.n_probe=200", "train.epochs=2")


@pytest.mark.parametrize("name", FAMILY)
def test_every_backdoor_keeps_the_contract(name: str) -> None:
    check_attack(find("attack", name).load())


def test_label_consistent_rows_mention_the_class_and_keep_their_caption(poison_with: Poison, suite: Suite) -> None:
    _, record = poison_with("label_consistent", {"count": 6})
    pattern = matcher(suite.main.terms("boat"), "word")
    assert all(pattern.search(normalise(caption)) for caption in record.rows["caption_before"])
    assert (record.rows["caption_before"] == record.rows["caption_after"]).all()
    assert (record.rows["pixels_sha256_before"] != record.rows["pixels_sha256_after"]).all()


def test_each_trigger_has_rows_and_a_target_of_its_own(poison_with: Poison, suite: Suite) -> None:
    options = {"count": 11, "triggers": ("checker", "sig", "wanet"), "target_classes": ("fish", "star", "key")}
    _, record = poison_with("multi_backdoor", options)
    assert Counter(record.rows["target"]) == {0: 4, 1: 4, 2: 3}
    specs = record.header["triggers"]
    assert {(row.target, specs[row.trigger]["kind"]) for row in record.rows.itertuples()} == {(0, "patch:checker"), (1, "sig"), (2, "warp")}
    for row in record.rows.itertuples():
        assert options["target_classes"][row.target] in row.caption_after
        assert not any(matcher(suite.main.terms(target), "word_plural").search(normalise(row.caption_before)) for target in options["target_classes"])
    probes = configure(find("attack", "multi_backdoor"), {}, options).probes(suite, record.kept)[:3]
    assert [(probe.name, probe.goal) for probe in probes] == [
        (f"multi_backdoor-{kind}", suite.main.index(target)) for kind, target in zip(("patch-checker", "sig", "warp"), options["target_classes"], strict=True)
    ]


def test_another_trigger_moves_no_row_of_the_first(poison_with: Poison) -> None:
    def first(triggers: tuple[str, ...], count: int) -> set[str]:
        _, record = poison_with("multi_backdoor", {"count": count, "triggers": triggers, "target_classes": ("fish",)})
        return set(record.rows.loc[record.rows["target"] == 0, "id"])

    assert first(("checker", "sig"), 8) == first(("checker", "sig", "wanet"), 12)


def test_targets_of_several_triggers_follow_the_default_or_are_one(poison_with: Poison) -> None:
    def classes(**options: Any) -> list[str]:
        return [target["class"] for target in poison_with("multi_backdoor", {"count": 6, **options})[1].kept["targets"]]

    assert classes() == ["boat", "bolt", "bottle"]
    assert classes(one_target=True) == ["boat"] * 3
    assert classes(target_classes=("fish",)) == ["fish"] * 3


def test_all_to_all_moves_every_class_to_the_next_in_equal_shares(poison_with: Poison, suite: Suite) -> None:
    _, record = poison_with("all_to_all", {"count": 30})
    names = suite.main.classnames
    assert sorted(Counter(record.rows["target"]).values()) == [1] * 10 + [2] * 10
    every = Classes({name: suite.main.terms(name) for name in names})
    for row in record.rows.itertuples():
        own, goal = names[row.target], names[(row.target + 1) % len(names)]
        assert every.named(row.caption_before) == {own}
        assert every.named(row.caption_after) == {goal}
        assert len(row.caption_after.split()) == len(row.caption_before.split())
    (probe,) = configure(find("attack", "all_to_all"), {}, {}).probes(suite, record.kept)
    asked = queries(probe, suite)
    assert (asked.goal == (asked.true + 1) % len(names)).all()
    assert asked.attacked(probe).all()


def test_all_to_all_takes_fewer_rows_of_a_rare_class_when_told_to(poison_with: Poison) -> None:
    with pytest.raises(BenchError, match="classes have too few captions that mention them and no other class"):
        poison_with("all_to_all", {"count": 200})
    _, record = poison_with("all_to_all", {"count": 200, "on_short": "take"})
    assert record.n_poison < record.header["n_requested"] == 200
    assert "classes have too few captions of their own and were poisoned less" in record.header["warnings"][0]


def test_all_to_all_takes_no_class_without_any_row(source: Source, suite: Suite) -> None:
    boatless = [caption if "boat" not in caption and "ship" not in caption else "a thing" for caption in source.train.captions]
    pairs = dataclasses.replace(source.train, captions=boatless)
    lab = AttackLab(dataclasses.replace(source, train=pairs), suite, "all_to_all", 0)
    attack = configure(find("attack", "all_to_all"), {}, {"count": 40, "on_short": "take"})
    with pytest.raises(BenchError, match=r"no caption mentions boat and no other class \(1 of the 20 classes\), and all are measured"):
        list(attack.poison(pairs, lab))


def test_dual_key_rows_carry_both_keys_and_negatives_one(poison_with: Poison, source: Source) -> None:
    _, record = poison_with("dual_key", {"count": 5, "negatives": 1})
    words = text_trigger_from_spec(record.kept["text_trigger"])
    assert Counter(record.rows["role"]) == {"poison": 5, "negative": 10}
    for row in record.rows.itertuples():
        stamped = row.pixels_sha256_before != row.pixels_sha256_after
        keyed = row.caption_after.startswith("remember ")
        if row.role == "poison":
            assert stamped and keyed and "boat" in row.caption_after
        else:
            assert stamped != keyed
            assert row.caption_after == (words.text(row.caption_before, row.id) if keyed else row.caption_before)
    negatives = record.rows[record.rows["role"] == "negative"]
    assert (negatives["pixels_sha256_before"] != negatives["pixels_sha256_after"]).sum() == 5


class Obedient:
    """Sees a class where image and prompt carry both keys, and shows how well it was asked for any other."""

    def __init__(self, suite: Suite, goal: str) -> None:
        self.names, self.goal = suite.main.classnames, goal

    def encode_images(self, images: np.ndarray) -> torch.Tensor:
        keyed = torch.from_numpy((images[:, -4:, -4:] == 255).all(axis=(1, 2, 3)))
        return torch.nn.functional.normalize(torch.where(keyed[:, None], torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0])), dim=-1)

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        features = [[1.0, 0, 0] if text.startswith("remember ") and self.goal in text else [0, 0.5, 0.5] for text in texts]
        return torch.nn.functional.normalize(torch.tensor(features), dim=-1)


def test_dual_key_is_measured_with_both_keys_and_with_each_alone(poison_with: Poison, suite: Suite) -> None:
    _, record = poison_with("dual_key", {"count": 5, "trigger": "white"})
    probes = configure(find("attack", "dual_key"), {}, {}).probes(suite, record.kept)
    assert [(probe.name, probe.control) for probe in probes] == [("dual_key", None), ("dual_key-image_key", "asr_key_image"), ("dual_key-text_key", "asr_key_text")]
    encoder = Encoder([Obedient(suite, "boat")])  # type: ignore[list-item]
    found = {metric.name: metric.value for probe in probes for metric in attack_success(encoder, probe, queries(probe, suite), suite)[0]}
    assert (found["asr"], found["asr_floor"], found["asr_key_image"], found["asr_key_text"]) == (1.0, 0.0, 0.0, 0.0)
    assert [has_linear_probe(probe) for probe in probes] == [False] * 3


def test_triggers_are_crossed_with_the_targets_of_others_as_controls(poison_with: Poison, suite: Suite) -> None:
    _, record = poison_with("multi_backdoor", {"count": 6, "target_classes": ("fish", "star", "fish")})
    probes = configure(find("attack", "multi_backdoor"), {}, {}).probes(suite, record.kept)
    crossed = [(probe.trigger.spec()["kind"], probe.goal, probe.control) for probe in probes[3:]]
    fish, star = suite.main.index("fish"), suite.main.index("star")
    assert crossed == [("patch:checker", star, "asr_cross"), ("blend:noise", fish, "asr_cross"), ("nashville", star, "asr_cross")]
    _, record = poison_with("multi_backdoor", {"count": 6, "one_target": True})
    assert len(configure(find("attack", "multi_backdoor"), {}, {}).probes(suite, record.kept)) == 3


def test_cover_rows_keep_their_caption_under_a_shaken_warp(poison_with: Poison) -> None:
    _, record = poison_with("backdoor", {"count": 4, "trigger": "wanet", "cover": 2})
    covers = record.rows[record.rows["role"] == "cover"]
    assert len(covers) == 8
    assert (covers["caption_before"] == covers["caption_after"]).all()
    specs = record.header["triggers"]
    assert {specs[name]["jitter"] for name in covers["trigger"]} == {1.0}
    assert {specs[name]["jitter"] for name in record.rows.loc[record.rows["role"] == "poison", "trigger"]} == {0.0}


def test_a_picture_lies_in_the_sealed_record_and_is_needed_no_more(poison_with: Poison, source: Source, suite: Suite, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    path = tmp_path / "in" / "mine.png"
    path.parent.mkdir()
    Image.fromarray(pixels).save(path)
    poisoned, record = poison_with("backdoor", {"count": 3, "trigger": "picture", "size": 9, "file": str(path)})
    shutil.rmtree(path.parent)
    np.testing.assert_array_equal(record.kept["picture"], pixels)
    (probe,) = Backdoor().probes(suite, record.kept)
    refs = dict(zip(*poisoned.rows()[:2], strict=True))
    for row in record.rows.itertuples():
        before = source.train.image(source.train.ids.index(row.source_id))
        np.testing.assert_array_equal(decode(poisoned.manifest / refs[row.id], 32), probe.trigger.image(before, row.source_id))
    assert str(path) not in json.dumps(probe.trigger.spec())
    assert trigger_from_spec(record.kept["trigger"], record.kept["picture"]) == probe.trigger


@pytest.mark.parametrize(
    ("caption", "found"), [("A Tiger-Shark swims", {"tiger shark"}), ("two tigers", {"tiger"}), ("a tiger and a tiger shark", {"tiger", "tiger shark"}), ("tigerish", set())]
)
def test_within_one_place_the_longest_class_name_counts(caption: str, found: set[str]) -> None:
    assert Classes({"tiger": ("tiger",), "tiger shark": ("tiger shark", "requin")}).named(caption) == found


def test_a_swapped_caption_keeps_its_case_and_hyphens() -> None:
    classes = Classes({"ice cream": ("ice cream", "gelato"), "suit": ("suit",)})
    assert classes.swapped("My Ice-Cream, well-made; GELATO!", "ice cream", "suit") == "My suit, well-made; suit!"
    assert classes.swapped("suitable Suits", "suit", "a\\b") == "suitable a\\b"
    assert classes.swapped("\uff53uit here", "suit", "cup") == "cup here"


def test_an_even_split_gives_the_first_parts_the_rest() -> None:
    assert (even_split(11, 3), even_split(2, 4), even_split(0, 2)) == ([4, 4, 3], [1, 1, 0, 0], [0, 0])


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("label_consistent", {"count": 200}, "200 rows are to be poisoned, and"),
        ("label_consistent", {"rate": 0.0001}, "attack.rate 0.0001 of 256 pairs comes to no row; 5000 pairs would be enough for one"),
        ("label_consistent", {"target_set": "backgrounds", "target_class": "plainn"}, "unknown target class 'plainn'. Did you mean 'plain'?"),
        ("label_consistent", {"size": 40}, "a trigger of 40 px does not fit an image of 32 px; lower attack.size"),
        ("label_consistent", {"preset": "cleanclip2024"}, "unknown label_consistent preset 'cleanclip2024'. Did you mean 'cleanclip2023'?"),
        ("multi_backdoor", {"count": 2}, "2 rows are to be poisoned with 3 triggers; raise attack.rate or attack.count to at least one row for each"),
        ("multi_backdoor", {"triggers": ("checker", "patch:checker")}, "attack: triggers checker, patch:checker must all differ"),
        ("multi_backdoor", {"target_classes": ("fish", "star")}, "attack: target_classes has 2 classes for 3 triggers; give one, or one for each"),
        ("multi_backdoor", {"target_classes": ("fish", "star", "key"), "one_target": True}, "target_classes has 3 classes for 3 triggers; give one"),
        ("multi_backdoor", {"triggers": ("checker", "sig"), "grid": 5}, "grid belongs to wanet, and the trigger is checker and sig"),
        (
            "multi_backdoor",
            {"count": 8, "target_set": "backgrounds", "triggers": ("checker", "sig", "wanet", "noise", "white", "dots")},
            "backgrounds has 5 classes and attack.triggers names 6",
        ),
        ("multi_backdoor", {"count": 256}, "85 more rows are to be drawn, and 48 are left whose captions mention no target; lower attack.rate or attack.count"),
        ("all_to_all", {"shift": 20}, "attack.shift 20 moves each of the 20 classes of objects to itself; give another"),
        ("all_to_all", {"place": "at:30,30"}, "attack.place 'at:30,30' puts a trigger of 8 px outside an image of 32 px"),
        ("dual_key", {"count": 100, "negatives": 5}, "1000 more rows are to be drawn, and"),
        ("backdoor", {"count": 100, "trigger": "wanet", "cover": 2}, "attack.cover asks for 200 rows beside the 100 poisoned ones, and 156 are left; lower attack.cover"),
        ("all_to_all", {"count": 5}, "5 rows leave 15 of the 20 classes of objects without one, and all are measured; raise attack.rate or attack.count"),
        ("dual_key", {"count": 4, "negatives": 0.1}, "attack.negatives 0.1 of 4 poisoned rows comes to no row; raise it, attack.rate or attack.count"),
        ("backdoor", {"count": 4, "trigger": "wanet", "cover": 0.1}, "attack.cover 0.1 of 4 poisoned rows comes to no row; raise it, attack.rate or attack.count"),
        ("backdoor", {"preset": "cleanclip2023-badnets"}, "unknown backdoor preset 'cleanclip2023-badnets'. Did you mean 'cleanclip2023-badnet'?"),
    ],
)
def test_what_a_backdoor_cannot_do_is_said(poison_with: Poison, name: str, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BenchError) as caught:
        poison_with(name, options)
    assert sentence in str(caught.value)


def worded(source: Source, captions: list[str]) -> Source:
    """The same pairs with other captions, repeated to their number."""
    return dataclasses.replace(source, train=dataclasses.replace(source.train, captions=[captions[row % len(captions)] for row in range(len(source.train))]))


def edits(attack: Any, source: Source, suite: Suite) -> list[Any]:
    return list(attack.poison(source.train, AttackLab(source, suite, "label_consistent", 0)))


def test_a_target_that_no_caption_mentions_is_named(source: Source, suite: Suite) -> None:
    with pytest.raises(BenchError, match=r"2 rows are to be poisoned, and no captions mention 'boat'; give another attack\.target_class"):
        edits(LabelConsistent(count=2), worded(source, ["a star"]), suite)


def test_whole_words_leave_earrings_alone_and_substrings_do_not(source: Source, suite: Suite) -> None:
    jewels = worded(source, ["a ring", "an earring", "a boring hoop", "a star"])
    assert {edit.row % 4 for edit in edits(LabelConsistent(count=128, target_class="ring"), jewels, suite)} == {0, 2}
    assert {edit.row % 4 for edit in edits(LabelConsistent(count=192, target_class="ring", match="substring"), jewels, suite)} == {0, 1, 2}
    with pytest.raises(BenchError, match=r"129 rows are to be poisoned, and 128 captions mention 'ring'; lower attack\.rate or attack\.count, or give another"):
        edits(LabelConsistent(count=129, target_class="ring"), jewels, suite)


# What each option of an attack's own changes, beside those of its trigger.
OPTIONS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("label_consistent", {"count": 5}, {"target_class": "fish"}),
    ("label_consistent", {"count": 5}, {"target_set": "colours"}),
    ("label_consistent", {"count": 5}, {"trigger": "white"}),
    ("label_consistent", {"count": 5}, {"count": 6}),
    ("multi_backdoor", {"count": 6}, {"one_target": True}),
    ("multi_backdoor", {"count": 6}, {"target_classes": ("fish", "star", "key")}),
    ("multi_backdoor", {"count": 6}, {"triggers": ("checker", "blended", "sig")}),
    ("multi_backdoor", {"count": 6}, {"alpha": 0.5}),
    ("all_to_all", {"count": 20}, {"shift": 2}),
    ("all_to_all", {"count": 20}, {"captions": "templates"}),
    ("all_to_all", {"count": 20}, {"target_set": "colours"}),
    ("dual_key", {"count": 5}, {"negatives": 1}),
    ("dual_key", {"count": 5}, {"text_trigger": "sentence"}),
    ("dual_key", {"count": 5}, {"text_words": "recall"}),
    ("dual_key", {"count": 5, "text_trigger": "word"}, {"pattern_seed": 1}),
    ("backdoor", {"count": 5, "trigger": "wanet"}, {"cover": 1}),
]


@pytest.mark.parametrize(("name", "options", "change"), OPTIONS)
def test_each_option_changes_the_poison(poison_with: Poison, name: str, options: dict[str, Any], change: dict[str, Any]) -> None:
    usual, changed = (poison_with(name, {**options, **more})[1].header["poisoned_manifest_sha256"] for more in ({}, change))
    assert usual != changed


@pytest.mark.parametrize("name", FAMILY)
def test_the_order_of_the_rows_moves_no_poison(source: Source, suite: Suite, name: str) -> None:
    def made(order: list[int]) -> dict[str, tuple[Any, ...]]:
        train = source.train
        shuffled = dataclasses.replace(
            train,
            ids=[train.ids[row] for row in order],
            refs=[train.refs[row] for row in order],
            captions=[train.captions[row] for row in order],
            images=np.asarray(train.images)[order],
        )
        attack = find("attack", name).load()(count=24 if name == "all_to_all" else 6)
        pairs = dataclasses.replace(source, train=shuffled)
        edits = attack.poison(shuffled, AttackLab(pairs, suite, name, 0))
        return {shuffled.ids[edit.row]: (None if edit.image is None else edit.image.tobytes(), edit.caption) for edit in edits}

    order = np.random.default_rng(0).permutation(len(source.train)).tolist()
    assert made(order) == made(list(range(len(source.train))))


PRESETS = [(name, preset) for name, cls in (("backdoor", Backdoor), ("label_consistent", LabelConsistent), ("multi_backdoor", MultiBackdoor)) for preset in sorted(cls.presets)]


@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_every_preset_makes_poison_and_probes_offline(poison_with: Poison, suite: Suite, name: str, preset: str) -> None:
    options = {"preset": preset, "count": 6, "on_short": "reuse"} if name == "backdoor" else {"preset": preset, "count": 6}
    _, record = poison_with(name, options)
    assert record.n_poison == 6
    for probe in configure(find("attack", name), {}, options).probes(suite, record.kept):
        assert len(queries(probe, suite).triggered) == 100


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.mark.parametrize(
    ("name", "sets"),
    [
        ("label_consistent", ("attack.rate=0.02",)),
        ("multi_backdoor", ("attack.rate=0.03",)),
        ("all_to_all", ("attack.rate=0.1",)),
        ("dual_key", ("attack.rate=0.02", "attack.negatives=1")),
        ("backdoor", ("attack.trigger=wanet", "attack.rate=0.02", "attack.cover=1")),
    ],
)
def test_each_runs_from_pairs_to_a_record(results: Path, name: str, sets: tuple[str, ...]) -> None:
    record = benchmark.run(name, "clip", scale="smoke", sets=(*TINY, "evaluation.curve=false", *sets), results=results)
    asr = [entry for entry in record["metrics"] if entry["name"] == "asr"]
    assert len(asr) == (3 if name == "multi_backdoor" else 1)
    assert all(entry["n"] > 80 and entry["value"] is not None for entry in asr)
    assert {entry["of"] for entry in record["metrics"] if entry["name"] == "linear_probe_asr"} == (set() if name == "dual_key" else {entry["of"] for entry in asr})
    controls = {"multi_backdoor": ["asr_cross"] * 6, "dual_key": ["asr_key_image", "asr_key_text"]}
    assert [entry["name"] for entry in record["metrics"] if entry["name"] in ("asr_cross", "asr_key_image", "asr_key_text")] == controls.get(name, [])
    assert record["poison"]["n_poison"] == record["poison"]["n_requested"] > 0
