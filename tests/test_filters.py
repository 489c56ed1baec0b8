"""Filters: what they drop and train, their scores against values by hand, the rules for a reference, and the controls beside them."""

import math
import types

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture

import benchmark
from benchmark.errors import BenchError
from benchmark.testing import World
from benchmark.train.lab import snapshots
from defenses._early_loss import _Watched
from defenses._filter import above_the_usual, kept, top
from defenses._mixture import fit
from defenses._neighbour_filter import coverage
from defenses.clip import Clip
from defenses.clipscore import ClipScore
from defenses.cognitive_distillation import distilled, objective
from defenses.dao import DAO
from defenses.early_loss import EarlyLoss, _FirstEpochs, pair_losses
from defenses.iforest import isolation
from defenses.kdist import KDist
from defenses.lid import LID
from defenses.mixture import log_odds

TINY = (
    "data.n_pairs=256",
    "data.n_held_out=64",
    "data.n_clean=128",
    "data.n_test=100",
    "data.n_probe=200",
    "train.epochs=3",
    "train.batch_size=32",
    "evaluation.linear_probe=none",
)
FILTERS = ("clipscore", "mixture", "kdist", "slof", "lid", "dao", "iforest", "early_loss", "ngram_lift", "cognitive_distillation")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("shared")


def run(results, defense, *sets, seed=0):
    return benchmark.run("backdoor", defense, scale="smoke", sets=(*TINY, "evaluation.curve=false", *sets), results=results, seed=seed)


def values(record, of):
    return {entry["name"]: entry["value"] for entry in record["metrics"] if entry["of"] == of}


@pytest.mark.parametrize("name", [name if name in ("mixture", "dao", "early_loss") else pytest.param(name, marks=pytest.mark.slow) for name in FILTERS])
def test_every_filter_scores_drops_its_share_and_trains_as_long_on_the_rest(shared, name):
    record = run(shared, name)
    filtered, scored = values(record, "filter"), values(record, name)
    assert filtered["n_dropped"] == round(0.2 * 256) and 0 <= scored["auroc"] <= 1 and "f1_own" in scored
    steps = sum(point["steps"] for point in record["curve"])
    assert 256 // 32 * 3 <= steps < 256 // 32 * 3 + 205 // 32, "as many steps, up to a sweep"
    assert (record["clean_pairs_used"] == 100) == (name in ("kdist", "slof", "lid", "dao"))


def test_the_suspect_is_the_very_training_of_clip(shared):
    run(shared, "clip")
    before = {path.name for path in (shared / "cache" / "train").iterdir() if path.is_dir()}
    run(shared, "clipscore", "clipscore.suspicious=high")
    assert len({path.name for path in (shared / "cache" / "train").iterdir() if path.is_dir()} - before) == 1


def test_controls_drop_as_many_rows_with_and_without_the_truth(shared):
    draws = []
    for seed in (0, 1):
        at_random, told = run(shared, "random_drop", seed=seed), run(shared, "oracle_drop", seed=seed)
        assert values(at_random, "filter")["n_dropped"] == values(told, "filter")["n_dropped"] == round(0.2 * 256)
        assert values(told, "filter")["n_poison_kept"] == 0 and values(told, "filter")["recall_dropped"] == 1
        assert (at_random["told"], told["told"]) == ("nothing", "record")
        draws.append(at_random["curve"][-1]["loss_mean"])
    assert draws[0] != draws[1]
    with pytest.raises(BenchError, match=r"raise it to 0\.0195 or more"):
        run(shared, "oracle_drop", "oracle_drop.drop=0.01")


def test_a_filter_may_drop_what_its_own_threshold_flags(shared):
    record = run(shared, "clipscore", "clipscore.drop=null")
    assert values(record, "filter")["n_dropped"] == round(0.1 * 256)


@pytest.mark.parametrize("flagged", [np.zeros(192, dtype=bool), np.ones(192, dtype=bool)])
def test_an_own_threshold_that_leaves_nothing_to_do_or_nothing_to_train_on_is_refused(tmp_path, flagged):
    lab = World(tmp_path).lab(ClipScore(), "lab")
    with pytest.raises(BenchError, match=rf"flags {flagged.sum()} of 192 rows.*give a share with defense\.drop"):
        ClipScore(drop=None).without_the_most_suspicious(lab, "clipscore", torch.zeros(192), flagged)


def test_a_quota_is_exact_and_ties_go_by_row():
    scores = np.array([1.0, 3.0, 3.0, 3.0, 0.0])
    assert kept(scores, 0.4).tolist() == [0, 3, 4]
    assert top(scores, 0.4).tolist() == [False, True, True, False, False]
    assert kept(scores, 0.2).tolist() == [0, 2, 3, 4] and len(kept(np.zeros(1000), 0.1)) == 900


def test_the_usual_threshold_is_three_robust_deviations_above_the_median():
    scores = np.array([0.0, 1, 2, 3, 4, 6.5, 6.4])
    assert above_the_usual(scores).tolist() == [False] * 7  # median 3, deviations 3 2 1 0 1 3.5 3.4, MAD 2
    assert above_the_usual(np.append(np.arange(9.0), 30)).tolist() == [False] * 9 + [True]  # median 4.5, MAD 2.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reference": "sample", "rho_max": 0.1}, r"k/\(4 rho_max\) = 16/\(4 x 0.1\) gives a reference of 40 pairs, and k = 16 needs at least 4k \+ 1 = 65"),
        ({"reference": "sample", "rho_max": 0.04, "modalities": "both"}, r"k/\(8 rho_max\) = 16/\(8 x 0.04\) gives a reference of 50 pairs"),
        ({"reference": "clean", "reference_size": 64}, r"reference=clean gives a reference of 64 pairs.*= 65"),
        ({"reference": "all", "k": 64}, "reference of 192 pairs, and k = 64 needs at least 4k"),
    ],
)
def test_a_reference_that_is_too_small_is_refused_before_anything_is_trained(tmp_path, options, message):
    defense = DAO(**options)
    lab = World(tmp_path).lab(defense, "lab")
    with pytest.raises(BenchError, match=message):
        defense.defend(lab)
    assert not lab.trainings


def test_trusted_pairs_that_are_not_there_are_asked_for_before_anything_is_trained(tmp_path):
    defense = KDist(reference_size=100)
    lab = World(tmp_path).lab(defense, "lab")
    with pytest.raises(BenchError, match=r"asks for 100 clean pairs.*defense\.reference=sample"):
        defense.defend(lab)
    assert not lab.trainings


def test_the_usual_size_of_a_sample_holds_a_quarter_of_k_poisons():
    assert KDist(reference="sample").size(100_000) == 400 and KDist(reference="batch", rho_max=0.0001).size(1_000_000) == 40_000
    both = KDist(reference="sample", modalities="both")
    assert (both.size(100_000), both.clean_wanted(), KDist(modalities="both").size(100_000)) == (200, 0, 2000), "a poisoned row is two points of the reference"
    assert KDist(reference="all").size(5000) == 5000 and LID().size(10) == 2000
    assert (KDist().clean_wanted(), KDist(reference="sample").clean_wanted(), LID(reference_size=300).clean_wanted()) == (2000, 0, 300)


def test_a_reference_with_too_much_expected_poison_or_too_few_of_a_class_is_a_warning(tmp_path):
    defense = DAO(reference="all", k=8, rho_max=0.02)
    lab = World(tmp_path).lab(defense, "lab")
    defense.defend(lab)
    assert any("expected to hold 3.8 poisoned rows, more than k/4 = 2" in line for line in lab.warnings)
    assert any("192 pairs holds about 10 of each of 20 classes" in line for line in lab.warnings) == (192 <= 8 * 20)
    assert lab.handed_in[0].neighbourhood.k == 8 and np.array_equal(lab.handed_in[0].neighbourhood.groups[0], np.arange(192))
    both = DAO(reference="all", k=8, rho_max=0.0104, modalities="both", suspect_epochs=3)
    both.defend(lab)
    assert any("expected to hold 4.0 poisoned images and captions, more than k/4 = 2" in line for line in lab.warnings), "2.0 by rows, which would be no warning"
    assert np.array_equal(np.bincount(lab.handed_in[1].neighbourhood.groups[0]), np.full(192, 2))
    assert coverage(16, 320, 20) and not coverage(16, 321, 20)


@pytest.mark.parametrize(("reference", "warns"), [("clean", False), ("sample", True), ("batch", True), ("all", True)])
def test_lid_warns_of_every_reference_that_is_not_trusted(tmp_path, reference, warns):
    defense = LID(reference=reference, k=4, reference_size=50, rho_max=0.001, suspect_epochs=1)
    lab = World(tmp_path).lab(defense, "lab")
    defense.defend(lab)
    assert any(f"(defense.reference={reference}) may hold poison, and fewer than k/4 = 1 poisoned rows" in line for line in lab.warnings) == warns


@pytest.mark.parametrize("reference", ["clean", "sample", "batch", "all"])
def test_rows_are_scored_within_their_reference(tmp_path, reference):
    defense = KDist(reference=reference, k=4, reference_size=50, rho_max=0.02)
    world = World(tmp_path)
    lab = world.lab(defense, "lab")
    model = lab.train(Clip()).model
    scores, groups = defense.scored(lab, model, defense.size(192))
    image, _ = lab.features(model, raw=True)
    assert (len(groups) == 0) == (reference == "clean")
    if groups:
        assert {len(group) for group in groups} == {192 if reference == "all" else 50}
    if reference == "batch":
        assert sorted(set(np.concatenate(groups).tolist())) == list(range(192))
    row = 7
    group = next((one for one in groups if row in one), groups[0] if groups else None)
    others = model.encode_images(lab.clean_pairs(50).pairs.images, raw=True) if group is None else image[[other for other in group.tolist() if other != row]]
    expected = sorted((others.double() - image[row].double()).norm(dim=1).tolist())[3]
    if reference != "batch" or sum(row in one for one in groups) == 1:
        assert float(scores[row]) == pytest.approx(expected, rel=1e-4)


def test_log_odds_are_those_of_the_lower_component_and_never_saturate():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(0.1, 0.05, 100), rng.normal(0.7, 0.08, 900)])
    mixture = fit(x)
    odds = log_odds(mixture, x)
    near = np.abs(odds) < 15
    assert 1 / (1 + np.exp(odds[near])) == pytest.approx(mixture.posterior(x[near]), abs=1e-9)
    theirs = GaussianMixture(2, random_state=0).fit(x[:, None])
    assert np.array_equal(odds > 0, theirs.predict(x[:, None]) == int(np.argmin(theirs.means_)))
    assert len(np.unique(odds)) == len(np.unique(x))


def test_an_isolated_point_has_the_largest_score_and_the_formula_holds():
    rng = np.random.default_rng(0)
    cloud = rng.normal(size=(300, 2)).astype(np.float32)
    queries = np.concatenate([cloud, [[9.0, 9.0]]]).astype(np.float32)
    scores = isolation(queries, cloud, 100, 0)
    assert np.argmax(scores) == 300 and (scores > 0).all() and (scores <= 1).all() and scores[300] > 0.6
    two = isolation(np.array([[0.0], [10.0]], dtype=np.float32), np.array([[0.0], [10.0]], dtype=np.float32), 5, 0)
    assert two == pytest.approx([0.5, 0.5]), "each of two points is cut off at depth c(2) = 1"


def test_pair_losses_equal_a_double_loop_and_fill_the_last_batch_up():
    rng = torch.Generator().manual_seed(0)
    image, text = (torch.nn.functional.normalize(torch.randn(10, 4, generator=rng), dim=1) for _ in range(2))
    order = torch.randperm(10, generator=rng)
    found = pair_losses(image, text, 5.0, order, 4)
    batches = [order[:4].tolist(), order[4:8].tolist(), [*order[8:].tolist(), *order[:2].tolist()]]
    for batch in batches:
        for row in batch if batch is not batches[2] else batch[:2]:
            rows = [5 * float(image[row] @ text[other]) for other in batch]
            columns = [5 * float(image[other] @ text[row]) for other in batch]
            own = 5 * float(image[row] @ text[row])
            expected = sum(math.log(sum(math.exp(value) for value in side)) - own for side in (rows, columns)) / 2
            assert float(found[row]) == pytest.approx(expected, rel=1e-5)
    assert pair_losses(torch.ones(8, 1), torch.ones(8, 1), 3.0, torch.arange(8), 4).tolist() == pytest.approx([math.log(4)] * 8)


def test_the_observed_epochs_are_the_first_of_the_plain_run(tmp_path):
    defense = EarlyLoss(epochs=2)
    lab = World(tmp_path).lab(defense, "lab")
    defense.defend(lab)
    observed = lab.trainings[0]
    whole = lab.train(Clip())
    assert snapshots(observed)[2].read_bytes() == snapshots(whole._folder)[2].read_bytes()
    with pytest.raises(BenchError, match="observes 9 epochs and the run has 3"):
        EarlyLoss(epochs=9).defend(lab)


class Elsewhere:
    """What a resume puts on the model's device: it has to be fetched before it is added to anything."""

    def __init__(self, values):
        self.values = values

    def cpu(self):
        return self.values


@pytest.mark.parametrize(
    "observer", [lambda: _FirstEpochs(peak=1e-3, steps=12, warmup=0, late=0), lambda: _Watched(peak=1e-3, total=12, warm=0, late=0)], ids=["early_loss", "abl"]
)
def test_losses_that_a_resume_put_on_another_device_are_added_up_all_the_same(observer):
    rng = torch.Generator().manual_seed(0)
    image, text = (torch.nn.functional.normalize(torch.randn(12, 4, generator=rng), dim=1) for _ in range(2))
    model = types.SimpleNamespace(scale=torch.tensor(5.0))
    now = types.SimpleNamespace(features=lambda: (image, text), model=model, n_rows=12, batch_size=4, steps_per_epoch=3, generator=lambda purpose: torch.Generator().manual_seed(1))
    first, resumed = observer(), observer()
    first.plan(2, now)
    resumed.state["losses"] = Elsewhere(first.state["losses"])
    resumed.plan(3, now)
    assert torch.equal(resumed.state["losses"], 2 * first.state["losses"])


def test_the_two_signs_of_a_filter_give_opposite_scores(tmp_path):
    lab = World(tmp_path).lab(ClipScore(), "lab")
    for suspicious in ("low", "high"):
        ClipScore(suspicious=suspicious, suspect_epochs=1).defend(lab)
    low, high = lab.handed_in
    assert np.array_equal(low.values, -high.values) and low.flagged.sum() == high.flagged.sum() == 19


def test_the_objective_of_a_mask_by_hand():
    images = torch.full((1, 3, 2, 2), 0.5)
    mask = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]])
    colour = torch.tensor([1.0, 0.0, 0.5]).view(1, 3, 1, 1)

    def encode(x):
        return x.sum(dim=(2, 3))

    # Sums of each channel: kept pixels count 0.5 m, the others (1 - m) u; the mask sums to 2, so 1 + 2 u against 2.
    difference = (abs(1 + 2 - 2) + abs(1 + 0 - 2) + abs(1 + 1 - 2)) / 3
    rough = (0.25 + 0.25 + 1 + 0) / 4
    found = objective(encode, images, encode(images), mask, colour, gamma=0.1, beta=2.0)
    assert found.tolist() == pytest.approx([difference + 0.1 * 2 + 2 * rough])


def test_a_mask_keeps_what_the_feature_needs_and_gives_up_the_rest():
    rng = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 8, 8, generator=rng)
    masks = distilled(lambda x: 100 * x[:, :, :4, :4].flatten(1), images, 60, 0.1, 0.01, 0.0, rng)
    assert float(masks[:, :, :4, :4].min()) > 0.8 and float(masks[:, :, 4:].max()) < 0.2
    again = distilled(lambda x: 100 * x[:, :, :4, :4].flatten(1), images, 60, 0.1, 0.01, 0.0, torch.Generator().manual_seed(0))
    assert again.shape == masks.shape == (2, 1, 8, 8)
