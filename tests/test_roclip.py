"""RoCLIP against the published facts (docs/methods/roclip.md)."""

import math
import types

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.nn.functional import normalize

from benchmark.contract import Batch
from benchmark.errors import BenchError
from benchmark.progress import silent
from benchmark.settings import AugmentSettings, ModelSettings, TrainSettings
from benchmark.train.loop import Budget, TrainingData, opening, train
from benchmark.train.loss import contrastive
from benchmark.train.model import build
from benchmark.train.views import TextViews
from defenses._pool import enqueue, nearest, nearest_without_repeats
from defenses.clip import Clip
from defenses.roclip import RoCLIP

FIVE = [[1, 2], [3, 4], [5, 6], [7, 8], [9, 10]]


def slots(size, wrap, batches):
    pool, pointer, seen = torch.zeros(size, 1), 0, []
    for batch in batches:
        pointer = enqueue(pool, pointer, torch.tensor(batch, dtype=torch.float32).view(-1, 1), wrap)
        seen.append(([int(value) for value in pool], pointer))
    return seen


def test_the_dropping_pool_loses_what_does_not_fit():
    seen = slots(5, "drop", FIVE)
    assert [content for content, _ in seen] == [[1, 2, 0, 0, 0], [1, 2, 3, 4, 0], [1, 2, 3, 4, 5], [7, 8, 3, 4, 5], [7, 8, 9, 10, 5]]
    assert seen[2][1] == 0
    assert slots(4, "drop", FIVE[:2])[-1] == ([1, 2, 3, 4], 0)
    assert slots(3, "drop", [[1, 2, 3, 4, 5]])[-1] == ([1, 2, 3], 0)


def test_the_ring_pool_loses_nothing():
    seen = slots(5, "ring", FIVE)
    assert [content for content, _ in seen] == [[1, 2, 0, 0, 0], [1, 2, 3, 4, 0], [6, 2, 3, 4, 5], [6, 7, 8, 4, 5], [6, 7, 8, 9, 10]]
    assert [pointer for _, pointer in seen] == [2, 4, 1, 3, 0]
    assert set(slots(3, "ring", [[1, 2, 3, 4, 5]])[-1][0]) == {3, 4, 5}


def test_the_search_is_by_cosine_and_the_stored_entry_comes_back():
    pool = torch.tensor([[3.0, 0.0], [0.6, 0.8]])
    assert pool[nearest(torch.tensor([[1.0, 0.0]]), pool)].tolist() == [[3.0, 0.0]]
    assert nearest(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0], [1.0, 0.0]])).tolist() == [0]


def test_the_order_of_the_slots_does_not_matter():
    rng = torch.Generator().manual_seed(0)
    pool, queries, order = torch.randn(9, 4, generator=rng), torch.randn(5, 4, generator=rng), torch.randperm(9, generator=rng)
    assert torch.equal(pool[nearest(queries, pool)], pool[order][nearest(queries, pool[order])])


def test_images_without_repeats_take_their_next_best_entry():
    pool = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    chosen = nearest_without_repeats(torch.tensor([[0.99, 0.1], [1.0, 0.0]]), pool)
    assert chosen.tolist() == [1, 0]


def fake_model(image, text, scale=10.0):
    """Features that are given, not computed."""
    return types.SimpleNamespace(
        image=lambda images: image,
        text=lambda tokens: text,
        scale=torch.tensor(scale),
        width=image.shape[1],
        device=torch.device("cpu"),
        tokenizer=types.SimpleNamespace(context_length=8),
    )


def fake_now(n_rows=2, batch_size=2):
    model = build_once()
    now = opening(
        model,
        TrainingData(np.zeros((n_rows, 32, 32, 3), np.uint8), np.zeros((n_rows, 2), np.uint16), None),
        Budget(TrainSettings(batch_size=batch_size), AugmentSettings(), False, 0),
    )
    now.begin(2)
    return now


_BUILT = []


def build_once():
    if not _BUILT:
        _BUILT.append(build(ModelSettings(), 32, 0, torch.device("cpu")))
    return _BUILT[0]


def batch_of(n):
    return Batch(torch.zeros(n, 3, 2, 2), torch.zeros(n, 3, 2, 2), torch.zeros(1, n, 2, dtype=torch.int64), torch.arange(n))


def matched(image, pool, text=None, **options):
    defense = RoCLIP(pool_size=len(pool), pool_fraction=None, **options)
    now, n = fake_now(), len(image)
    model = fake_model(image, image if text is None else text)
    defense._open_pool(model, now)
    defense.state["pool"].copy_(pool)
    defense.state["count"] = len(pool)
    return defense, defense.matched_loss(model, batch_of(n), now), now


EYE = torch.eye(2)
POOL = torch.tensor([[0.6, 0.8], [1.0, 0.0], [0.0, -1.0]])


def test_the_loss_of_two_matches_has_the_known_value():
    _, loss, now = matched(EYE, POOL)
    assert loss.item() == pytest.approx(0.0363647, abs=1e-6)
    assert now.counts == {"match_steps": 1}


def test_two_images_that_pick_one_entry_cannot_be_told_apart():
    both = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    entries = both[nearest(EYE, torch.tensor([[1.0, 0.0], [0.0, -1.0]]))]
    logits = 10 * EYE @ torch.tensor([[1.0, 0.0], [1.0, 0.0]]).T
    labels = torch.arange(2)
    assert entries.shape == (2, 2)
    assert torch.nn.functional.cross_entropy(logits, labels).item() == pytest.approx(math.log(2), abs=1e-6)
    assert torch.nn.functional.cross_entropy(logits.T, labels).item() == pytest.approx(5.000045, abs=1e-5)
    _, loss, _ = matched(EYE, torch.tensor([[1.0, 0.0], [1.0, -0.01]]))
    assert loss.item() == pytest.approx((math.log(2) + 5.000045) / 2, abs=1e-4)


def test_the_pool_is_searched_before_it_is_filled():
    pool = torch.tensor([[0.6, 0.8], [0.8, 0.6]])
    defense, loss, _ = matched(EYE, pool, text=EYE)
    expected = contrastive(EYE, pool[[1, 0]], torch.tensor(10.0))
    assert torch.allclose(loss, expected)
    assert torch.equal(defense.state["pool"], EYE) and defense.state["pointer"] == 0


def test_an_image_never_meets_its_own_caption_if_so_asked():
    pool = EYE.clone()
    for excluded in (False, True):
        defense = RoCLIP(pool_size=2, pool_fraction=None, exclude_own=excluded)
        now, model = fake_now(), fake_model(EYE, EYE)
        defense._open_pool(model, now)
        defense.state.update(count=2, pool_rows=torch.arange(2))
        defense.state["pool"].copy_(pool)
        defense.matched_loss(model, batch_of(2), now)
        assert now.sums["match_own_frac"][0].item() == (0 if excluded else 1)


def test_a_pool_that_is_not_full_gives_the_clip_loss_bit_for_bit():
    defense = RoCLIP(pool_size=4, pool_fraction=None)
    now, text = fake_now(), normalize(torch.tensor([[0.9, 0.1], [0.2, 0.7]]), dim=-1)
    model = fake_model(EYE, text)
    losses = [defense.matched_loss(model, batch_of(2), now) for _ in range(2)]
    assert all(torch.equal(loss, contrastive(EYE, text, model.scale)) for loss in losses)
    assert now.counts == {"fill_steps": 2} and defense.state["count"] == 4
    defense.matched_loss(model, batch_of(2), now)
    assert now.counts["match_steps"] == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"every": 1}, [1, 2, 3, 4, 5, 6, 7]), ({"every": 2}, [2, 4, 6]), ({"every": 3}, [3, 6]), ({"every": 8}, []), ({"every": 2, "first_matched_epoch": 5}, [6])],
)
def test_every_kth_epoch_is_matched(options, expected):
    assert [epoch for epoch in range(1, 8) if RoCLIP(**options).is_matched(epoch)] == expected


def test_the_official_preset_starts_from_noise_of_length_about_the_root_of_the_width():
    defense = RoCLIP(**RoCLIP.presets["official"])
    now = fake_now()
    defense._open_pool(types.SimpleNamespace(width=1024, device="cpu"), now)
    assert defense.state["pool"].shape == (21845, 1024)
    assert defense.state["pool"].norm(dim=1).mean().item() == pytest.approx(31.99, abs=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool_fraction": None}, "one of pool_fraction and pool_size"),
        ({"match_while_filling": True}, "empty pool cannot be matched"),
        ({"every": 0}, "greater than or equal to 1"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        RoCLIP(**options)


N, BATCH = 32, 8
CAPTIONS = tuple(f"a photo of {word} {index}" for index, word in enumerate(("boat", "tree", "star", "cup") * 8))


def setup(defense):
    model = build(ModelSettings(), 32, 0, torch.device("cpu"))
    images = np.random.default_rng(0).integers(0, 256, (N, 32, 32, 3), dtype=np.uint8)
    return model, TrainingData(images, model.tokenizer.encode(CAPTIONS)[0], TextViews(CAPTIONS, defense, None, model.tokenizer, "fixed", 0))


def trained(defense, folder, epochs):
    folder.mkdir()
    model, data = setup(defense)
    log = train(model, defense, data, Budget(TrainSettings(epochs=epochs, batch_size=BATCH), AugmentSettings(), False, 0), folder, silent())
    return model.state(), log


def test_a_period_longer_than_the_training_is_plain_clip(tmp_path):
    plain, _ = trained(Clip(), tmp_path / "clip", 2)
    ours, _ = trained(RoCLIP(every=9), tmp_path / "roclip", 2)
    assert all(torch.equal(plain[name], ours[name]) for name in plain)


def test_clip_epochs_leave_the_pool_alone_unless_asked(tmp_path):
    pools = {}

    class Watched(RoCLIP):
        def plan(self, epoch, now):
            pools.setdefault(self.pool_update, {})[epoch] = (self.state["pool"].clone(), self.state["pointer"]) if "pool" in self.state else None
            return super().plan(epoch, now)

    for update in ("matched", "all"):
        trained(Watched(pool_size=12, pool_fraction=None, pool_update=update), tmp_path / update, 4)
    assert pools["matched"][2] is None and pools["all"][2] is not None
    before, after = pools["matched"][3], pools["matched"][4]
    assert torch.equal(before[0], after[0]) and before[1] == after[1]
    assert not torch.equal(pools["all"][3][0], pools["all"][4][0])


def test_the_log_tells_the_phases_and_the_steps_apart(tmp_path):
    _, log = trained(RoCLIP(pool_size=24, pool_fraction=None), tmp_path / "a", 4)
    assert [row["phase"] for row in log] == ["clip", "fill", "clip", "match"]
    assert (log[1]["fill_steps"], log[1]["match_steps"], log[3]["match_steps"]) == (3, 1, 4)
    assert 0 < log[3]["match_unique_frac"] <= 1 and log[3]["match_noise_frac"] == 0


def test_a_matched_step_gives_the_text_tower_exactly_no_gradient_and_still_moves_it(tmp_path):
    seen = {}

    class Watched(RoCLIP):
        def matched_loss(self, model, batch, now):
            loss = super().matched_loss(model, batch, now)
            if now.counts.get("match_steps") and "gradients" not in seen:
                names = [name for name, p in model.net.named_parameters() if p.requires_grad]
                parameters = [model.net.get_parameter(name) for name in names]
                given = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
                seen["gradients"] = {name: 0.0 if g is None else float(g.abs().max()) for name, g in zip(names, given, strict=True)}
                seen["none"] = [name for name, p in zip(names, parameters, strict=True) if p.grad is None]
                seen["before"] = model.net.get_parameter("text_projection").detach().clone()
            elif "before" in seen and "after" not in seen:
                seen["after"] = model.net.get_parameter("text_projection").detach().clone()
            return loss

    trained(Watched(pool_size=8, pool_fraction=None), tmp_path / "a", 2)
    image = {name for name in seen["gradients"] if name.startswith("visual.")} | {"logit_scale"}
    assert seen["none"] == []
    assert all((seen["gradients"][name] > 0) == (name in image) for name in seen["gradients"])
    assert not torch.equal(seen["before"], seen["after"])


def test_both_towers_get_gradient_in_a_clip_step():
    model, data = setup(RoCLIP())
    model.net.train()
    images = torch.from_numpy(data.images[:8]).permute(0, 3, 1, 2) / 255
    tokens = torch.from_numpy(data.plain_tokens[:8].astype(np.int64))[None]
    RoCLIP().loss(model, Batch(images, images, tokens, torch.arange(8)), opening(model, data, Budget(TrainSettings(batch_size=8), AugmentSettings(), False, 0))).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for name, p in model.net.named_parameters() if name not in ("transformer.resblocks.0.attn.in_proj_bias",))


def test_a_pool_that_cannot_fill_is_refused_and_a_large_one_warned_of(tmp_path):
    with pytest.raises(BenchError, match="a pool of 40 captions cannot fill up within one epoch of 32 pairs"):
        trained(RoCLIP(pool_size=40, pool_fraction=None), tmp_path / "a", 2)
    _, log = trained(RoCLIP(pool_size=24, pool_fraction=None), tmp_path / "b", 2)
    assert any("more than half of the first matched epoch" in line for line in log[0]["warnings"])
    _, log = trained(RoCLIP(pool_size=8, pool_fraction=None, pool_init="noise_unit", match_while_filling=True), tmp_path / "c", 2)
    assert any("noise takes part in more than a fifth" in line for line in log[0]["warnings"])
    assert log[1]["match_noise_frac"] > 0
