"""Towers that recompute or are compiled train as plain ones do."""

import copy
import shutil

import numpy as np
import pytest
import torch

from benchmark.contract import Defense
from benchmark.errors import BenchError
from benchmark.progress import silent
from benchmark.settings import AugmentSettings, ModelSettings, RunSettings, TrainSettings
from benchmark.train import towers
from benchmark.train.loop import Budget, TrainingData, train
from benchmark.train.loss import contrastive
from benchmark.train.model import Model, assemble, build
from benchmark.train.views import TextViews
from defenses.clip import Clip

CPU = torch.device("cpu")
CAPTIONS = tuple(f"a photo of {word} number {index}" for index, word in enumerate(("boat", "tree", "star", "cup") * 4))
TEXT = {"context_length": 32, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
VISION = {
    "resnet": {"layers": [1, 2, 1, 1], "width": 16, "image_size": 64},
    "vit": {"layers": 4, "width": 64, "head_width": 32, "patch_size": 16, "image_size": 64},
}


def batch(side: int) -> tuple[torch.Tensor, list[str]]:
    return torch.rand(4, 3, side, side, generator=torch.Generator().manual_seed(0)), list(CAPTIONS[:4])


def step(model: Model) -> float:
    """Gradients and batch statistics of one step; the loss."""
    images, captions = batch(model.side)
    model.net.train()
    tokens = torch.from_numpy(model.tokenizer.encode(captions)[0].astype(np.int64))
    loss = contrastive(model.image(images), model.text(tokens), model.scale)
    torch.autograd.backward(loss)
    return float(loss.detach())


def bytes_kept(model: Model) -> int:
    """What autograd keeps between the two passes of one step, weights apart."""
    weights = {parameter.data_ptr() for parameter in model.net.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    images, captions = batch(model.side)
    model.net.train()
    tokens = torch.from_numpy(model.tokenizer.encode(captions)[0].astype(np.int64))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = contrastive(model.image(images), model.text(tokens), model.scale)
    del loss
    return sum(kept.values())


def trained(folder, **changes) -> tuple[Model, list[dict]]:
    model = build(ModelSettings(), 32, 0, CPU)
    images = np.random.default_rng(0).integers(0, 256, (len(CAPTIONS), 32, 32, 3), dtype=np.uint8)
    defense: Defense = Clip()
    data = TrainingData(images, model.tokenizer.encode(CAPTIONS)[0], TextViews(CAPTIONS, defense, None, model.tokenizer, "fixed", 0, True))
    budget = Budget(TrainSettings(epochs=2, batch_size=8, **changes), AugmentSettings(), False, 0)
    folder.mkdir()
    return model, train(model, defense, data, budget, folder, silent())


@pytest.mark.parametrize("tower", VISION)
def test_recomputing_gives_the_same_gradients_and_batch_statistics_from_less_memory(tower):
    plain, lean = (assemble(tower, {"embed_dim": 32, "vision_cfg": VISION[tower], "text_cfg": TEXT}, 0, CPU) for _ in range(2))
    towers.recompute(lean.net)
    towers.recompute(lean.net)  # a second training of the same network changes nothing
    assert bytes_kept(lean) < 0.5 * bytes_kept(plain)
    assert step(lean) == step(plain)
    for (key, mine), theirs in zip(lean.net.named_parameters(), plain.net.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad), key
    assert lean.state().keys() == plain.state().keys()
    assert all(torch.equal(value, plain.state()[key]) for key, value in lean.state().items())
    images, _ = batch(64)
    copied = copy.deepcopy(lean.net).eval()
    with torch.no_grad():
        assert torch.equal(copied.visual(images), plain.net.eval().visual(images))


def test_a_tower_without_residual_blocks_is_refused(tmp_path):
    with pytest.raises(BenchError, match="RN50 and ViT-B-32"):
        trained(tmp_path / "a", towers="recomputed")


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="torch.compile needs a C++ compiler")
def test_a_compiled_tower_trains_to_the_same_losses_and_resumes(tmp_path):
    plain, log = trained(tmp_path / "plain")
    quick, theirs = trained(tmp_path / "quick", towers="compiled")
    assert [row["loss_mean"] for row in theirs] == pytest.approx([row["loss_mean"] for row in log], rel=1e-3)
    assert plain.state().keys() == quick.state().keys()
    assert quick.net.visual._compiled_call_impl is not None
    assert copy.deepcopy(quick.net).visual._compiled_call_impl is None


def test_without_a_compiler_one_sentence_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BenchError, match=r"apt install g\+\+"):
        trained(tmp_path / "a", towers="compiled")


def test_plain_towers_leave_earlier_settings_as_they_were():
    assert "towers" not in TrainSettings().model_dump()
    assert "towers" not in RunSettings.model_fields["train"].annotation().model_dump(mode="json")
    assert TrainSettings(towers="compiled").model_dump()["towers"] == "compiled"
    assert TrainSettings(**TrainSettings(towers="compiled").model_dump()).towers == "compiled"
