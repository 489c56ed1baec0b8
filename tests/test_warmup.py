"""The warm-up of trainings that are parts of a run (docs/methods/dpa.md, filters.md)."""

import types

import pytest

from benchmark.errors import BenchError
from benchmark.settings import SCALES
from benchmark.testing import World
from benchmark.train.lab import PairsView
from benchmark.train.schedule import warmup
from defenses._warmup import of_epochs, shrunk
from defenses.abl import ABL
from defenses.clipscore import ClipScore
from defenses.dpa import DPA
from defenses.early_loss import EarlyLoss


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


def budget(scale, **changes):
    settings = SCALES[scale]
    return types.SimpleNamespace(pairs=range(settings.data.n_pairs), train_settings=settings.train.model_copy(update=changes))


@pytest.mark.parametrize("scale", ["smoke", "small", "medium"])
def test_at_scales_with_a_share_nothing_changes(scale):
    assert all(of_epochs(budget(scale), epochs) is None for epochs in (None, 1, 3))
    assert shrunk(SCALES[scale].train, 10, 100) is None


def test_a_warm_up_of_steps_shrinks_with_a_training_that_it_does_not_fit():
    settings, whole = SCALES["paper"].train, 1_000_000 // 512 * 24
    assert of_epochs(budget("paper"), None) is None and of_epochs(budget("paper"), 6) is None
    assert of_epochs(budget("paper"), 5) == 10_000 / whole
    assert shrunk(settings, 10_001, 50_000) is None and shrunk(settings, 10_000, 50_000) == 0.2 and shrunk(settings, 9000, 10_000) is None
    assert warmup(settings.model_copy(update={"warmup_steps": None, "warmup_frac": 0.2}), 9000) == 1800


@pytest.mark.parametrize(
    "defense",
    [DPA(parts=2), ClipScore(suspect_epochs=1), EarlyLoss(epochs=1), ABL(early_epochs=1, isolate_frac=0.1, epochs=1)],
    ids=["dpa", "suspect", "early_loss", "abl"],
)
def test_parts_of_a_run_train_although_its_warm_up_is_longer_than_they_are(world, defense):
    lab = world.lab(defense, "lab")
    lab.train_settings = lab.train_settings.model_copy(update={"warmup_steps": 10})  # of 18 steps; the parts have 6 or 9
    defense.defend(lab)
    assert lab.trainings


def test_a_warm_up_that_does_not_fit_the_run_is_refused_as_before(world):
    lab = world.lab(DPA(), "lab")
    lab.train_settings = lab.train_settings.model_copy(update={"warmup_steps": 18})
    with pytest.raises(BenchError, match="a warm-up of 18 steps does not fit into a training of"):
        DPA(parts=2).defend(lab)


def test_the_shrunk_warm_up_of_a_part_does_not_depend_on_the_other_parts(world):
    rows = [0, 5, *range(40, 94)]
    models = []
    for n_pairs in (192, 150):
        lab = world.lab(DPA(), f"lab of {n_pairs}")
        lab.train_settings = lab.train_settings.model_copy(update={"warmup_steps": 5})  # of 3 steps
        lab.pairs = PairsView(lab.pairs.images[:n_pairs], lab.pairs.captions[:n_pairs])
        models.append(DPA(parts=3)._train(lab, rows).weights_sha256())
    assert models[0] == models[1]
