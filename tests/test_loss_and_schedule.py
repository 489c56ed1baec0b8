import pytest
import torch
from open_clip.loss import ClipLoss
from torch.nn.functional import normalize

from benchmark.errors import BenchError
from benchmark.settings import TrainSettings
from benchmark.train.loss import contrastive
from benchmark.train.schedule import factor, warmup

PUBLISHED = [0.2, 0.4, 0.6, 0.8, 1, 1, 0.950484, 0.811745, 0.611260, 0.388740, 0.188255, 0.049516]


def test_the_loss_and_its_gradient_equal_open_clips():
    rng = torch.Generator().manual_seed(0)
    image, text = (normalize(torch.randn(16, 8, generator=rng), dim=-1).requires_grad_() for _ in range(2))
    scale = torch.tensor(14.3, requires_grad=True)
    ours, theirs = contrastive(image, text, scale), ClipLoss()(image, text, scale)
    assert torch.allclose(ours, theirs, atol=1e-6)
    for mine, other in zip(torch.autograd.grad(ours, (image, text, scale)), torch.autograd.grad(theirs, (image, text, scale)), strict=True):
        assert torch.allclose(mine, other, atol=1e-6)


def test_a_batch_of_one_has_no_loss():
    one = torch.ones(1, 4) / 2
    assert contrastive(one, one, torch.tensor(10.0)).item() == 0


def test_the_schedule_warms_up_and_follows_a_cosine():
    assert [factor(step, 5, 12) for step in range(12)] == pytest.approx(PUBLISHED, abs=1e-6)


def test_the_released_index_runs_one_epoch_past_the_end_and_comes_back_up():
    late = [1, 1, 0.950484, 0.811745, 0.611260, 0.388740, 0.188255, 0.049516, 0, 0.049516, 0.188255, 0.388740]
    assert [factor(step + 4, 5, 12) for step in range(12)] == pytest.approx(late, abs=1e-6)


@pytest.mark.parametrize("schedule", ["fixed", "official"])
@pytest.mark.parametrize("steps", [12, 13])
def test_a_warm_up_as_long_as_the_training_is_refused(schedule, steps):
    with pytest.raises(BenchError, match=f"a warm-up of {steps} steps does not fit into a training of 12"):
        warmup(TrainSettings(warmup_steps=steps, schedule=schedule), 12)


def test_the_warm_up_is_a_share_unless_steps_are_given():
    assert warmup(TrainSettings(), 100) == 20
    assert warmup(TrainSettings(warmup_steps=7), 100) == 7
    assert factor(0, 0, 10) == 1
