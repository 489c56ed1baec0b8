"""How often crops show a trigger, for every way in which its place is known."""

from types import SimpleNamespace

import pytest

from attacks._triggers import PatternTrigger
from benchmark.evaluate.visibility import visibility
from benchmark.seeding import torch_generator
from benchmark.settings import AugmentSettings
from benchmark.train.augment import visible_share

SETTINGS = AugmentSettings(crop_min=0.5)


def share(kept, *triggers):
    found = visibility(kept, [SimpleNamespace(trigger=trigger) for trigger in triggers], 32, SETTINGS)
    return found[0].value if found else None


def test_a_fixed_patch_has_the_share_of_its_one_place():
    trigger = PatternTrigger("patch:white", 8, place="corner")
    box = trigger.box(32, "")
    assert share({"box": list(box)}, trigger) == visible_share(box, 32, SETTINGS, torch_generator("visible"))


def test_a_place_that_is_drawn_for_each_image_is_averaged_over_many():
    trigger = PatternTrigger("patch:white", 8, place="random")
    places = [visible_share(trigger.box(32, str(key)), 32, SETTINGS, torch_generator("visible")) for key in range(200)]
    assert max(places) - min(places) > 0.2, "one place says nothing of the others"
    assert share({"box": list(trigger.box(32, ""))}, trigger) == pytest.approx(sum(places) / 200, abs=0.02)


def test_layouts_have_a_place_for_each_row():
    layouts = [{"canvas": [32, 32], "trigger": [0, 0, 8]}, {"canvas": [32, 32], "trigger": [12, 12, 8]}]
    corner, middle = (visible_share((place, place, 8, 8), 32, SETTINGS, torch_generator("visible")) for place in (0, 12))
    assert share({"box": [0, 0, 8, 8], "layouts": layouts}, PatternTrigger("patch:white", 8)) == pytest.approx((corner + middle) / 2, abs=0.02)


def test_what_a_centre_crop_cuts_off_a_canvas_is_never_seen():
    inside, cut = {"canvas": [64, 32], "trigger": [28, 12, 8]}, {"canvas": [64, 32], "trigger": [10, 12, 8]}
    middle = visible_share((12, 12, 8, 8), 32, SETTINGS, torch_generator("visible"))
    assert share({"layouts": [inside]}, PatternTrigger("patch:white", 8)) == middle
    assert share({"layouts": [inside, cut]}, PatternTrigger("patch:white", 8)) == pytest.approx(middle / 2, abs=0.02)
    assert share({"layouts": [cut]}, PatternTrigger("patch:white", 8)) == 0


def test_a_trigger_of_the_whole_image_or_without_a_place_has_none():
    assert share({"box": [0, 0, 32, 32]}, PatternTrigger("blend:noise", 32)) is None
    assert share({}, PatternTrigger("patch:white", 8)) is None
