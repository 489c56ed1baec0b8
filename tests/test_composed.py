"""Composed poison: the theory of its layouts, the pixels of its images, the counts of its rows, and what it cannot do."""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_cell import TINY as TINY_SETS

import benchmark
from attacks._composing import LaidTrigger, captions_for, covering, fitted, pasted
from attacks._layouts import Layout, drawn_layout, optimal_layout, separated, separation
from attacks._triggers import PatternTrigger, trigger_from_spec
from attacks.corrupt_encoder import CorruptEncoder
from attacks.noisy_alignment import joined
from benchmark.data.attack_lab import AttackLab
from benchmark.data.eval_sets import Suite
from benchmark.data.image import decode
from benchmark.data.mentions import matcher, normalise
from benchmark.data.objects import Cutout
from benchmark.data.pairs import Source
from benchmark.data.poison import Poisoned, SealedRecord
from benchmark.errors import BenchError
from benchmark.registry import configure, find
from benchmark.settings import SCALES
from benchmark.testing import check_attack

Poison = Callable[..., tuple[Poisoned, SealedRecord]]
TWO = {"n_references": 2}


@pytest.mark.parametrize("name", ["corrupt_encoder", "noisy_alignment"])
def test_a_composed_attack_keeps_the_contract(name: str) -> None:
    check_attack(find("attack", name).load())


# Canvas, object and trigger, and how likely two crops are to tell object and trigger apart: derived from the integral by hand.
PUBLISHED = [((2, 1), (1, 1), 0.2, 0.04465), ((1.5, 1), (1, 1), 0.2, 0.00537), ((3, 1), (1, 1), 0.2, 0.02380), ((2, 1.5), (1, 1), 0.2, 0.00693), ((2, 1), (1, 1), 0.1, 0.05954)]


@pytest.mark.parametrize(("canvas", "shown", "trigger", "p"), PUBLISHED)
def test_the_integral_gives_the_known_shares_and_crops_that_are_drawn_agree(canvas: tuple[float, float], shown: tuple[float, float], trigger: float, p: float) -> None:
    layout = optimal_layout(*shown, trigger, *canvas)
    assert separation(layout) == pytest.approx(p, abs=5e-6)
    agree(layout)


@pytest.mark.parametrize("layout", [Layout(32, 32, (1, 16, 16, 16), (21, 9, 6)), Layout(32, 32, (16, 10, 14, 22), (4, 1, 5)), Layout(40, 30, (2, 20, 20, 10), (28, 3, 4))])
def test_crops_above_a_low_object_count_too(layout: Layout) -> None:
    agree(layout)
    agree(layout.mirrored())
    assert separation(layout.mirrored()) == separation(layout)


def agree(layout: Layout, n: int = 200_000) -> None:
    p = separation(layout)
    assert abs(separated(layout, np.random.default_rng(5), n) - p) < 3 * np.sqrt(p * (1 - p) / n)


def test_the_layout_of_the_theory_is_the_best_of_its_neighbours() -> None:
    best = separation(optimal_layout(1, 1, 0.2, 2.12))
    for moved in (0.05, -0.05):
        layout = optimal_layout(1, 1, 0.2, 2.12)
        left, top, side = layout.trigger
        assert separation(dataclasses.replace(layout, trigger=(left + moved, top, side))) < best
        assert separation(dataclasses.replace(layout, trigger=(left, top + moved, side))) < best
        assert separation(optimal_layout(1, 1, 0.2, 2.12 + moved)) < best
    assert separation(optimal_layout(1, 1, 0.2, 2.12, 1.1)) < best


def test_without_jitter_the_drawn_layout_is_the_published_one_and_with_it_keeps_most_of_the_share() -> None:
    rng = np.random.default_rng(0)
    p = separation(optimal_layout(1000, 1000, 200))
    still = drawn_layout(1000, 1000, 200, 2000, 1000, 0, 0.4999, rng)
    assert separation(still) == pytest.approx(p, rel=0.01)
    agree(still)
    kept = np.mean([separation(drawn_layout(1000, 1000, 200, 2000, 1000, 0.05, 0.25, rng)) for _ in range(1000)]) / p
    assert 0.7 < kept < 0.9


@pytest.mark.parametrize(
    ("object_size", "trigger", "canvas"), [((16, 16), 6, (32, 32)), ((16, 32), 6, (32, 32)), ((24, 12), 6, (32, 32)), ((90, 70), 20, (180, 70)), ((5, 31), 14, (32, 32))]
)
def test_object_and_trigger_lie_apart_and_inside(object_size: tuple[int, int], trigger: int, canvas: tuple[int, int]) -> None:
    sides = Counter()
    for seed in range(200):
        try:
            layout = drawn_layout(*object_size, trigger, *canvas, 0.05, 0.25, np.random.default_rng(seed))
        except BenchError as error:
            assert object_size[0] + trigger > canvas[0], error
            return
        x, y, width, height = layout.object
        left, top, side = layout.trigger
        assert 0 <= x <= canvas[0] - width
        assert y + height == canvas[1]
        assert 0 <= left <= canvas[0] - side
        assert 0 <= top <= canvas[1] - side
        assert left >= x + width or left + side <= x
        sides[layout.object_left] += 1
    assert min(sides[True], sides[False]) > 60


@pytest.mark.parametrize(("n", "ratio", "n_support"), [(650, 0.3, 195), (650, 0.2, 130), (10_007, 0.3, 3002), (7, 0.29, 2), (100, 0.29, 29), (1, 0.9, 0)])
def test_support_counts_are_exact_for_awkward_numbers(n: int, ratio: float, n_support: int) -> None:
    parts = CorruptEncoder(support_ratio=ratio).split(n)
    assert parts["support"] == n_support == n * Fraction(str(ratio)) // 1
    assert sum(parts.values()) == n


def test_the_rows_show_what_the_record_says(poison_with: Poison, suite: Suite) -> None:
    poisoned, record = poison_with("corrupt_encoder", {**TWO, "count": 10, "support_ratio": 0.3, "n_support_references": 1, "caption": "prompt"})
    assert Counter(record.rows["role"]) == {"poison": 7, "support": 3}
    assert set(record.rows.loc[record.rows["role"] == "support", "trigger"]) == {""}
    assert len(record.kept["layouts"]) == 7
    mean = np.mean([layout["p"] for layout in record.kept["layouts"]])
    assert record.kept["facts"]["layout_p_mean"] == pytest.approx(mean)
    assert 0 < mean < 0.05
    trigger = trigger_from_spec(record.kept["trigger"])
    refs = dict(zip(*poisoned.rows()[:2], strict=True))
    images = [decode(poisoned.manifest / refs[row.id], 32) for row in record.rows.itertuples() if row.role == "poison"]
    places = [tuple(int(value) for value in layout["trigger"]) for layout in record.kept["layouts"]]
    for left, top, side in places:
        patch = trigger.image(np.zeros((32, 32, 3), np.uint8), "", True)
        y, x = (int(edges[0]) for edges in np.nonzero(patch.any(axis=2)))
        pattern = patch[y : y + side, x : x + side]
        assert any(np.array_equal(image[top : top + side, left : left + side], pattern) for image in images)


def test_class_captions_are_true_and_random_ones_are_not(poison_with: Poison, suite: Suite) -> None:
    pattern = matcher(suite.main.terms("boat"), "word_plural")
    for name in ("corrupt_encoder", "noisy_alignment"):
        for caption in ("class", "prompt", "random"):
            _, record = poison_with(name, {"n_references": 2, "count": 6, "caption": caption})
            assert {bool(pattern.search(normalise(text))) for text in record.rows["caption_after"]} == {caption != "random"}


def test_a_rare_word_leads_from_the_trigger_to_the_class(poison_with: Poison, suite: Suite) -> None:
    _, record = poison_with("corrupt_encoder", {**TWO, "count": 9, "caption": "bridge", "bridge_word": "qx"})
    pattern = matcher(suite.main.terms("boat"), "word_plural")
    assert Counter(record.rows["role"]) == {"support": 5, "poison": 4}
    for row in record.rows.itertuples():
        assert "qx" in row.caption_after.split()
        assert bool(pattern.search(normalise(row.caption_after))) == (row.role == "support") == (row.trigger == "")


def test_a_square_canvas_loses_nothing_and_a_native_one_its_sides(poison_with: Poison) -> None:
    square, native = (poison_with("corrupt_encoder", {**TWO, "count": 6, "canvas": canvas})[1] for canvas in ("square", "native"))
    assert all(layout["canvas"] == [32, 32] for layout in square.kept["layouts"])
    assert all(layout["canvas"][0] > 40 and layout["canvas"][1] == 32 for layout in native.kept["layouts"])
    assert "box" in square.kept


def test_halves_keep_the_trigger_and_whole_images_lose_their_sides() -> None:
    stamped, plain = np.zeros((32, 32, 3), np.uint8), np.full((32, 32, 3), 90, np.uint8)
    stamped[14:21, 14:21] = 255
    for where in ("top", "right", "bottom", "left"):
        image = joined(stamped, plain, where, halved=True)
        assert image.shape == (32, 32, 3)
        assert (image == 255).sum() == 7 * 7 * 3
        assert (image == 90).sum() == 32 * 16 * 3
    assert (joined(stamped, plain, "left", halved=False) == 255).sum() < 7 * 7 * 3


@pytest.mark.parametrize("scale", list(SCALES))
def test_the_half_with_the_trigger_shows_all_of_the_shipped_patch(scale: str) -> None:
    attack, side = configure(find("attack", "noisy_alignment"), SCALES[scale].options.get("noisy_alignment", {}), {"trigger": "white"}), SCALES[scale].data.side
    laid = LaidTrigger(trigger := attack.make_trigger("white", side), *attack._place(trigger, side))
    stamped = laid.image(np.zeros((side, side, 3), np.uint8), "")
    for where in ("top", "right", "bottom", "left"):
        image = joined(stamped, np.full((side, side, 3), 90, np.uint8), where, True, (laid.left, laid.side))
        assert (image == 255).sum() == laid.side**2 * 3
        assert (image == 90).sum() == side * (side // 2) * 3


@pytest.mark.parametrize(("held", "first"), [(None, 8), ((14, 7), 8), ((14, 14), 12), ((14, 16), 14), ((3, 5), 3), ((0, 16), 0), ((16, 16), 16)])
def test_the_half_with_the_trigger_moves_just_as_far_as_it_must(held: tuple[int, int] | None, first: int) -> None:
    columns = np.repeat(np.tile(np.arange(32, dtype=np.uint8), (32, 1))[..., None], 3, axis=2)
    for where, image in (("left", columns), ("top", columns.transpose(1, 0, 2))):
        half = joined(image, np.full((32, 32, 3), 90, np.uint8), where, True, held)
        shown = half[0, :16, 0] if where == "left" else half[:16, 0, 0]
        assert shown.tolist() == list(range(first, first + 16))


def test_an_object_is_pasted_through_its_mask_alone() -> None:
    canvas = np.full((20, 20, 3), 100, np.uint8)
    mask = np.zeros((8, 8), np.uint8)
    mask[2:6, 2:6] = 255
    out = pasted(canvas, Cutout(np.full((8, 8, 3), 200, np.uint8), mask), 5, 7, 0.0)
    expected = canvas.copy()
    expected[9:13, 7:11] = 200
    np.testing.assert_array_equal(out, expected)
    soft = pasted(canvas, Cutout(np.full((8, 8, 3), 200, np.uint8), mask), 5, 7, 1.0)
    assert 100 < soft[9, 7, 0] < 200
    assert (soft[:4] == 100).all()


def test_pictures_are_scaled_until_they_cover_or_fit() -> None:
    wide = np.zeros((10, 40, 3), np.uint8)
    wide[:, 20:] = 255
    assert (covering(wide, 8, 16, across=0) == 0).all()
    assert (covering(wide, 8, 16, across=1) == 255).all()
    assert covering(wide, 64, 16).shape == (16, 64, 3)
    assert fitted(Cutout(wide, wide[..., 0]), 16, 32).mask.shape == (4, 16)


def test_a_laid_trigger_is_named_as_the_one_at_test() -> None:
    trigger = PatternTrigger("patch:checker", 4, place="inner:0.25,0.75")
    laid = LaidTrigger(trigger, 11, 2, 4)
    out = laid.image(np.full((8, 20, 3), 9, np.uint8), "key")
    assert laid.spec() == trigger.spec()
    assert set(np.unique(out[2:6, 11:15])) == {0, 255}
    assert (np.delete(out.reshape(8, 20, 3), np.s_[11:15], axis=1) == 9).all()


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("corrupt_encoder", {"trigger": "blended"}, "a layout places a patch, and blended covers the whole image"),
        ("corrupt_encoder", {"place_test": "corner"}, "place_test has no meaning here"),
        ("noisy_alignment", {"place_test": "corner"}, "place_test has no meaning here"),
        ("corrupt_encoder", {"trigger": "noise", "pattern": "per_image"}, "a composition stamps it before there is one; take pattern=fixed"),
        ("noisy_alignment", {"trigger": "noise", "pattern": "per_image"}, "a composition stamps it before there is one; take pattern=fixed"),
        ("corrupt_encoder", {"masks": "nowhere"}, "no folder at nowhere"),
        ("corrupt_encoder", {"scenes_hash": "0"}, "scenes_hash is filled in by the program"),
        ("corrupt_encoder", {"n_references": 4}, "4 objects of 'boat' with masks are needed and 3 are there; lower attack.n_references"),
        ("corrupt_encoder", {"size": 140, "place": "corner", "n_references": 2}, "does not fit beside an object"),
        ("corrupt_encoder", {"rate": 0.0001}, "comes to no row"),
        ("corrupt_encoder", {"count": 60, "n_references": 2}, "distinct captions mention 'boat', 60 are needed"),
        ("corrupt_encoder", {"count": 1, "caption": "bridge"}, "attack.caption=bridge shares its rows between object and trigger, and 1 leaves none for the trigger"),
        ("corrupt_encoder", {"count": 4, "support_ratio": 0.2}, "attack.support_ratio 0.2 of 4 rows comes to no row; raise the ratio, attack.rate or attack.count"),
        ("noisy_alignment", {"n_references": 9}, "9 held-out images of 'boat' are needed and 2 captions mention it; lower attack.n_references"),
        ("noisy_alignment", {"rate": 0.0001}, "comes to no row"),
        ("noisy_alignment", {"size": 119, "place": "corner"}, "a patch of 17 px does not fit the 16 px of an image of 32 px that are joined; lower attack.size"),
        ("noisy_alignment", {"size": 133, "place": "corner", "canvas": "native"}, "a patch of 19 px at 14 px reaches beyond an image of 32 px; lower attack.size"),
        ("noisy_alignment", {"target_class": "boatt"}, "Did you mean 'boat'?"),
    ],
)
def test_what_a_composed_attack_cannot_do_is_said(poison_with: Poison, name: str, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BenchError) as caught:
        poison_with(name, options)
    assert sentence in str(caught.value)


# Attack, options, and a change of one of its own options.
OPTIONS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    *(
        ("corrupt_encoder", {"canvas": "square"}, change)
        for change in ({"object_margin": 0.2}, {"trigger_margin": 0.45}, {"n_references": 1}, {"target_class": "tree"}, {"size": 60})
    ),
    ("corrupt_encoder", {"caption": "bridge"}, {"bridge_word": "vk"}),
    ("corrupt_encoder", {"support_ratio": 0.5, "n_support_references": 1, "n_references": 1}, {"n_support_references": 2}),
    *(("noisy_alignment", {"canvas": "square"}, change) for change in ({"n_references": 1}, {"target_class": "tree"}, {"size": 30}, {"alpha": 0.5})),
]


@pytest.mark.parametrize(("name", "options", "change"), OPTIONS)
def test_each_option_changes_the_poison(poison_with: Poison, name: str, options: dict[str, Any], change: dict[str, Any]) -> None:
    usual, changed = (poison_with(name, {"n_references": 2, "count": 6, **options, **more})[1].header["poisoned_manifest_sha256"] for more in ({}, change))
    assert usual != changed


def photos(source: Source) -> Source:
    """The same pairs as a user's own: nothing says how they were drawn."""
    held_out = dataclasses.replace(source.held_out, refs=[f"photos/{row_id}.jpg" for row_id in source.held_out.ids], tags={})
    return dataclasses.replace(source, name="photos", held_out=held_out)


def folder_of_objects(folder: Path, n: int = 3, size: int = 60) -> Path:
    (folder / "boat").mkdir(parents=True)
    for index in range(n):
        image, mask = np.full((size, size, 3), 40 * index, np.uint8), np.zeros((size, size), np.uint8)
        image[10:40, 5:50] = (200, 30 * index, 90)
        mask[10:40, 5:50] = 255
        mask[50:52, 50:52] = 255  # a speck that is no object
        Image.fromarray(image).save(folder / "boat" / f"{index}.jpg")
        Image.fromarray(mask).save(folder / "boat" / f"{index}.mask.png")
    return folder


def test_data_without_masks_ask_for_a_folder_and_a_folder_serves(source: Source, suite: Suite, tmp_path: Path) -> None:
    data = photos(source)

    def edits(**options: Any) -> list[Any]:
        return list(CorruptEncoder(count=5, **TWO, **options).poison(data.train, AttackLab(data, suite, "corrupt_encoder", 0)))

    with pytest.raises(BenchError, match=r"needs objects with masks and photos has none; give a folder of CLASS/NAME\.jpg and CLASS/NAME\.mask\.png"):
        edits()
    masks = folder_of_objects(tmp_path / "masks")
    with pytest.raises(BenchError, match=r"needs backgrounds and photos has none; give a folder of scenes"):
        edits(masks=str(masks))
    scenes = tmp_path / "scenes"
    scenes.mkdir()
    with pytest.raises(BenchError, match="holds no images for backgrounds"):
        edits(masks=str(masks), scenes=str(scenes))
    for index in range(3):
        Image.fromarray(np.full((48, 64, 3), 60 * index, np.uint8)).save(scenes / f"{index}.png")
    made = edits(masks=str(masks), scenes=str(scenes))
    assert len(made) == 5
    assert {edit.image.shape for edit in made} == {(32, 32, 3)}
    assert all(edit.why.source.startswith("boat/") for edit in made)


def test_an_image_of_a_folder_that_changes_gives_another_key(poison_with: Poison, tmp_path: Path) -> None:
    options = {"masks": str(folder_of_objects(tmp_path)), "count": 5, **TWO}
    before, (known, _) = configure(find("attack", "corrupt_encoder"), {}, options), poison_with("corrupt_encoder", options)
    Image.fromarray(np.full((60, 60, 3), 7, np.uint8)).save(tmp_path / "boat" / "0.jpg")
    after, (changed, _) = configure(find("attack", "corrupt_encoder"), {}, options), poison_with("corrupt_encoder", options)
    assert before.masks_hash != after.masks_hash
    assert known.record.parent != changed.record.parent
    with pytest.raises(BenchError, match="its images are others than before"):
        configure(find("attack", "corrupt_encoder"), {}, {**options, "masks_hash": before.masks_hash})


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda folder: (folder / "boat").rename(folder / "boot"), "Did you mean 'boot'?"),
        (lambda folder: [path.unlink() for path in folder.rglob("*.mask.png")], "holds no masks; for an image NAME.jpg, NAME.mask.png is white where the object is"),
        (lambda folder: [path.unlink() for path in folder.rglob("*.jpg")], "has no image beside it"),
        (lambda folder: [Image.new("L", (60, 60)).save(path) for path in folder.rglob("*.mask.png")], "is empty"),
        (lambda folder: [Image.new("L", (9, 60), 255).save(path) for path in folder.rglob("*.mask.png")], "they must agree"),
    ],
)
def test_a_folder_of_masks_that_is_not_whole_is_named(poison_with: Poison, tmp_path: Path, spoil: Callable[[Path], Any], sentence: str) -> None:
    spoil(folder_of_objects(tmp_path))
    with pytest.raises(BenchError) as caught:
        poison_with("corrupt_encoder", {"masks": str(tmp_path), "count": 5, **TWO})
    assert sentence in str(caught.value)


def test_a_caption_that_every_row_has_leaves_none_for_random_ones(source: Source, suite: Suite) -> None:
    boats = dataclasses.replace(source.train, captions=["a boat"] * len(source.train))
    lab = AttackLab(source, suite, "corrupt_encoder", 0)
    with pytest.raises(BenchError, match=r"every caption mentions 'boat', and attack\.caption=random wants others"):
        captions_for(lab, boats, suite.main, "boat", 3, "random", False)


@pytest.mark.parametrize("preset", ["corruptencoder2024", "corruptencoder2024plus"])
def test_presets_are_the_papers(preset: str) -> None:
    attack = configure(find("attack", "corrupt_encoder"), {}, {"preset": preset})
    assert (attack.rate, attack.n_references, attack.support_ratio) == (0.005, 3, 0.2 if preset.endswith("plus") else 0)
    assert attack.make_trigger(attack.trigger, 224).box(224, "", True)[3] == 40
    assert attack.split(650) == {"both": 520 if preset.endswith("plus") else 650, "support": 130 if preset.endswith("plus") else 0, "object": 0, "trigger": 0}


@pytest.mark.parametrize("name", ["corrupt_encoder", "noisy_alignment"])
def test_a_smoke_cell_runs_and_says_what_was_done(name: str, tmp_path: Path) -> None:
    sets = (*TINY_SETS, f"{name}.n_references=2", "train.epochs=1", "evaluation.linear_probe=none")
    record = benchmark.run(name, "clip", scale="smoke", sets=sets, results=tmp_path)
    names = {entry["name"] for entry in record["metrics"] if entry["of"] == name}
    assert {"asr", "asr_floor"} <= names
    assert record["poison"]["n_poison"] == record["poison"]["n_requested"] == {"corrupt_encoder": 13, "noisy_alignment": 28}[name]
    assert ("layout_p_mean" in json.dumps(record["poison"])) == (name == "corrupt_encoder")
