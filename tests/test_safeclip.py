"""SafeCLIP against the published facts (docs/methods/safeclip.md)."""

import math
import types
from statistics import NormalDist

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture
from torch.nn.functional import normalize

from benchmark.contract import Batch
from benchmark.errors import BenchError
from benchmark.progress import silent
from benchmark.settings import AugmentSettings, ModelSettings, TrainSettings
from benchmark.train.augment import crop_boxes
from benchmark.train.loop import Budget, TrainingData, opening, train
from benchmark.train.model import build
from benchmark.train.views import TextViews, as_it_is
from defenses._crops import boxes_within, enlarged
from defenses._mixture import fit
from defenses._safe_set import ranked, rate, sizes, total_of_released_schedule
from defenses.clip import Clip
from defenses.safeclip import SafeCLIP

N, BATCH = 40, 8
CAPTIONS = tuple(f"a photo of {word} number {index} on paper" for index, word in enumerate(("boat", "tree", "star", "cup") * 10))


def features(*rows):
    return torch.tensor(rows, requires_grad=True)


def fake_model(images, texts, scale=10.0):
    """Features that are given: a view of images or tokens holds only the number of its features."""
    return types.SimpleNamespace(image=lambda view: images[int(view.flatten()[0])], text=lambda view: texts[int(view.flatten()[0])], scale=torch.tensor(scale))


def numbered(augmented=True):
    """A batch whose first and second view are told apart by their number, and a `now` whose augmentation makes the second."""
    now = types.SimpleNamespace(augmented=augmented, n_rows=2, batch_size=2, gather=lambda x: x, log=lambda name, value: None)
    now.generator = lambda purpose: torch.Generator().manual_seed(0)
    now.augment = lambda images, boxes=None: torch.ones_like(images)
    tokens = torch.zeros(2, 2, 2, dtype=torch.int64)
    tokens[1] = 1
    return Batch(torch.zeros(2, 3, 2, 2), torch.zeros(2, 3, 2, 2), tokens, torch.arange(2)), now


I1, I2 = features([1.0, 0.0], [0.8, 0.6]), features([1.0, 0.0], [0.0, 1.0])


def unimodal(**options):
    defense = SafeCLIP(bank_init="noise_raw", bank_size=2, **options)
    batch, now = numbered()
    with torch.no_grad():
        for name in ("image", "text"):
            defense.state.update({f"{name}_bank": torch.tensor([[0.6, 0.8], [1.0, 0.0]]), f"{name}_pointer": 0, f"{name}_count": 2})
    first, second = I1.detach().clone().requires_grad_(), I2.detach().clone().requires_grad_()
    model = fake_model((first, second), (first, second))
    return defense, defense.unimodal_loss(model, batch, now), first, second


def test_the_unimodal_loss_has_the_known_value_and_one_direction():
    assert unimodal()[1].item() == pytest.approx(0.0092427, abs=1e-6)
    assert unimodal(unimodal_symmetric=True)[1].item() == pytest.approx(0.0363647, abs=1e-6)


def test_the_unimodal_gradient_reaches_the_second_view_alone():
    _, loss, first, second = unimodal()
    loss.backward()
    assert first.grad is None and second.grad.abs().sum() > 0
    _, loss, first, second = unimodal(bank="none")
    loss.backward()
    assert first.grad.abs().sum() > 0 and second.grad.abs().sum() > 0


def test_a_bank_is_searched_before_it_is_filled_and_cross_modal_steps_leave_it_alone():
    defense, loss, first, _ = unimodal()
    assert loss.item() == pytest.approx(0.0092427, abs=1e-6), "with its own first views in the bank, each row would have met itself"
    assert torch.equal(defense.state["image_bank"], first)
    before = defense.state["image_bank"].clone()
    batch, now = numbered()
    defense.cross_loss(fake_model((I1, I2), (I1, I2)), batch, now)
    assert torch.equal(defense.state["image_bank"], before)


def test_an_empty_bank_gives_the_first_view_until_it_is_full():
    defense = SafeCLIP(bank_size=4)
    batch, now = numbered()
    losses = [float(defense.unimodal_loss(fake_model((I1, I2), (I1, I2)), batch, now).detach()) for _ in range(3)]
    expected = float(torch.nn.functional.cross_entropy(10 * I2 @ I1.T, torch.arange(2)).detach())
    assert losses == pytest.approx([expected] * 3)
    assert defense.state["image_count"] == 4


def test_the_cross_modal_loss_crosses_the_views():
    batch, now = numbered()
    images = (torch.eye(2), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    texts = (torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.6, 0.8]]))
    assert SafeCLIP().cross_loss(fake_model(images, texts), batch, now).item() == pytest.approx(0.0046440, abs=1e-6)
    assert SafeCLIP().cross_loss(fake_model(images[::-1], texts), batch, now).item() > 1, "swapped views give another value"


def test_without_augmentation_the_cross_modal_loss_is_that_of_clip():
    batch, now = numbered(augmented=False)
    model = fake_model((I1, I2), (I2, I1))
    assert torch.equal(SafeCLIP().cross_loss(model, batch, now), Clip().loss(model, batch, now))


def test_text_views_are_two_rewritings_or_the_caption_and_two_views_of_it():
    def rewrite(text, rng):
        return f"{text} {rng.integers(1000)}"

    one, two = SafeCLIP().captions("a red boat", np.random.default_rng(0), rewrite)
    assert one != two and one.startswith("a red boat ")
    plain = SafeCLIP().captions("a red boat on the water", np.random.default_rng(1), as_it_is)
    assert plain[0] == "a red boat on the water" and len(plain) == 3


SEPARATED = np.concatenate([np.linspace(-0.1, 0.1, 20), np.linspace(0.3, 0.5, 20)])


def test_the_mixture_of_two_separate_groups_is_scikit_learns():
    ours = fit(SEPARATED)
    theirs = GaussianMixture(2, random_state=0).fit(SEPARATED[:, None])
    order = theirs.means_[:, 0].argsort()
    assert ours.means == pytest.approx((0.0, 0.4), abs=1e-3)
    assert ours.means == pytest.approx(theirs.means_[order, 0], abs=1e-3)
    assert ours.variances == pytest.approx(theirs.covariances_[order, 0, 0], abs=1e-3)
    assert ours.weights == pytest.approx(theirs.weights_[order], abs=1e-3)
    assert np.sqrt(ours.variances) == pytest.approx((0.0607, 0.0607), abs=1e-3)
    assert np.flatnonzero(ours.posterior(SEPARATED) >= 0.9).tolist() == list(range(20, 40))
    assert ours.posterior(SEPARATED) == pytest.approx(theirs.predict_proba(SEPARATED[:, None])[:, order[1]], abs=1e-3)


def test_the_most_similar_row_can_have_the_lowest_probability():
    low, high = NormalDist(0, 0.2), NormalDist(0.4, 0.03)
    values = np.array([*(low.inv_cdf((j + 0.5) / 100) for j in range(100)), *(high.inv_cdf((j + 0.5) / 300) for j in range(300)), 0.6])
    posterior = fit(values).posterior(values)
    assert posterior[400] < 0.001 and posterior[np.abs(values - 0.4) < 0.01].min() > 0.98
    assert (posterior >= 0.9).sum() == pytest.approx(295, abs=3)
    assert ranked(values, posterior, "similarity")[0] == 400
    assert ranked(values, posterior, "posterior")[0] != 400


def test_the_mixture_of_equal_values_is_no_error():
    assert np.isfinite(fit(np.full(9, 0.25)).posterior(np.full(9, 0.25))).all()


def test_ties_go_to_the_first_rows_and_the_order_of_rows_does_not_matter():
    assert ranked(np.zeros(7), np.ones(7), "similarity").tolist() == list(range(7))
    rng = np.random.default_rng(0)
    values, order = rng.permutation(np.linspace(-1, 1, 30)), rng.permutation(30)
    posterior = fit(values).posterior(values)
    for rank_by in ("similarity", "posterior"):
        chosen = set(ranked(values, posterior, rank_by)[:9].tolist())
        assert {int(order[row]) for row in ranked(values[order], posterior[order], rank_by)[:9]} == chosen


def test_the_safe_set_grows_to_its_cap():
    grown = sizes(2000, 10_000, 26, 0.01, 0.85)
    assert (grown[0], grown[1], grown[25]) == (2000, 2100, 4500)
    assert sizes(2000, 10_000, 26, 0.01, 0.25)[5:] == [2500] * 21
    assert sizes(9000, 10_000, 3, 0.01, 0.85) == [9000, 8500, 8500]
    assert all(sizes(first, 401, 2, 0.0, 1.0) == [first, first] for first in range(1, 402)), "a share is no whole number of rows, its set is"


# docs/methods/safeclip.md: epoch to (first, last) rate of 1,000,480 rows in batches of 512 from a first share of 0.20, from the released code's formulas.
RELEASED_UNIMODAL = {7: (4.7e-4, 3.4e-4), 10: (6.0e-5, 2.9e-8), 12: (3.3e-5, 1.6e-4), 16: (4.8e-4, 4.9e-4), 20: (2.6e-4, 1.1e-4), 24: (3.0e-9, 4.3e-5), 32: (4.2e-4, 4.9e-4)}
RELEASED_CROSS = {7: (2.2e-4, 2.4e-4), 10: (3.2e-4, 3.4e-4), 12: (3.8e-4, 4.1e-4), 16: (5.0e-4, 4.8e-4), 20: (3.2e-4, 2.4e-4), 26: (4.9e-11, 1.7e-5), 32: (3.2e-4, 4.1e-4)}


def first_and_last(pass_, n_steps):
    return pass_.lr(0, n_steps), pass_.lr(n_steps - 1, n_steps)


def scheduled(defense, epoch, n_rows, batch_size, n_first, epochs):
    """Safe and risky pass of an epoch, from the sizes alone."""
    first, second, mixed = defense.stages(epochs)
    index = epoch - first - second - 1
    planned = sizes(n_first, n_rows, mixed, defense._growth(mixed), defense.safe_cap)
    safe = np.arange(n_rows) < planned[index]
    now = types.SimpleNamespace(n_rows=n_rows, batch_size=batch_size, steps_per_epoch=n_rows // batch_size, log=lambda name, value: None)
    parts = {part.phase: part for part in defense._passes(epoch, index, planned, safe, now)}
    return {phase: (part, len(part.rows) // batch_size) for phase, part in parts.items()}


def test_the_released_schedule_is_reproduced():
    defense = SafeCLIP(**SafeCLIP.presets["official"])
    assert total_of_released_schedule(0.20, 0.01, 26, 1954) == 16_511
    for phase, table in (("risky", RELEASED_UNIMODAL), ("safe", RELEASED_CROSS)):
        for epoch, expected in table.items():
            part, n_steps = scheduled(defense, epoch, 1_000_480, 512, 200_096, 32)[phase]
            assert first_and_last(part, n_steps) == pytest.approx(expected, rel=0.06, abs=2e-7), (phase, epoch)
    steps = 1954
    now = types.SimpleNamespace(steps_per_epoch=steps, log=lambda name, value: None)
    assert defense._first_rate(1, 5, now)(0, steps) == pytest.approx(5e-4 * 1955 / 10_000), "counted one epoch late"
    assert defense._first_rate(5, 5, now)(steps - 1, steps) == pytest.approx(4e-10, rel=0.2)


def test_the_fixed_schedule_warms_up_once_and_falls_to_nothing():
    defense, rates = SafeCLIP(), []
    for epoch in range(7, 33):
        for phase in ("risky", "safe"):
            part, n_steps = scheduled(defense, epoch, 10_240, 64, 2000, 32)[phase]
            rates += [part.lr(step, n_steps) for step in range(n_steps)]
    peak = int(np.argmax(rates))
    assert rates[peak] == pytest.approx(5e-4, rel=1e-4) and peak == pytest.approx(0.1 * len(rates), abs=2)
    assert all(np.diff(rates[: peak + 1]) > 0) and all(np.diff(rates[peak:]) <= 0) and rates[-1] < 5e-6
    now = types.SimpleNamespace(steps_per_epoch=50, log=lambda name, value: None)
    warm = [defense._first_rate(epoch, 5, now)(step, 50) for epoch in range(1, 6) for step in range(50)]
    assert warm[0] == pytest.approx(5e-4 / 50) and max(warm) == pytest.approx(5e-4) and warm[-1] < 5e-6


def test_the_rate_at_the_end_of_a_warm_up_is_the_base_rate():
    assert rate(1e-3, 9, 10, 100, 0) == pytest.approx(1e-3)
    assert rate(1e-3, 50, 10, 90, 0) == pytest.approx(1e-3 * (1 + math.cos(math.pi / 2)) / 2)


def trained(defense, folder, epochs=5, augmented=False, images=None, **changes):
    folder.mkdir(exist_ok=True)
    model = build(ModelSettings(), 32, 0, torch.device("cpu"))
    images = np.random.default_rng(0).integers(0, 256, (N, 32, 32, 3), dtype=np.uint8)
    data = TrainingData(images, model.tokenizer.encode(CAPTIONS)[0], TextViews(CAPTIONS, defense, None, model.tokenizer, "fixed", 0))
    budget = Budget(TrainSettings(**{"epochs": epochs, "batch_size": BATCH, **changes}), AugmentSettings(), augmented, 0)
    log = train(model, defense, data, budget, folder, silent())
    return model.state(), log


def test_an_epoch_is_split_into_safe_and_risky_rows(tmp_path):
    defense = SafeCLIP(first_share=0.5)
    _, log = trained(defense, tmp_path)
    assert [row["phase"] for row in log] == ["unimodal", "warm-up", "risky+safe", "risky+safe", "risky+safe"]
    assert [row["n_safe"] for row in log[2:]] == [20, int(40 * (0.5 + 26 / 3 / 100)), int(40 * (0.5 + 52 / 3 / 100))]
    assert all(row["n_safe"] + row["n_risky"] == N for row in log[2:])
    assert log[1]["lr_first"] == log[1]["lr_last"] == 5e-6
    similarity, safe = defense.state["similarity"], defense.state["safe"]
    assert similarity[safe].min() >= similarity[~safe].max()
    assert set(defense.state) >= {"first_similarity", "first_safe", "posterior", "image_bank", "text_bank"}


def test_all_rows_safe_from_the_first_epoch_on_is_plain_clip(tmp_path):
    options = {"unimodal_epochs": 0, "cross_warmup_epochs": 0, "first_share": 1.0, "safe_cap": 1.0, "safe_growth": 0.0, "train_risky": False, "cross_lr": 2e-3}
    ours, _ = trained(SafeCLIP(**options), tmp_path / "ours", 3)
    clip, _ = trained(Clip(), tmp_path / "clip", 3, lr=2e-3, warmup_frac=0.1)
    assert ours.keys() == clip.keys() and all(torch.equal(ours[name], clip[name]) for name in ours)


@pytest.mark.parametrize("augmented", [False, True])
def test_a_killed_training_with_a_safe_set_makes_the_same_next_split(tmp_path, augmented):
    class Dies(RuntimeError):
        pass

    class Dying(SafeCLIP):
        def plan(self, epoch, now):
            if epoch == 5 and not alive:
                alive.append(True)
                raise Dies
            return super().plan(epoch, now)

    alive = []
    options = {"first_share": 0.5, "similarity_view": "augmented" if augmented else "clean"}
    whole, log = trained(SafeCLIP(**options), tmp_path / "whole", 5, augmented)
    with pytest.raises(Dies):
        trained(Dying(**options), tmp_path / "killed", 5, augmented)
    again, log_again = trained(Dying(**options), tmp_path / "killed", 5, augmented)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert [{**row, "seconds": 0} for row in log] == [{**row, "seconds": 0} for row in log_again]


def test_measuring_all_pairs_changes_nothing(tmp_path):
    model = build(ModelSettings(), 32, 0, torch.device("cpu"))
    images = np.random.default_rng(0).integers(0, 256, (N, 32, 32, 3), dtype=np.uint8)
    data = TrainingData(images, model.tokenizer.encode(CAPTIONS)[0], TextViews(CAPTIONS, SafeCLIP(), None, model.tokenizer, "fixed", 0))
    now = opening(model, data, Budget(TrainSettings(epochs=5, batch_size=BATCH), AugmentSettings(), True, 0))
    now.begin(3)
    model.net.train()
    before, state, drawn = {name: value.clone() for name, value in model.net.state_dict().items()}, torch.get_rng_state(), now.rng.get_state()
    clean, again, augmented, same = now.features(), now.features(), now.features(augmented=True), now.features(augmented=True)
    assert torch.equal(clean[0], again[0]) and torch.equal(clean[1], again[1])
    assert torch.equal(augmented[0], same[0]) and not torch.equal(augmented[0], clean[0])
    assert model.net.training and torch.equal(torch.get_rng_state(), state) and torch.equal(now.rng.get_state(), drawn)
    assert all(torch.equal(before[name], value) for name, value in model.net.state_dict().items())


@pytest.mark.parametrize(
    ("options", "epochs", "message"),
    [
        ({}, 5, r"10 batches of pairs .* got 40 pairs for batches of 8"),
        ({"first_share": 0.3}, 5, r"a safe set of 12 of 40 pairs \(share 0\.300\) does not fill two batches of 8"),
        ({"first_share": 0.5}, 3, r"leave 1 for the safe set, which needs 2"),
        ({"first_share": 0.5, "schedule": "official"}, 5, r"a warm-up of 10000 steps does not fit into the unimodal stage of 10"),
        ({"first_share": 0.5, "schedule": "official", "warmup_steps": 8}, 5, r"a warm-up of 8 steps does not fit into the 8 steps of the stage with a safe set"),
    ],
)
def test_what_cannot_train_is_refused_with_its_numbers(tmp_path, options, epochs, message):
    with pytest.raises(BenchError, match=message):
        trained(SafeCLIP(**options), tmp_path, epochs)


def test_a_mixture_that_finds_too_few_pairs_is_an_error_and_not_an_empty_epoch(tmp_path):
    with pytest.raises(BenchError, match=r"does not fill two batches of 4; raise defense\.first_share or defense\.filter_lr"):
        trained(SafeCLIP(safe_threshold=0.999999), tmp_path, 5, batch_size=4)


def test_risky_rows_that_do_not_fill_a_batch_are_left_out_with_a_warning(tmp_path):
    _, log = trained(SafeCLIP(first_share=0.9), tmp_path)
    assert log[2]["phase"] == "safe" and log[2]["steps"] == 36 // BATCH
    assert any("4 pairs outside the safe set do not fill a batch of 8" in line for line in log[2]["warnings"])
    assert any("outside 0.02 to 0.85" in line for line in log[2]["warnings"])


def test_localized_crops_lie_within_the_enlarged_first_crop():
    rng = torch.Generator().manual_seed(0)
    first = crop_boxes(500, 32, 0.1, 0.4, rng)
    regions = enlarged(first, 32, 0.2)
    second = boxes_within(regions, 0.1, 1.0, rng)
    (top, left, height, width), (y, x, h, w) = regions.unbind(1), second.unbind(1)
    assert bool(((y >= top) & (x >= left) & (y + h <= top + height) & (x + w <= left + width) & (h > 0) & (w > 0)).all())
    assert bool(((top >= 0) & (left >= 0) & (top + height <= 32) & (left + width <= 32)).all())
    assert enlarged(torch.tensor([[10, 10, 10, 10], [0, 20, 10, 12]]), 32, 0.2).tolist() == [[9, 9, 12, 12], [0, 19, 11, 13]]


def test_a_row_trains_with_localized_crops_and_symmetric_losses_too(tmp_path):
    free, _ = trained(SafeCLIP(first_share=0.5), tmp_path / "free", 3 + 1)
    local, _ = trained(SafeCLIP(first_share=0.5, crop="localized"), tmp_path / "local", 3 + 1)
    assert any(not torch.equal(free[name], local[name]) for name in free)
    assert all(bool(torch.isfinite(value).all()) for value in local.values() if value.is_floating_point())


def test_features_of_banks_are_unit_length(tmp_path):
    defense = SafeCLIP(first_share=0.5)
    trained(defense, tmp_path, 4)
    bank = defense.state["image_bank"]
    assert torch.allclose(bank, normalize(bank, dim=-1))
