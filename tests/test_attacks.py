"""One table over every attack: exact counts, equal bytes for equal seeds, and nothing else touched."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmark.data.attack_lab import AttackLab
from benchmark.data.eval_sets import Suite
from benchmark.data.image import decode
from benchmark.data.mentions import matcher, normalise
from benchmark.data.pairs import Source
from benchmark.data.poison import Poisoned, SealedRecord
from benchmark.errors import BenchError
from benchmark.registry import configure, find, names
from benchmark.settings import digest

Poison = Callable[..., tuple[Poisoned, SealedRecord]]

# Attack, tiny options, rows that they touch in 256 pairs.
TABLE: list[tuple[str, dict[str, Any], int]] = [
    ("none", {}, 0),
    ("backdoor", {"rate": 0.04}, 10),
    ("backdoor", {"rate": 0}, 0),
    ("backdoor", {"count": 7, "trigger": "blended"}, 7),
    ("backdoor", {"rate": 0.04, "edits": "append"}, 11),
    ("backdoor", {"count": 70, "edits": "append"}, 70),
    ("backdoor", {"count": 6, "trigger": "noise", "pattern": "per_image", "overflow": "wrap", "place": "random", "captions": "corpus"}, 6),
    ("backdoor", {"count": 5, "trigger": "dots", "target_set": "colours", "target_class": "blue"}, 5),
    ("backdoor", {"count": 6, "trigger": "wanet", "cover": 1.5}, 15),
    ("label_consistent", {"rate": 0.02}, 5),
    ("label_consistent", {"count": 4, "trigger": "sig", "target_class": "fish"}, 4),
    ("multi_backdoor", {"rate": 0.04}, 10),
    ("multi_backdoor", {"count": 7, "triggers": ("picture", "triangles"), "one_target": True}, 7),
    ("all_to_all", {"rate": 0.1}, 26),
    ("all_to_all", {"count": 13, "target_set": "colours", "captions": "templates", "shift": 3}, 13),
    ("dual_key", {"rate": 0.04}, 10),
    ("dual_key", {"count": 6, "negatives": 0.5, "text_trigger": "word"}, 12),
    ("mm_poison", {"share": 0.5}, 4),
    ("mm_poison", {"variant": "I", "source_classes": ("fish",), "target_classes": ("star",), "share": 0.5}, 7),
    ("mm_poison", {"variant": "III", "share": 0.3}, 5),
    ("toxic_text", {"n_targets": 3, "captions_per_target": 5}, 15),
    ("toxic_text", {"mode": "word", "n_images": 3, "count": 19}, 19),
    ("toxic_text", {"mode": "sentence", "n_images": 2, "captions_per_class": 3, "count": None}, 57),
    ("toxic_text", {"mode": "sentence", "n_images": 2, "count": 9, "selector": "random", "augment": "none"}, 9),
    ("corrupt_encoder", {"rate": 0.03, "n_references": 2}, 8),
    ("corrupt_encoder", {"count": 10, "support_ratio": 0.3, "n_references": 2, "n_support_references": 1, "caption": "prompt"}, 10),
    ("corrupt_encoder", {"count": 9, "n_references": 2, "caption": "bridge"}, 9),
    ("noisy_alignment", {"rate": 0.03}, 8),
    ("noisy_alignment", {"count": 7, "trigger": "blended", "canvas": "native", "caption": "random"}, 7),
    ("badclip", {"count": 6, "n_images": 64, "epochs": 1}, 6),
    ("targeted", {"n_targets": 4, "captions_per_target": 3}, 12),
    ("targeted", {"n_targets": 3, "rate": 0.04}, 11),
    ("targeted", {"target_classes": ("boat", "star"), "captions_per_target": 40, "on_short": "templates"}, 80),
    ("targeted", {"n_targets": 3, "images_per_target": 2, "captions_per_target": 3}, 18),
    ("targeted", {"n_targets": 20, "captions_per_target": 2, "caption_source": "templates"}, 40),
]
COMPOSED = ("corrupt_encoder", "noisy_alignment")  # their rows show more than one held-out image; tests/test_composed.py looks at them
every_attack = pytest.mark.parametrize(("name", "options", "n"), TABLE, ids=lambda value: value if isinstance(value, str) else "")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_every_attack_is_in_the_table() -> None:
    assert {name for name, _, _ in TABLE} == set(names("attack"))


@every_attack
def test_exactly_the_promised_rows_change_and_all_others_stay(poison_with: Poison, source: Source, name: str, options: dict[str, Any], n: int) -> None:
    poisoned, record = poison_with(name, options)
    before = {row_id: (ref, caption) for row_id, ref, caption in zip(source.train.ids, source.train.refs, source.train.captions, strict=True)}
    after = {row_id: (ref, caption) for row_id, ref, caption in zip(*poisoned.rows(), strict=True)}
    changed = {row_id for row_id in after if after[row_id] != before.get(row_id)}
    assert changed == set(record.rows["id"])
    assert len(changed) == record.n_poison == record.header["n_requested"] == n
    assert before.keys() <= after.keys()
    assert record.header["poison_rate"] == n / len(after)
    assert record.header["edit_mode"] == ("none" if n == 0 else "append" if len(after) > len(before) else "replace")


@every_attack
def test_the_same_seed_gives_the_same_bytes(poison_with: Poison, tmp_path: Path, name: str, options: dict[str, Any], n: int) -> None:
    first, second = (poison_with(name, options, cache=tmp_path / cache)[0] for cache in ("one", "two"))
    assert first.manifest.parent.name == second.manifest.parent.name
    assert contents(first.manifest.parent) == contents(second.manifest.parent)


@every_attack
def test_another_seed_moves_the_rows_and_keeps_trigger_and_target_of_a_backdoor(poison_with: Poison, name: str, options: dict[str, Any], n: int) -> None:
    (first, one), (second, other) = (poison_with(name, options, seed=seed) for seed in (0, 1))
    assert (first.rows() != second.rows()) == (n > 0)
    assert one.n_poison == other.n_poison
    if name not in ("none", "targeted", "mm_poison") and "images" not in one.kept:
        for key in ("trigger", "targets") if name in COMPOSED else one.kept:
            np.testing.assert_equal(one.kept[key], other.kept[key])
        assert one.header["triggers"].keys() == other.header["triggers"].keys()


@every_attack
def test_a_sham_changes_captions_and_no_pixel(poison_with: Poison, source: Source, name: str, options: dict[str, Any], n: int) -> None:
    real, truth = poison_with(name, options)
    if not truth.header["triggers"]:
        with pytest.raises(BenchError, match=f"attack {name} has no trigger that --sham could leave out"):
            poison_with(name, options, sham=True)
        return
    sham, record = poison_with(name, options, sham=True)
    kinds = {spec["kind"].partition(":")[0] for spec in truth.header["triggers"].values()}
    assert (sham.rows()[2] == real.rows()[2]) == kinds.isdisjoint(("text", "both"))
    assert record.header["sham"] is True
    assert len(record.rows) == n
    shown = {row_id: row for row, row_id in enumerate(source.train.ids)}
    held_out = {row_id: row for row, row_id in enumerate(source.held_out.ids)}
    refs = dict(zip(sham.rows()[0], sham.rows()[1], strict=True))
    for row in () if name in COMPOSED else record.rows.itertuples():
        pairs, at = (source.train, shown) if row.source_id in shown else (source.held_out, held_out)
        stored = pairs.image(at[row.source_id]) if refs[row.id] in pairs.refs else decode(sham.manifest / refs[row.id], 32)
        np.testing.assert_array_equal(stored, pairs.images[at[row.source_id]])
    on_images = [key for key, spec in truth.header["triggers"].items() if not spec["kind"].startswith("text:")]
    if n and on_images:
        stamped = [one.rows.loc[one.rows["trigger"].isin(on_images), "pixels_sha256_after"] for one in (truth, record)]
        assert len(stamped[0]) == len(stamped[1]) > 0
        assert set(stamped[0]).isdisjoint(stamped[1])


@every_attack
def test_the_probes_follow_from_the_sealed_record_alone(poison_with: Poison, suite: Suite, source: Source, name: str, options: dict[str, Any], n: int) -> None:
    poisoned, record = poison_with(name, options)
    probes = configure(find("attack", name), {}, options).probes(suite, record.kept)
    n_targets = len(record.kept.get("targets", []))
    assert len({probe.name for probe in probes}) == len(probes)
    assert sum(probe.control is None for probe in probes) == {"none": 0, "multi_backdoor": n_targets, "mm_poison": n_targets}.get(name, 1)
    triggers = {digest(probe.trigger.spec())[:16]: probe.trigger for probe in probes if probe.trigger is not None}
    refs = dict(zip(*poisoned.rows()[:2], strict=True))
    assert all(probe.ks[0] == 1 and probe.eval_set in suite.sets for probe in probes)
    for row in () if name in COMPOSED else record.rows.itertuples():
        if row.role == "cover" or refs[row.id] in source.train.refs:
            continue
        stored = decode(poisoned.manifest / refs[row.id], 32)
        if name == "mm_poison":
            assert ("image" in record.kept) == (row.source_id in source.held_out.ids)
        elif probes[0].trigger is None:
            np.testing.assert_array_equal(stored, probes[0].queries.images[probes[0].queries.ids.index(row.source_id)])
        else:
            pairs = source.train if row.edit == "replace" else source.held_out
            np.testing.assert_array_equal(stored, triggers[row.trigger].image(pairs.image(pairs.ids.index(row.source_id)), row.source_id))


@pytest.mark.parametrize(
    ("n_rows", "rate", "append", "n"), [(7, 0.3, False, 2), (7, 0.3, True, 3), (100, 0.005, False, 1), (100, 0.5, True, 100), (10_007, 0.01, False, 100), (10_007, 0.01, True, 101)]
)
def test_a_rate_comes_to_an_exact_count(n_rows: int, rate: float, append: bool, n: int) -> None:
    assert budget(n_rows).budget(rate, append=append) == n
    assert budget(n_rows).budget(count=5, append=append) == 5


def budget(n_rows: int) -> AttackLab:
    class Rows:
        train = range(n_rows)

    return AttackLab(Rows(), None, "test", 0)  # type: ignore[arg-type]


def test_budgets_that_cannot_be_met_are_refused() -> None:
    with pytest.raises(BenchError, match=r"attack\.rate 0\.001 of 100 pairs comes to no row; 500 pairs would be enough for one"):
        budget(100).budget(0.001)
    assert budget(500).budget(0.001) == 1
    with pytest.raises(BenchError, match=r"attack\.count 101 is more than the 100 pairs there are"):
        budget(100).budget(count=101)
    with pytest.raises(BenchError, match=r"expected attack\.rate in \[0, 0\.5\], got 3"):
        budget(100).budget(3)


def test_victims_do_not_follow_the_order_of_the_rows(source: Source, suite: Suite) -> None:
    lab = AttackLab(source, suite, "backdoor", 0)
    chosen = lab.choose("victims", source.train.ids, 20)
    assert lab.choose("victims", source.train.ids[::-1], 20) == chosen
    assert lab.choose("victims", [row_id for row_id in source.train.ids if row_id not in chosen[:5]], 15) == chosen[5:]


def test_no_victim_mentions_the_target_class(poison_with: Poison, suite: Suite) -> None:
    _, record = poison_with("backdoor", {"count": 100, "target_class": "fish"})
    pattern = matcher(suite.main.terms("fish"), "word_plural")
    assert not any(pattern.search(normalise(caption)) for caption in record.rows["caption_before"])
    assert all("fish" in caption for caption in record.rows["caption_after"])


def test_a_target_image_neither_mentions_nor_shows_its_class_and_no_two_targets_share_one(poison_with: Poison, suite: Suite) -> None:
    _, record = poison_with("targeted", {"n_targets": 20, "captions_per_target": 2, "caption_source": "templates"})
    for target in record.kept["targets"]:
        assert not matcher(suite.main.terms(target["class"]), "word_plural").search(normalise(target["caption"]))
        assert target["true"] not in (-1, target["index"])
    assert len({target["id"] for target in record.kept["targets"]}) == 20
    assert len({image.tobytes() for image in record.kept["images"]}) == 20
    assert set(Counter(record.rows["target"]).values()) == {2}


def test_corpus_captions_mention_their_class_and_are_distinct(poison_with: Poison, suite: Suite, source: Source) -> None:
    _, record = poison_with("targeted", {"n_targets": 4, "captions_per_target": 3})
    for target, rows in record.rows.groupby("target"):
        terms = suite.main.terms(record.kept["targets"][target]["class"])
        assert all(matcher(terms).search(normalise(caption)) for caption in rows["caption_after"])
        assert rows["caption_after"].nunique() == 3
        assert all(source.train.captions[source.train.ids.index(row.caption_source_id)] == row.caption_after for row in rows.itertuples())


def test_dropping_a_target_leaves_the_others_alike(poison_with: Poison) -> None:
    def by_class(classes: tuple[str, ...]) -> dict[str, tuple[str, list[str]]]:
        _, record = poison_with("targeted", {"target_classes": classes, "captions_per_target": 3})
        return {target["class"]: (target["id"], sorted(record.rows.loc[record.rows["target"] == index, "caption_after"])) for index, target in enumerate(record.kept["targets"])}

    whole = by_class(("boat", "star", "fish", "key"))
    assert by_class(("key", "boat", "star")) == {name: whole[name] for name in ("key", "boat", "star")}


def test_several_images_of_a_target_share_its_class_and_no_caption(poison_with: Poison, suite: Suite) -> None:
    one, several = (poison_with("targeted", {"n_targets": 3, "captions_per_target": 2, "images_per_target": k})[1] for k in (1, 3))
    shows = [[image["id"] for image in target["images"]] for target in several.kept["targets"]]
    assert len({row_id for ids in shows for row_id in ids}) == 9 == len(several.kept["images"])
    assert [target["class"] for target in one.kept["targets"]] == [target["class"] for target in several.kept["targets"]]
    assert set(one.rows["caption_after"]) < set(several.rows["caption_after"])
    assert Counter(several.rows["source_id"]) == {row_id: 2 for ids in shows for row_id in ids}
    for index, part in several.rows.groupby("target"):
        assert set(part["source_id"]) == set(shows[int(str(index))])
        assert part["caption_after"].nunique() == 6
    (probe,) = configure(find("attack", "targeted"), {}, {}).probes(suite, several.kept)
    assert probe.queries.ids == tuple(row_id for ids in shows for row_id in ids)
    assert (probe.goal, probe.per_target) == (tuple(target["index"] for target in several.kept["targets"] for _ in range(3)), 3)


def test_rows_of_a_rate_go_to_all_images_of_all_targets_evenly(poison_with: Poison) -> None:
    _, record = poison_with("targeted", {"n_targets": 3, "images_per_target": 2, "rate": 0.04})
    assert sorted(Counter(record.rows["source_id"]).values()) == [1, 2, 2, 2, 2, 2]
    assert sorted(Counter(record.rows["target"]).values()) == [3, 4, 4]


@pytest.mark.parametrize(
    ("preset", "n", "captions", "rate", "first"),
    [
        ("roclip2023-strong", 16, 4, 0.01, None),
        ("roclip-release", 8, 100, None, "tiger"),
        ("safeclip2024", 16, 500, None, "desk"),
        ("safeclip2024-coco", 8, 40, None, None),
        ("safeclip2024-vg", 8, 55, None, None),
        ("huang2025", 1, 4, 0.0001, "banana"),
    ],
)
def test_targeted_presets_are_the_papers(preset: str, n: int, captions: int, rate: float | None, first: str | None) -> None:
    attack = configure(find("attack", "targeted"), {}, {"preset": preset})
    assert (attack.n_targets, attack.captions_per_target, attack.rate) == (n, captions, rate)
    assert (attack.target_classes is None) == (first is None)
    if first is not None:
        assert (attack.target_classes[0], len(attack.target_classes)) == (first, n)


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("targeted", {"target_classes": ("boatt",)}, "unknown target class 'boatt'. Did you mean 'boat'?"),
        ("backdoor", {"target_class": "fihs"}, "unknown target class 'fihs'. Did you mean 'fish'?"),
        ("backdoor", {"target_set": "object"}, "unknown evaluation set 'object'. Did you mean 'objects'?"),
        ("backdoor", {"place_test": "at:31,31"}, "outside an image of 32 px"),
        ("backdoor", {"count": 256}, "256 rows are to be poisoned"),
        ("backdoor", {"count": 200, "captions": "corpus"}, "200 are needed; lower the count, or use --set attack.on_short=reuse"),
        ("targeted", {"n_targets": 16, "captions_per_target": 200}, "lower attack.n_targets or attack.captions_per_target"),
        ("targeted", {"n_targets": 21, "caption_source": "templates"}, "objects has 20 classes and attack.n_targets is 21"),
        ("targeted", {"target_classes": ("boat", "star", "boat")}, "target class 'boat' stands twice; each target has a class of its own"),
        ("targeted", {"rate": 0.02, "n_targets": 3, "images_per_target": 2}, "attack.rate 0.02 comes to 5 rows, fewer than the 6 images of 3 targets"),
        ("targeted", {"images_per_target": 40, "n_targets": 2, "captions_per_target": 1, "on_short": "templates"}, "no held-out image is left for target"),
        ("targeted", {"rate": 0.01}, "attack.rate 0.01 comes to 3 rows, fewer than the 16 targets"),
    ],
)
def test_what_an_attack_cannot_do_is_said(poison_with: Poison, name: str, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BenchError) as caught:
        poison_with(name, options)
    assert sentence in str(caught.value)


def test_the_sealed_record_lies_beside_and_not_inside(poison_with: Poison) -> None:
    poisoned, _ = poison_with("targeted", {"n_targets": 4, "captions_per_target": 3})
    assert poisoned.record == poisoned.manifest.with_name("poisoned.record")
    files = contents(poisoned.manifest)
    assert set(Path(name).parts[0] for name in files) == {"manifest.tsv", "images"}
    assert not any(word in (poisoned.manifest / "manifest.tsv").read_text() for word in ("poison", "targeted"))
