"""Repair methods against the published facts (docs/methods/cleanclip.md, par.md, abl.md, finetune.md)."""

import math
import types

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from benchmark.contract import Batch
from benchmark.errors import BenchError
from benchmark.progress import silent
from benchmark.registry import configure, find
from benchmark.settings import SCALES, AugmentSettings, ModelSettings, TrainSettings
from benchmark.testing import World
from benchmark.train.loop import Budget, TrainingData, train
from benchmark.train.loss import contrastive
from benchmark.train.model import MEAN, build
from benchmark.train.views import TextViews
from defenses._autoaugment import autoaugment
from defenses._early_loss import n_early, pair_losses
from defenses._repair import cosine, poisoned, sweeps
from defenses._statistics import still
from defenses.abl import ABL, _Unlearning, constraint, isolation_order
from defenses.cleanclip import CleanCLIP
from defenses.clip import Clip
from defenses.finetune import Finetune
from defenses.par import PAR, erased, gated, noisy, rate_at

N, BATCH = 40, 8
CAPTIONS = tuple(f"a photo of {word} number {index} on paper" for index, word in enumerate(("boat", "tree", "star", "cup") * 10))
SHORT = {"n_clean": 48, "epochs": 1, "min_steps": 1, "batch_size": 16}


def fake_model(image, image_view, text, text_view, scale=10.0):
    """Features that are given: views of images hold 0 or 1, and so do tokens."""
    pick = lambda pair: lambda view: pair[int(view.flatten()[0])]  # noqa: E731
    return types.SimpleNamespace(image=pick((image, image_view)), text=pick((text, text_view)), scale=torch.tensor(scale), net=torch.nn.Module(), raw_image=lambda view: None)


def numbered(n=2):
    now = types.SimpleNamespace(augmented=False, gather=lambda x: x, logged={}, augment=lambda images, boxes=None: torch.ones_like(images))
    now.log = lambda name, value: now.logged.__setitem__(name, float(value))
    tokens = torch.zeros(2, n, 2, dtype=torch.int64)
    tokens[1] = 1
    return Batch(torch.zeros(n, 3, 2, 2), torch.zeros(n, 3, 2, 2), tokens, torch.arange(n)), now


def trained(defense, epochs=2, start=None, folder=None, **changes):
    folder.mkdir(exist_ok=True)
    model = build(ModelSettings(), 32, 0, torch.device("cpu"))
    images = np.random.default_rng(0).integers(0, 256, (N, 32, 32, 3), dtype=np.uint8)
    data = TrainingData(images, model.tokenizer.encode(CAPTIONS)[0], TextViews(CAPTIONS, defense, None, model.tokenizer, "fixed", 0))
    log = train(model, defense, data, Budget(TrainSettings(**{"epochs": epochs, "batch_size": BATCH, **changes}), AugmentSettings(), False, 0), folder, silent())
    return model.state(), log


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


# CleanCLIP

IMAGE, TEXT, IMAGE_VIEW, TEXT_VIEW = torch.eye(2), torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.eye(2)


def test_the_loss_of_cleanclip_has_the_known_value():
    batch, now = numbered()
    loss = CleanCLIP(image_aug="scale").loss(fake_model(IMAGE, IMAGE_VIEW, TEXT, TEXT_VIEW), batch, now)
    within = (cross_entropy(10 * IMAGE @ IMAGE_VIEW.T, torch.arange(2)), cross_entropy(10 * TEXT @ TEXT_VIEW.T, torch.arange(2)))
    assert [value.item() for value in within] == pytest.approx([0.0092427, 0.0634867], abs=1e-6)
    assert loss.item() == pytest.approx(0.0363647 + (0.0092427 + 0.0634867) / 2, abs=1e-6) and loss.item() == pytest.approx(0.0727294, abs=1e-6)
    assert CleanCLIP(image_aug="scale", in_weight=0).loss(fake_model(IMAGE, IMAGE_VIEW, TEXT, TEXT_VIEW), batch, now).item() == pytest.approx(0.0363647, abs=1e-6)
    assert CleanCLIP(image_aug="scale", clip_weight=0, in_weight=2).loss(fake_model(IMAGE, IMAGE_VIEW, TEXT, TEXT_VIEW), batch, now).item() == pytest.approx(0.0727294, abs=1e-6)


def test_cleanclip_without_its_own_loss_is_fine_tuning_bit_for_bit(tmp_path):
    clean, _ = trained(CleanCLIP(in_weight=0, lr=1e-3), folder=tmp_path / "clean")
    plain, _ = trained(Finetune(lr=1e-3), folder=tmp_path / "plain")
    other, _ = trained(CleanCLIP(lr=1e-3, image_aug="scale"), folder=tmp_path / "other")
    assert equal(clean, plain) and not equal(other, plain)


def rates(defense, epochs, steps):
    now = types.SimpleNamespace(epochs=epochs, steps_per_epoch=steps)
    return [defense.plan(epoch, now)[0].lr(step, steps) for epoch in range(1, epochs + 1) for step in range(steps)]


def test_the_schedules_of_cleanclip_are_the_released_one_and_one_that_starts_at_its_beginning():
    official = rates(CleanCLIP(lr=1.0, schedule="official"), 2, 100)
    assert official[0] == pytest.approx((1 + math.cos(math.pi * 50 / 150)) / 2) == pytest.approx(0.75)
    assert official[100] == pytest.approx(0, abs=1e-12) and official[-1] > official[100], "the last epoch runs from zero upwards"
    fixed = rates(CleanCLIP(lr=1.0), 2, 100)
    assert fixed[0] == pytest.approx(1 / 10) and max(fixed) == 1.0 and fixed[-1] < 0.01
    assert rates(Finetune(lr=1.0), 2, 100) == fixed


def test_few_clean_pairs_are_swept_more_often():
    assert sweeps(2000, 64, 10, 500) == 17 and sweeps(100_000, 64, 10, 500) == 10 and sweeps(48, 64, 3, 1) == 3
    assert cosine(1.0, 50, 1, types.SimpleNamespace(epochs=1, steps_per_epoch=1))(0, 1) == 1.0


def test_autoaugment_draws_from_the_generator_that_it_is_given():
    images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before = torch.get_rng_state()
    one, same, other = (autoaugment(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other) and torch.equal(torch.get_rng_state(), before)
    assert one.shape == images.shape and float(one.min()) >= 0 and float(one.max()) <= 1


# PAR


def test_features_are_pushed_until_the_mean_distance_is_beyond_tau():
    now_, before = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True), torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    distances = (now_ - before).square().sum(dim=1)
    assert gated(distances, 2.15, "batch").item() == 1.0
    opposite = (now_ + now_.detach()).square().sum(dim=1)
    pushed = gated(opposite, 2.15, "batch")
    pushed.backward()
    assert pushed.item() == 0 and opposite.detach().mean() == 4 and torch.count_nonzero(now_.grad) == 0
    assert gated(torch.tensor([1.0, 3.0]), 2.15, "row").item() == 0.5 and gated(torch.tensor([1.0, 3.0]), 2.15, "batch").item() == 2.0


def test_the_loss_of_par_is_clip_minus_half_of_both_distances():
    batch, now = numbered()
    generator = torch.Generator().manual_seed(0)
    image, text, image_before, text_before = (normalize(torch.randn(2, 4, generator=generator), dim=1) for _ in range(4))
    model, now.start = fake_model(image, image, text, text), fake_model(image_before, image_before, text_before, text_before)
    by_hand = contrastive(image, text, torch.tensor(10.0))
    for after, before in ((image, image_before), (text, text_before)):
        mean = (after - before).pow(2).sum(1).mean()
        by_hand = by_hand - 0.5 * (mean if mean <= 2.15 else 0)
    assert PAR().loss(model, batch, now).item() == pytest.approx(by_hand.item(), abs=1e-6)
    assert PAR(tau=1e-9).loss(model, batch, now).item() == pytest.approx(contrastive(image, text, torch.tensor(10.0)).item(), abs=1e-6)
    assert now.logged["gate_closed_image"] == 1


def test_par_starts_at_its_highest_rate_and_bends_half_way():
    curve = [rate_at((3e-5, 3e-6, 1e-9), step, 1000) for step in range(1001)]
    assert curve[0] == 3e-5 and curve[500] == pytest.approx(3e-6) and curve[1000] == pytest.approx(1e-9)
    assert curve[250] == pytest.approx(1.65e-5) and all(np.diff(curve) <= 0)
    assert rates(PAR(lr_scale=2.0), 5, 20)[0] == 6e-5


def test_par_leaves_the_temperature_and_the_poisoned_model_alone(tmp_path):
    seen = {}

    class Watching(PAR):
        def plan(self, epoch, now):
            seen[epoch] = {name: value.clone() for name, value in now.start.net.state_dict().items()}
            return super().plan(epoch, now)

    state, log = trained(Watching(lr_scale=100.0), 3, folder=tmp_path)
    fresh = build(ModelSettings(), 32, 0, torch.device("cpu")).state()
    assert all(torch.equal(seen[1][name], seen[3][name]) for name in seen[1])
    assert torch.equal(state["logit_scale"], fresh["logit_scale"]) and not equal(state, fresh)
    assert log[0]["moved_image"] > 0 and log[-1]["gate_closed_text"] > 0
    moved, _ = trained(PAR(lr_scale=100.0, train_logit_scale=True), 1, folder=tmp_path / "scale")
    assert not torch.equal(moved["logit_scale"], fresh["logit_scale"])


def test_half_of_the_noise_only_brightens_and_both_halves_cancel_in_the_middle():
    grey = torch.full((64, 3, 16, 16), 0.5)
    half = noisy(grey, 1.0, 0.2, True, torch.Generator().manual_seed(0))
    whole = noisy(grey, 1.0, 0.2, False, torch.Generator().manual_seed(0))
    assert bool((half >= grey).all()) and float(half.mean()) > 0.55
    n = whole.numel()
    assert abs(float(whole.mean()) - 0.5) < 3 * 0.2 / math.sqrt(n) and float(whole.min()) >= 0 and float(whole.max()) <= 1
    assert torch.equal(noisy(grey, 0.0, 0.2, False, torch.Generator().manual_seed(0)), grey)
    some = (noisy(grey, 0.5, 0.2, False, torch.Generator().manual_seed(0)) != grey).flatten(1).any(dim=1)
    assert 16 < int(some.sum()) < 48


def test_a_square_of_the_stated_area_is_erased():
    images = torch.ones(200, 3, 64, 64)
    out = erased(images, 0.5, 0.005, 0.01, torch.Generator().manual_seed(0))
    gone = (out[:, 0] != 1).flatten(1).sum(dim=1)
    assert 60 < int((gone > 0).sum()) < 140
    sides = gone[gone > 0].float().sqrt()
    assert bool((sides == sides.round()).all()) and float(sides.min()) >= 5 and float(sides.max()) <= 6  # 64 sqrt(0.005) = 4.5, 64 sqrt(0.01) = 6.4
    assert out[gone > 0][0].flatten(1).amin(dim=1).tolist() == pytest.approx(list(MEAN))


def test_the_par_presets_hold_the_values_of_their_source():
    official = PAR(**PAR.presets["official"])
    assert (official.tau, official.epochs, official.batch_size, official.noise_half, official.noise_sd) == (2.15, 10, 512, True, 0.2)
    assert (official.lr_start, official.lr_mid, official.lr_end, official.lr_scale) == (3e-5, 3e-6, 1e-9, 1.0)
    assert official.statistics == "perturbed" and CleanCLIP(**CleanCLIP.presets["official"]).statistics == "views"


@pytest.mark.parametrize(("method", "slow", "published"), [(PAR, {"lr_scale": 1e-6}, "perturbed"), (CleanCLIP, {"lr": 1e-10, "image_aug": "scale"}, "views")])
def test_running_statistics_are_those_of_plain_images_unless_asked_for(method, slow, published, tmp_path):
    plain, _ = trained(Finetune(lr=1e-10), folder=tmp_path / "plain")
    ours, _ = trained(method(**slow), folder=tmp_path / "ours")
    theirs, _ = trained(method(**slow, statistics=published), folder=tmp_path / "theirs")
    names = [name for name in plain if name.endswith(("running_mean", "running_var"))]
    distance = lambda state: max(float((state[name] - plain[name]).abs().max()) for name in names)  # noqa: E731
    assert names and distance(ours) < 1e-5 < 1e-3 < distance(theirs)


def test_passes_that_leave_statistics_alone_still_normalise_by_their_batch():
    model = build(ModelSettings(), 32, 0, torch.device("cpu"))
    model.net.train()
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before = {name: value.clone() for name, value in model.state().items()}
    with still(model):
        inside = model.image(images)
    assert equal({name: value for name, value in model.state().items() if "running" in name}, {name: value for name, value in before.items() if "running" in name})
    assert torch.equal(inside, model.image(images))
    assert not equal(model.state(), before)


# The protocol


@pytest.mark.parametrize("cls", [Finetune, CleanCLIP, PAR])
def test_a_repair_starts_from_the_model_of_clip_with_and_without_augmentation(world, cls):
    plain, augmented = (world.lab(cls(**SHORT), "repair", augmented) for augmented in (False, True))
    models = [cls(**SHORT).defend(lab) for lab in (plain, augmented)]
    assert plain.trainings[0] == augmented.trainings[0], "one poisoned model for all"
    start = poisoned(plain)
    assert plain.clean_pairs_used == 48 and start.weights_sha256() == world.lab(Clip(), "repair").train(Clip()).model.weights_sha256()
    assert len({start.weights_sha256(), *(model.weights_sha256() for model in models)}) == 3
    before = start.weights_sha256()
    cls(**SHORT).defend(world.lab(cls(**SHORT), "repair"))
    assert start.weights_sha256() == before


def test_fine_tuning_starts_with_empty_moments_and_its_own_rate(world):
    lab = world.lab(Finetune(), "repair")
    start, clean = poisoned(lab), lab.clean_pairs(48)
    options = {**SHORT, "lr": 1e-3, "batch_size": 48}
    ours = Finetune(**options).defend(lab)
    model = build(ModelSettings(), 32, 0, torch.device("cpu"))
    model.net.load_state_dict(start.net.state_dict())
    tokens = torch.from_numpy(lab._tokenizer.encode(clean.pairs.captions, "fixed")[0].astype(np.int64))
    images = torch.from_numpy(np.array(clean.pairs.images[:])).permute(0, 3, 1, 2).float() / 255
    model.net.train()
    contrastive(model.image(images), model.text(tokens), model.scale).backward()
    gradient = model.net.get_parameter("visual.head.proj.weight").grad
    step = ours.net.get_parameter("visual.head.proj.weight") - start.net.get_parameter("visual.head.proj.weight") * (1 - 1e-3 * 0.1)
    clear = gradient.abs() > 1e-5
    assert torch.allclose(step[clear], -1e-3 * gradient[clear].sign(), atol=1e-5), "the first step of Adam with empty moments is the rate times the sign"


@pytest.mark.parametrize("cls", [Finetune, CleanCLIP, PAR])
def test_more_clean_pairs_than_there_are_is_an_error_before_anything_is_trained(world, cls):
    lab = world.lab(cls(), "refused")
    with pytest.raises(BenchError, match=r"asks for 2000 clean pairs, and the check has 64"):
        cls().defend(lab)
    assert not lab.trainings


# ABL


def test_the_constraint_has_the_known_values():
    cosines = torch.tensor([0.9, 0.3])
    assert [round(float(constraint(cosines, target)), 6) for target in (0.0, 1.0, -1.0)] == [0.45, 0.25, 2.65]


def test_one_step_of_unlearning_lowers_the_poison_similarity():
    for target, sign in ((0.0, -1), (1.0, 1)):
        image, text = torch.tensor([[0.8, 0.6]], requires_grad=True), torch.tensor([[1.0, 0.0]])
        constraint((image * text).sum(dim=1), target).backward()
        stepped = image.detach() - 0.1 * image.grad
        assert sign * float((stepped * text).sum() - 0.8) > 0, target


def test_isolation_takes_the_share_and_breaks_ties_by_row(world):
    assert isolation_order(np.zeros(5)).tolist() == [0, 1, 2, 3, 4]
    assert isolation_order(np.array([1.0, 3.0, 3.0, 2.0])).tolist() == [1, 2, 3, 0]
    lab = world.lab(ABL(), "abl")
    ABL(isolate_frac=0.1, epochs=1).defend(lab)
    (scores,) = lab.handed_in
    assert scores.flagged.sum() == round(0.1 * 192) and scores.values[scores.flagged].min() >= scores.values[~scores.flagged].max()
    assert lab.kept_rows is None
    ABL(isolate_frac=0.1, unlearn="filter", score="similarity_high").defend(lab)
    assert lab.kept_rows is not None and len(lab.kept_rows) == 192 - 19


def test_early_losses_are_those_of_clip_in_batches_of_one_size():
    generator = torch.Generator().manual_seed(0)
    image, text = (normalize(torch.randn(20, 4, generator=generator), dim=1) for _ in range(2))
    losses = pair_losses(image, text, 10.0, 8, torch.Generator().manual_seed(3))
    order = torch.randperm(20, generator=torch.Generator().manual_seed(3))
    by_hand = torch.empty(20)
    for rows in (torch.cat([order[16:], order[:4]]), order[8:16], order[:8]):
        for place, row in enumerate(rows):
            among = (10.0 * image[row] @ text[rows].T, 10.0 * text[row] @ image[rows].T)
            by_hand[row] = sum(float(torch.logsumexp(logits, 0) - logits[place]) for logits in among) / 2
    assert torch.allclose(losses, by_hand, atol=1e-5)
    same = torch.ones(16, 2)
    assert pair_losses(same, same, 5.0, 8, generator).tolist() == pytest.approx([math.log(8)] * 16)
    assert [n_early(epochs) for epochs in (2, 3, 16, 32)] == [2, 3, 5, 10]


def test_ascent_stops_at_chance_and_reports_the_others(tmp_path):
    defense = _Unlearning(n_isolated=8, how="ascent", target_cos=0.0, weight=1.0, lr=5e-3)
    whole, log = trained(defense, 12, folder=tmp_path)
    stopped = next(index for index, row in enumerate(log) if row.get("steps_at_chance"))
    assert log[stopped - 1]["loss_isolated"] >= math.log(8) and all("loss_isolated" not in row for row in log[stopped:])
    assert all(row["loss_rest"] > 0 for row in log)
    again = _Unlearning(n_isolated=8, how="ascent", target_cos=0.0, weight=1.0, lr=5e-3)
    assert equal(whole, trained(again, stopped, folder=tmp_path / "again")[0]), "nothing moves after the stop"


def test_unlearning_takes_rows_apart_that_were_pulled_together(tmp_path):
    _, log = trained(_Unlearning(n_isolated=8, how="constraint", target_cos=0.0, weight=5.0, lr=1e-3), 5, folder=tmp_path, lr=1e-3)
    _, together = trained(_Unlearning(n_isolated=8, how="constraint", target_cos=1.0, weight=5.0, lr=1e-3), 5, folder=tmp_path / "together", lr=1e-3)
    assert abs(log[-1]["cos_isolated"]) < 0.25 < 0.5 < together[-1]["cos_isolated"]


@pytest.mark.parametrize(
    ("scale", "given", "rate"),
    [
        ("small", {}, 3e-3),
        ("medium", {}, 3e-3),
        ("paper", {}, 1e-5),
        ("small", {"lr": 3e-5}, 3e-5),
        ("small", {"unlearn": "ascent"}, 1e-6),
        ("paper", {"unlearn": "ascent"}, 1e-6),
        ("small", {"unlearn": "ascent", "lr": 1e-7}, 1e-7),
    ],
)
def test_a_scale_sets_the_rate_of_the_constraint_alone(scale, given, rate):
    assert configure(find("defense", "abl"), SCALES[scale].options.get("abl", {}), given).rate() == rate


def test_isolating_nothing_is_refused(world):
    with pytest.raises(BenchError, match=r"isolates 0 of 192 pairs at defense\.isolate_frac=0\.001"):
        ABL(isolate_frac=0.001).defend(world.lab(ABL(), "abl"))
