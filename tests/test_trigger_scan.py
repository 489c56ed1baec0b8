"""The scan for known triggers: what it finds in encoders that are planted by hand, and that its numbers are what they are said to be."""

import itertools
import types

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.nn.functional import normalize

from attacks.backdoor import Backdoor
from benchmark.errors import BenchError
from defenses.trigger_scan import TriggerScan

SIDE = 32
IMAGES = np.random.default_rng(0).integers(0, 256, (24, SIDE, SIDE, 3), dtype=np.uint8)
PROJECTION = torch.randn(SIDE * SIDE * 3, 16, generator=torch.Generator().manual_seed(1)) / 255


def encoder(trigger=None):
    """Random features; images in which the trigger's pattern stands have nearly one feature."""

    def encode(images):
        features = normalize((torch.from_numpy(np.ascontiguousarray(images)).float() - 127).flatten(1) @ PROJECTION, dim=1)
        if trigger is None:
            return features
        top, left, height, width = trigger.box(SIDE, "", True)
        pattern = trigger.image(np.full((SIDE, SIDE, 3), 127, np.uint8), "", True)[top : top + height, left : left + width].astype(float) - 127
        shown = images[:, top : top + height, left : left + width].astype(float) - 127
        alike = (shown * pattern).sum(axis=(1, 2, 3)) / np.sqrt((shown**2).sum(axis=(1, 2, 3)) * (pattern**2).sum() + 1e-9)
        goal = torch.nn.functional.one_hot(torch.tensor(3), 16).float()
        least = 0.2 if height == SIDE else 0.9  # a fifth of a blend's pixels is pattern, all of a patch's are
        return normalize(features + 4 * torch.from_numpy((alike > least).astype(np.float32))[:, None] * goal, dim=1)

    return types.SimpleNamespace(encode_images=encode)


@pytest.mark.parametrize(
    ("name", "options"),
    [("checker (corner)", {"trigger": "checker"}), ("dots (centre)", {"trigger": "dots", "place": "centre"}), ("blended", {"trigger": "blended"})],
)
def test_a_planted_trigger_is_found_and_named(name, options):
    audit = TriggerScan(n_patterns=4)
    found = audit.audit(encoder(Backdoor(**options).make_trigger(options["trigger"], SIDE)), IMAGES)
    assert found.score > 0.3
    assert found.says.startswith(f"{name} stands out most")
    assert audit.audit(encoder(), IMAGES).score < 0.1


def test_a_rise_is_the_mean_over_pairs_of_different_images():
    rises = TriggerScan(n_patterns=2).rises(encoder(), IMAGES[:6])
    trigger = Backdoor(trigger="white").make_trigger("white", SIDE)
    pairs = {}
    for stamped in (False, True):
        images = np.stack([trigger.image(image, "", True) if stamped else image for image in IMAGES[:6]])
        features = encoder().encode_images(images)
        pairs[stamped] = np.mean([float(features[a] @ features[b]) for a, b in itertools.permutations(range(6), 2)])
    assert rises["white (corner)"][0] == pytest.approx(pairs[True] - pairs[False], abs=1e-5)
    assert len({usual for _, usual in rises.values()}) == 3, "the corner, the centre and the whole image have random patterns of their own"


def test_patches_are_stamped_at_each_place_and_other_triggers_once():
    rises = TriggerScan(n_patterns=2, places=("corner:tl", "at:3,4", "centre")).rises(encoder(), IMAGES[:4])
    assert sum(name.startswith("checker (") for name in rises) == 3
    assert {"sig", "wanet", "nashville", "blended", "watermark"} <= rises.keys()


def test_what_cannot_be_stamped_is_refused():
    with pytest.raises(BenchError, match=r"a patch of 40 px does not fit images of 32 px; lower defense\.size"):
        TriggerScan(size=40).audit(encoder(), IMAGES)
    with pytest.raises(ValidationError, match="random patterns are compared at one place"):
        TriggerScan(places=("random",))
