"""What every image trigger keeps: shape, its box, its key, its specification, how much it may be seen."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional

from attacks._filters import NashvilleTrigger, SineTrigger
from attacks._pictures import PictureTrigger, WatermarkTrigger, drawn_cat, picture_hash, read_picture, written
from attacks._placing import Stamp, check_place, patch_box, scaled_place
from attacks._trigger_options import TriggerName, kind_of
from attacks._triggers import ALIASES, PatternTrigger, fixed_pattern, trigger_from_spec
from attacks._warps import WarpTrigger, bent, shifts
from attacks.backdoor import Backdoor
from benchmark.data.image import psnr
from benchmark.data.world import drawn_row
from benchmark.errors import BenchError
from benchmark.registry import configure, find

SIDE = 32
PHOTO: NDArray[np.uint8] = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
RED_ABOVE_GREEN = np.repeat(np.array([[[255, 0, 0]], [[0, 255, 0]]], dtype=np.uint8), [3, 6], axis=0).repeat(9, axis=1)


def made(name: str, side: int = SIDE, **options: Any) -> Any:
    return Backdoor(trigger=name, **options).make_trigger(name, side)


TRIGGERS: list[Any] = [made(name) for name in Backdoor.short_names()]
TRIGGERS += [
    PatternTrigger("patch:checker", place="centre", cell=1),
    PatternTrigger("patch:dots", place="random", place_test="centre"),
    PatternTrigger("patch:white", place="at:3,20", size=5, alpha=0.5),
    PatternTrigger("patch:white", place="corner:tl,2", size=5),
    PatternTrigger("patch:noise", pattern="per_image", overflow="wrap"),
    PatternTrigger("patch:noise", pattern="per_image", place="random"),
    PatternTrigger("patch:noise", place="inner:0.25,0.75", pattern="per_image"),
    PatternTrigger("blend:noise", alpha=0.2, pattern="per_image"),
    PatternTrigger("patch:stripes", cell=1, pattern="per_image", place="random"),
    PatternTrigger("blend:stripes", alpha=0.03, pattern="per_image"),
    PictureTrigger("patch:image", place="random"),
    PictureTrigger("patch:image", picture_hash(RED_ABOVE_GREEN), 9, pixels=RED_ABOVE_GREEN),
    WatermarkTrigger(pattern="per_image"),
    SineTrigger(form="blended", alpha=0.2, amplitude=60),
    WarpTrigger(grid=32, alpha=0.5),
    WarpTrigger(jitter=1.0),
]


def named(trigger: Any) -> str:
    spec = trigger.spec()
    return "-".join(str(spec[part]) for part in ("kind", "pattern", "place", "form", "jitter") if part in spec)


every_trigger = pytest.mark.parametrize("trigger", TRIGGERS, ids=named)


def rebuilt(trigger: Any) -> Stamp:
    return trigger_from_spec(json.loads(json.dumps(trigger.spec(), allow_nan=False)), getattr(trigger, "pixels", None))


@every_trigger
def test_a_stamp_keeps_shape_and_dtype_and_its_input(trigger: Stamp) -> None:
    before = PHOTO.copy()
    stamped = trigger.image(PHOTO, "key")
    assert stamped.shape == PHOTO.shape
    assert stamped.dtype == np.uint8
    assert (stamped != PHOTO).any()
    np.testing.assert_array_equal(PHOTO, before)
    np.testing.assert_array_equal(trigger.image(PHOTO, "key"), stamped)


@every_trigger
@pytest.mark.parametrize("at_test", [False, True])
def test_outside_its_box_nothing_changes(trigger: Stamp, at_test: bool) -> None:
    for key in map(str, range(10)):
        top, left, height, width = trigger.box(SIDE, key, at_test)
        outside = np.ones((SIDE, SIDE), dtype=bool)
        outside[top : top + height, left : left + width] = False
        np.testing.assert_array_equal(trigger.image(PHOTO, key, at_test)[outside], PHOTO[outside])


@every_trigger
def test_only_what_is_drawn_per_image_follows_the_key(trigger: Any) -> None:
    spec = trigger.spec()
    drawn = spec.get("pattern") == "per_image" or spec.get("place", "").startswith(("random", "inner")) or spec.get("jitter", 0) > 0
    seen = {trigger.image(PHOTO, f"key {index}").tobytes() for index in range(5)}
    assert (len(seen) > 1) == drawn


@every_trigger
def test_alpha_zero_changes_nothing(trigger: Any) -> None:
    np.testing.assert_array_equal(replace(trigger, alpha=0.0).image(PHOTO, "key"), PHOTO)


@every_trigger
def test_a_trigger_rebuilt_from_its_specification_is_the_same(trigger: Stamp) -> None:
    again = rebuilt(trigger)
    assert again == trigger
    for at_test in (False, True):
        np.testing.assert_array_equal(again.image(PHOTO, "key", at_test), trigger.image(PHOTO, "key", at_test))


@every_trigger
def test_the_text_stays(trigger: Stamp) -> None:
    assert trigger.text("a photo of a cat", "key") == "a photo of a cat"


@every_trigger
def test_images_of_other_sides_are_stamped_too(trigger: Stamp) -> None:
    image = np.random.default_rng(1).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    assert (trigger.image(image, "key") != image).any()


@pytest.mark.parametrize("kind", ["patch:checker", "patch:dots", "patch:white", "patch:black", "patch:yellow", "patch:stripes"])
def test_patterns_of_zeros_and_ones_are_stamped_exactly(kind: str) -> None:
    trigger = PatternTrigger(kind)
    top, left, height, width = trigger.box(SIDE, "")
    stamped = trigger.image(PHOTO, "")[top : top + height, left : left + width]
    np.testing.assert_array_equal(stamped, fixed_pattern(kind, height, width, 2, 0) * 255)
    assert set(np.unique(stamped)) <= {0, 255}


def test_the_patterns_are_those_of_the_definition() -> None:
    stripes, faint = fixed_pattern("patch:stripes", 8, 8, 2, 0), fixed_pattern("blend:stripes", 32, 32, 1, 0)
    for i in range(8):
        for j in range(8):
            assert fixed_pattern("patch:checker", 8, 8, 2, 0)[i, j, 0] == float((i // 2 + j // 2) % 2 == 0)
            assert fixed_pattern("patch:dots", 8, 8, 2, 0)[i, j, 0] == float(i % 2 == 0 and j % 2 == 0)
            assert fixed_pattern("blend:triangles", 16, 16, 5, 0)[i, j, 0] == np.float32(0.4 if i % 5 >= j % 5 else 0.8)
            assert fixed_pattern("patch:yellow", 8, 8, 2, 0)[i, j].tolist() == [1, 1, 0]
            np.testing.assert_array_equal(stripes[i, j], stripes[0, j - j % 2])
    assert set(np.unique(faint)) == {-1, 1}
    assert 0.3 < (faint[0] == 1).mean() < 0.7


def test_wrapped_noise_is_uniform_and_clipped_noise_mostly_is_black_or_white() -> None:
    grey = np.full((128, 128, 3), 128, dtype=np.uint8)
    wrapped = PatternTrigger("patch:noise", size=128, pattern="per_image", overflow="wrap").image(grey, "key")
    clipped = PatternTrigger("patch:noise", size=128, pattern="per_image", overflow="clip").image(grey, "key")
    assert wrapped.mean() == pytest.approx(127, abs=2)
    assert wrapped.std() == pytest.approx(74, abs=1.5)
    assert np.isin(clipped, (0, 255)).mean() == pytest.approx(0.62, abs=0.02)
    assert np.isin(wrapped, (0, 255)).mean() < 0.02


@pytest.mark.parametrize("name", ["noise", "stripes", "blended", "blended-stripes", "wanet"])
def test_another_pattern_seed_is_another_pattern(name: str) -> None:
    assert (made(name).image(PHOTO, "") != made(name, pattern_seed=1).image(PHOTO, "")).any()


def test_random_places_reach_every_corner() -> None:
    trigger = PatternTrigger("patch:white", size=30, place="random")
    assert {trigger.box(SIDE, str(key))[:2] for key in range(200)} == {(top, left) for top in range(3) for left in range(3)}


@pytest.mark.parametrize(
    ("place", "top_left"),
    [("corner", (24, 24)), ("corner:br", (24, 24)), ("corner:tl", (0, 0)), ("corner:tr,2", (2, 22)), ("corner:bl,3", (21, 3)), ("centre", (12, 12)), ("at:3,20", (3, 20))],
)
def test_a_place_is_the_one_it_says(place: str, top_left: tuple[int, int]) -> None:
    assert patch_box(check_place(place), 8, SIDE, 0, "key", False) == (*top_left, 8, 8)


def test_inner_places_stay_inside_their_shares() -> None:
    tops = {patch_box(check_place("inner:0.25,.75"), 8, SIDE, 0, str(key), False)[0] for key in range(200)}
    assert tops == set(range(8, 17))
    with pytest.raises(BenchError, match=r"attack\.place 'inner:0\.4,0\.5' leaves no room for a trigger of 8 px in an image of 32 px"):
        patch_box("inner:0.4,0.5", 8, SIDE, 0, "", False)


@pytest.mark.parametrize("place", ["left", "at:1", "at:-1,2", "corner:xx", "corner:tl,", "inner:0,2", "inner:0.5", "centre,3", "four"])
def test_what_is_no_place_is_refused(place: str) -> None:
    with pytest.raises(ValueError, match="a place is corner, corner:tl"):
        check_place(place)


def test_places_scale_with_the_side() -> None:
    assert [scaled_place(place, 32 / 224) for place in ("at:9,120", "corner:tl,14", "corner", "inner:.25,.75", "random")] == [
        "at:1,17",
        "corner:tl,2",
        "corner",
        "inner:.25,.75",
        "random",
    ]


def test_a_patch_that_does_not_fit_is_refused() -> None:
    for trigger in (PatternTrigger("patch:white", size=40), PictureTrigger("patch:image", size=40)):
        with pytest.raises(BenchError, match=r"a trigger of 40 px does not fit an image of 32 px; lower attack\.size"):
            trigger.image(PHOTO, "")
    with pytest.raises(BenchError, match=r"attack\.place 'at:30,0' puts a trigger of 8 px outside an image of 32 px"):
        PatternTrigger("patch:white", place="at:30,0").image(PHOTO, "")


# Least and largest PSNR in dB of the defaults on drawn images of 32 px, with half a dB of room on either side.
VISIBLE = {
    "checker": (16.0, 18.4),
    "white": (15.1, 24.0),
    "black": (13.9, 21.5),
    "yellow": (14.2, 21.2),
    "noise": (18.8, 22.8),
    "dots": (15.0, 19.5),
    "stripes": (14.7, 20.0),
    "picture": (19.3, 25.3),
    "blended": (20.5, 24.1),
    "blended-picture": (20.3, 24.8),
    "blended-stripes": (28.1, 30.5),
    "triangles": (24.3, 28.4),
    "watermark": (27.2, 41.3),
    "sig": (24.7, 26.2),
    "wanet": (18.8, 28.6),
    "nashville": (19.1, 29.8),
}


@pytest.mark.parametrize("name", Backdoor.short_names())
def test_how_much_a_trigger_changes_lies_in_its_range(name: str) -> None:
    least, most = VISIBLE[name]
    trigger = made(name)
    for row in range(24):
        image = drawn_row(0, "train", row, SIDE).image
        assert least <= psnr(image, trigger.image(image, str(row))) <= most


# A pattern's bytes are what records were stamped with; a changed hash needs a new trigger name.
GOLDEN = {
    "checker": "ca77c581af95bdcc",
    "white": "e3714f8d9530329e",
    "black": "117f150a1e73c54b",
    "yellow": "a36b07751436bf4a",
    "noise": "1e36fd427a0e20fa",
    "dots": "91bf45b096d1089c",
    "stripes": "7b65557b6eb3401a",
    "picture": "4a7d4d3e27cbe956",
    "blended": "bbed617439c9b111",
    "blended-picture": "546c92aecd687633",
    "blended-stripes": "6725fac31cc2eb45",
    "triangles": "86a0596d8d66397e",
    "watermark": "282192b53f824fb7",
    "sig": "f74e7aabd0d1b46e",
    "wanet": "ea808b74fa1ac062",
    "nashville": "c8869f1941a4ab3a",
}


@pytest.mark.parametrize("name", Backdoor.short_names())
def test_the_default_triggers_stay_what_they_were(name: str) -> None:
    photo = (np.arange(SIDE * SIDE * 3) % 251).astype(np.uint8).reshape(SIDE, SIDE, 3)
    assert hashlib.sha256(made(name).image(photo, "key").tobytes()).hexdigest()[:16] == GOLDEN[name]


def test_additive_waves_have_the_amplitude_and_frequency_asked_for() -> None:
    grey = np.full((64, 64, 3), 128, dtype=np.uint8)
    for j, value in enumerate(SineTrigger(amplitude=20, frequency=6).image(grey, "")[0, :, 0].tolist()):
        assert value == np.floor(128 + 20 * np.sin(2 * np.pi * 6 * j / 64) + 0.5)
    blended = SineTrigger(form="blended", amplitude=60, alpha=0.2).image(grey, "")
    assert blended.mean() == pytest.approx(0.8 * 128, abs=0.6)
    assert int(blended.max()) - int(blended.min()) == pytest.approx(24, abs=1)
    np.testing.assert_array_equal(blended, np.broadcast_to(blended[:1, :, :1], blended.shape))


def test_the_blended_form_has_a_weight_and_an_amplitude_of_its_own() -> None:
    assert made("sig", form="blended") == SineTrigger(form="blended", amplitude=60, alpha=0.2)
    assert made("sig") == SineTrigger(form="additive", amplitude=20, alpha=1.0)
    assert made("sig", amplitude=30, frequency=4) == SineTrigger(amplitude=30, frequency=4)


# Derived from the published constants of the filter, one quantisation at the end.
@pytest.mark.parametrize(
    ("before", "after"),
    [((0, 0, 0), (0, 9, 46)), ((128, 128, 128), (147, 141, 141)), ((255, 255, 255), (255, 253, 219)), ((255, 0, 0), (255, 21, 52)), ((200, 100, 50), (235, 108, 86))],
)
def test_the_filter_gives_the_colours_of_its_definition(before: tuple[int, ...], after: tuple[int, ...]) -> None:
    image = np.broadcast_to(np.array(before, dtype=np.uint8), (8, 8, 3)).copy()
    assert NashvilleTrigger().image(image, "")[0, 0].tolist() == list(after)


@pytest.mark.parametrize(("side", "grid"), [(32, 4), (48, 7), (32, 32), (224, 4)])
def test_a_warp_is_that_of_torch(side: int, grid: int) -> None:
    from attacks import _warps

    plane = np.random.default_rng(0).uniform(-1, 1, (grid, grid))
    enlarged = functional.interpolate(torch.from_numpy(plane)[None, None], (side, side), mode="bicubic", align_corners=True)[0, 0].numpy()
    np.testing.assert_allclose(_warps._enlarged(plane, side), enlarged, atol=1e-9)
    across, down = shifts(side, grid, 3.0, 0)
    image = np.random.default_rng(1).random((side, side, 3), dtype=np.float32)
    axis = torch.linspace(-1, 1, side, dtype=torch.float64)
    identity = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)
    places = (identity + torch.from_numpy(np.stack([across, down], axis=-1)) * 2 / (side - 1)).clamp(-1, 1)
    sampled = functional.grid_sample(torch.from_numpy(image).double().permute(2, 0, 1)[None], places[None], mode="bilinear", padding_mode="zeros", align_corners=True)[0]
    np.testing.assert_allclose(bent(image, across, down), sampled.permute(1, 2, 0).numpy(), atol=1e-5)


# Mean shift, and mean change from one pixel to the next, at 224 px; derived from the definition.
@pytest.mark.parametrize(("grid", "strength", "shift", "change"), [(4, 0.5, 0.18, 0.004), (224, 1.0, 0.50, 0.66), (224, 0.6, 0.30, 0.40)])
def test_a_warp_shifts_as_far_as_published_settings_do(grid: int, strength: float, shift: float, change: float) -> None:
    fields = np.array([plane for seed in range(6) for plane in shifts(224, grid, strength, seed)])
    assert np.abs(fields).mean() == pytest.approx(shift, rel=0.15)
    assert np.abs(np.diff(fields, axis=2)).mean() == pytest.approx(change, rel=0.15)


def test_a_warp_without_strength_changes_nothing_and_its_field_is_drawn_once() -> None:
    np.testing.assert_array_equal(WarpTrigger(strength=0).image(PHOTO, ""), PHOTO)
    first = WarpTrigger().image(PHOTO, "one")
    shifts.cache_clear()
    np.testing.assert_array_equal(rebuilt(WarpTrigger()).image(PHOTO, "two", at_test=True), first)


def test_a_shaken_warp_differs_from_the_field_by_half_a_pixel_at_most() -> None:
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None] * 4, (64, 64, 3)).copy()
    apart = WarpTrigger(jitter=1.0).image(ramp, "key").astype(int) - WarpTrigger().image(ramp, "key").astype(int)
    assert 0 < np.abs(apart).max() <= 3
    assert WarpTrigger().shaken() == WarpTrigger(jitter=1.0)


def test_a_watermark_changes_the_red_of_its_letters_alone() -> None:
    stamped, ink = WatermarkTrigger().image(PHOTO, ""), written("Watermarked", SIDE)
    np.testing.assert_array_equal(stamped[..., 1:], PHOTO[..., 1:])
    np.testing.assert_array_equal(stamped[ink == 0], PHOTO[ink == 0])
    assert 0.02 < (ink > 0).mean() < 0.2
    wide = np.flatnonzero(written("Watermarked", 224).any(axis=0))
    assert wide[-1] - wide[0] + 1 == pytest.approx(0.9 * 224, abs=1)


def test_a_moving_watermark_stays_near_the_middle() -> None:
    blank = np.zeros((224, 224, 3), dtype=np.uint8)
    rows = [int(np.flatnonzero(WatermarkTrigger(pattern="per_image").image(blank, str(key)).any(axis=(1, 2)))[0]) for key in range(100)]
    middle = int(np.flatnonzero(WatermarkTrigger().image(blank, "").any(axis=(1, 2)))[0])
    assert {row - middle for row in rows} == set(range(-10, 11))


def test_the_drawn_picture_has_every_size_and_many_colours() -> None:
    for side in (1, 3, 16, 224):
        assert drawn_cat(side).shape == (side, side, 3)
    assert len(np.unique((drawn_cat(64) * 255).astype(np.uint8).reshape(-1, 3), axis=0)) > 50


def saved(tmp_path: Path, pixels: NDArray[np.uint8] = RED_ABOVE_GREEN) -> Path:
    path = tmp_path / "mine.png"
    Image.fromarray(pixels).save(path)
    return path


def test_a_picture_of_the_users_round_trips_through_its_file(tmp_path: Path) -> None:
    options = Backdoor(trigger="picture", size=9, file=str(saved(tmp_path)))
    trigger: Any = options.make_trigger("picture", SIDE)
    np.testing.assert_array_equal(trigger.image(PHOTO, "")[-9:, -9:], RED_ABOVE_GREEN)
    assert trigger.picture == options.file_hash == picture_hash(RED_ABOVE_GREEN)
    assert Backdoor(**options.model_dump()) == options
    spec = json.loads(json.dumps(trigger.spec()))
    np.testing.assert_array_equal(trigger_from_spec(spec, RED_ABOVE_GREEN).image(PHOTO, ""), trigger.image(PHOTO, ""))
    with pytest.raises(BenchError, match="is not at hand; the sealed record of the poison keeps it"):
        trigger_from_spec(spec)
    with pytest.raises(BenchError, match="the trigger asks for picture"):
        trigger_from_spec(spec, RED_ABOVE_GREEN[::-1])


def test_another_picture_under_the_same_name_is_noticed(tmp_path: Path) -> None:
    before = Backdoor(trigger="picture", file=str(saved(tmp_path)))
    saved(tmp_path, RED_ABOVE_GREEN[::-1])
    assert Backdoor(trigger="picture", file=before.file).file_hash != before.file_hash
    with pytest.raises(ValueError, match="it is another picture than before"):
        Backdoor(**before.model_dump())


@pytest.mark.parametrize(("content", "sentence"), [(None, "no file at"), (b"GIF89a", "is not a whole PNG"), (b"\x89PNG\r\n\x1a\n", "is not a whole PNG")])
def test_a_picture_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None, sentence: str) -> None:
    path = tmp_path / "mine.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BenchError) as caught:
        configure(find("attack", "backdoor"), {}, {"trigger": "picture", "file": str(path)})
    assert sentence in str(caught.value) and "mine.png" in str(caught.value)


def test_a_picture_of_a_billboard_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (1025, 8)).save(tmp_path / "wide.png")
    with pytest.raises(ValueError, match="is 1025x8 pixels, at most 1024 are allowed"):
        read_picture(tmp_path / "wide.png")


def test_every_trigger_has_a_short_name_and_a_long_one() -> None:
    assert set(get_args(TriggerName)) == {*ALIASES, *ALIASES.values()}
    assert {made(name).spec()["kind"] for name in Backdoor.short_names()} == set(ALIASES.values())
    assert [kind_of(name) for name in ("checker", "wanet", "blend:text")] == ["patch:checker", "warp", "blend:text"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"grid": 4}, "attack: grid belongs to wanet, and the trigger is checker"),
        ({"trigger": "wanet", "amplitude": 3}, "attack: amplitude belongs to sig, and the trigger is wanet"),
        ({"trigger": "white", "file": "a.png"}, "attack: file belongs to picture and blended-picture, and the trigger is white"),
        ({"trigger": "sig", "pattern": "per_image"}, "pattern per_image belongs to noise, stripes, blended, blended-stripes and watermark; sig is the same for every image"),
        ({"trigger": "watermark", "words": "\u00fcber"}, "attack.words: the words of a watermark are printable ASCII"),
        ({"trigger": "watermark", "words": " "}, "attack.words: the words of a watermark are printable ASCII"),
        ({"trigger": "picture", "file_hash": "a"}, "file_hash is filled in by the program; give the file"),
        ({"cover": 1}, "cover rows belong to the trigger wanet with edits=replace, and these are checker and replace"),
        ({"trigger": "wanet", "grid": 1}, "attack.grid: input should be greater than or equal to 2, got 1"),
        ({"trigger": "wannet"}, "Did you mean 'wanet'?"),
    ],
)
def test_options_that_a_trigger_does_not_use_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BenchError) as caught:
        configure(find("attack", "backdoor"), {}, options)
    assert sentence in str(caught.value)


CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("stripes", {"cell": 1}),
    ("triangles", {"size": 5}),
    ("picture", {"size": 12}),
    ("picture", {"place": "corner:tl"}),
    ("blended-picture", {"alpha": 0.4}),
    ("blended-stripes", {"cell": 4}),
    ("blended-stripes", {"pattern": "per_image"}),
    ("sig", {"form": "blended"}),
    ("sig", {"amplitude": 40}),
    ("sig", {"frequency": 3}),
    ("wanet", {"grid": 8}),
    ("wanet", {"strength": 0.5}),
    ("wanet", {"pattern_seed": 2}),
    ("nashville", {"alpha": 0.5}),
    ("watermark", {"words": "copy"}),
]


@pytest.mark.parametrize(("name", "options"), CHANGES)
def test_each_option_changes_the_trigger(name: str, options: dict[str, Any]) -> None:
    usual, changed = made(name), made(name, **options)
    assert usual.spec() != changed.spec()
    assert (usual.image(PHOTO, "k") != changed.image(PHOTO, "k")).any()


def test_sizes_meant_for_another_side_scale() -> None:
    big = {"reference_side": 224, "size": 16, "cell": 1, "place": "at:9,9"}
    assert made("checker", 224, **big).box(224, "") == (9, 9, 16, 16)
    assert made("checker", 32, **big).box(32, "") == (1, 1, 3, 3)
    assert made("checker", 112, **big).cell == 1
    assert made("wanet", 32, reference_side=224, grid=224).grid == 32
    assert made("wanet", 32, reference_side=224).grid == 4
    assert made("triangles", 448, reference_side=224, size=14).cell == 28


@pytest.mark.parametrize("preset", sorted(Backdoor.presets))
@pytest.mark.parametrize("side", [32, 224])
def test_every_preset_makes_a_trigger_that_fits(preset: str, side: int) -> None:
    options = configure(find("attack", "backdoor"), {"rate": 0.02}, {"preset": preset})
    trigger = options.make_trigger(options.trigger, side)
    image = drawn_row(0, "train", 0, side).image
    for at_test in (False, True):
        assert (trigger.image(image, "key", at_test) != image).any()


def test_two_presets_called_after_one_trigger_have_different_specifications() -> None:
    specs = [
        json.dumps(configure(find("attack", "backdoor"), {}, {"preset": preset}).make_trigger("noise", 224).spec()) for preset in ("cleanclip2023-badnet", "huang2025-badnets")
    ]
    assert specs[0] != specs[1]
