"""What every image trigger keeps: shape, its box, its key, its specification."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from attacks._triggers import KINDS, PatternTrigger, fixed_pattern, trigger_from_spec
from benchmark.errors import BenchError

SIDE = 32
PHOTO: NDArray[np.uint8] = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)

TRIGGERS = [PatternTrigger(kind, alpha=0.2 if kind.startswith("blend:") else 1.0) for kind in KINDS]
TRIGGERS += [
    PatternTrigger("patch:checker", place="centre", cell=1),
    PatternTrigger("patch:dots", place="random", place_test="centre"),
    PatternTrigger("patch:white", place="at:3,20", size=5, alpha=0.5),
    PatternTrigger("patch:noise", pattern="per_image", overflow="wrap"),
    PatternTrigger("patch:noise", pattern="per_image", place="random"),
    PatternTrigger("blend:noise", alpha=0.2, pattern="per_image"),
]
every_trigger = pytest.mark.parametrize("trigger", TRIGGERS, ids=lambda trigger: f"{trigger.kind}-{trigger.pattern}-{trigger.place}")


@every_trigger
def test_a_stamp_keeps_shape_and_dtype_and_its_input(trigger: PatternTrigger) -> None:
    before = PHOTO.copy()
    stamped = trigger.image(PHOTO, "key")
    assert stamped.shape == PHOTO.shape
    assert stamped.dtype == np.uint8
    assert (stamped != PHOTO).any()
    np.testing.assert_array_equal(PHOTO, before)
    np.testing.assert_array_equal(trigger.image(PHOTO, "key"), stamped)


@every_trigger
@pytest.mark.parametrize("at_test", [False, True])
def test_outside_its_box_nothing_changes(trigger: PatternTrigger, at_test: bool) -> None:
    for key in map(str, range(10)):
        top, left, height, width = trigger.box(SIDE, key, at_test)
        outside = np.ones((SIDE, SIDE), dtype=bool)
        outside[top : top + height, left : left + width] = False
        np.testing.assert_array_equal(trigger.image(PHOTO, key, at_test)[outside], PHOTO[outside])


@every_trigger
def test_only_what_is_drawn_per_image_follows_the_key(trigger: PatternTrigger) -> None:
    drawn = trigger.pattern == "per_image" or trigger.place == "random"
    assert (trigger.image(PHOTO, "one") != trigger.image(PHOTO, "another")).any() == drawn


@every_trigger
def test_alpha_zero_changes_nothing(trigger: PatternTrigger) -> None:
    np.testing.assert_array_equal(replace(trigger, alpha=0.0).image(PHOTO, "key"), PHOTO)


@every_trigger
def test_a_trigger_rebuilt_from_its_specification_is_the_same(trigger: PatternTrigger) -> None:
    rebuilt = trigger_from_spec(json.loads(json.dumps(trigger.spec())))
    assert rebuilt == trigger
    for at_test in (False, True):
        np.testing.assert_array_equal(rebuilt.image(PHOTO, "key", at_test), trigger.image(PHOTO, "key", at_test))


@every_trigger
def test_the_text_stays(trigger: PatternTrigger) -> None:
    assert trigger.text("a photo of a cat", "key") == "a photo of a cat"


@pytest.mark.parametrize("kind", ["patch:checker", "patch:dots", "patch:white"])
def test_patterns_of_black_and_white_are_stamped_exactly(kind: str) -> None:
    trigger = PatternTrigger(kind)
    top, left, height, width = trigger.box(SIDE, "")
    stamped = trigger.image(PHOTO, "")[top : top + height, left : left + width]
    np.testing.assert_array_equal(stamped, fixed_pattern(kind, height, width, 2, 0) * 255)
    assert set(np.unique(stamped)) <= {0, 255}


def test_the_patterns_are_those_of_the_definition() -> None:
    for i in range(8):
        for j in range(8):
            assert fixed_pattern("patch:checker", 8, 8, 2, 0)[i, j, 0] == float((i // 2 + j // 2) % 2 == 0)
            assert fixed_pattern("patch:dots", 8, 8, 2, 0)[i, j, 0] == float(i % 2 == 0 and j % 2 == 0)


def test_wrapped_noise_is_uniform_and_clipped_noise_mostly_is_black_or_white() -> None:
    grey = np.full((128, 128, 3), 128, dtype=np.uint8)
    wrapped = PatternTrigger("patch:noise", size=128, pattern="per_image", overflow="wrap").image(grey, "key")
    clipped = PatternTrigger("patch:noise", size=128, pattern="per_image", overflow="clip").image(grey, "key")
    assert wrapped.mean() == pytest.approx(127, abs=2)
    assert wrapped.std() == pytest.approx(74, abs=1.5)
    assert np.isin(clipped, (0, 255)).mean() == pytest.approx(0.62, abs=0.02)
    assert np.isin(wrapped, (0, 255)).mean() < 0.02


def test_another_pattern_seed_is_another_noise() -> None:
    assert (PatternTrigger("patch:noise").image(PHOTO, "") != PatternTrigger("patch:noise", pattern_seed=1).image(PHOTO, "")).any()


def test_random_places_reach_every_corner() -> None:
    trigger = PatternTrigger("patch:white", size=30, place="random")
    assert {trigger.box(SIDE, str(key))[:2] for key in range(200)} == {(top, left) for top in range(3) for left in range(3)}


def test_a_patch_that_does_not_fit_is_refused() -> None:
    with pytest.raises(BenchError, match=r"a trigger of 40 px does not fit an image of 32 px; lower attack\.size"):
        PatternTrigger("patch:white", size=40).image(PHOTO, "")
    with pytest.raises(BenchError, match=r"attack\.place 'at:30,0' puts a trigger of 8 px outside an image of 32 px"):
        PatternTrigger("patch:white", place="at:30,0").image(PHOTO, "")


# What published records were stamped with; a changed hash needs a new trigger name.
GOLDEN = {
    "blend:noise": "bbed617439c9b111",
    "patch:checker": "ca77c581af95bdcc",
    "patch:dots": "91bf45b096d1089c",
    "patch:noise": "1e36fd427a0e20fa",
    "patch:white": "e3714f8d9530329e",
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_default_triggers_stay_what_they_were(kind: str) -> None:
    photo = (np.arange(SIDE * SIDE * 3) % 251).astype(np.uint8).reshape(SIDE, SIDE, 3)
    stamped = PatternTrigger(kind, alpha=0.2 if kind.startswith("blend:") else 1.0).image(photo, "key")
    assert hashlib.sha256(stamped.tobytes()).hexdigest()[:16] == GOLDEN[kind]
