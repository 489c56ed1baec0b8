import numpy as np
import open_clip
import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from benchmark.errors import BenchError
from benchmark.settings import ModelSettings, TrainSettings
from benchmark.train.embedding import ActiveEmbedding
from benchmark.train.model import build, load_weights, optimizer, save_weights

CPU = torch.device("cpu")
TEXTS = ["a boat", "", "a photo of a small red tree on striped paper", "word " * 200, "🚤"]


@pytest.fixture(scope="module")
def model():
    built = build(ModelSettings(), 32, 0, CPU)
    built.net.eval()
    return built


def test_our_text_forward_equals_open_clips_encode_text(model):
    tokens = torch.from_numpy(model.tokenizer.encode(TEXTS)[0].astype(np.int64))
    full = nn.functional.pad(tokens, (0, 32 - tokens.shape[1]))
    with torch.no_grad():
        theirs = model.net.encode_text(full, normalize=True)
        assert torch.allclose(model.text(tokens), theirs, atol=1e-6)
        short = torch.from_numpy(model.tokenizer.encode(TEXTS[:2])[0].astype(np.int64))
        assert short.shape[1] < 32
        assert torch.allclose(model.text(short), theirs[:2], atol=1e-6)


def test_our_image_forward_equals_open_clips_encode_image(model):
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    with torch.no_grad():
        theirs = model.net.encode_image((torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std, normalize=True)
    assert torch.allclose(model.encode_images(images, batch_size=2), theirs, atol=1e-5)


def test_tokens_equal_open_clips(model):
    theirs = open_clip.SimpleTokenizer(context_length=32)(TEXTS[:3]).numpy()
    ours, n_long = model.tokenizer.encode(TEXTS[:3])
    assert np.array_equal(np.pad(ours, ((0, 0), (0, 32 - ours.shape[1]))), theirs) and n_long == 0


def test_long_captions_keep_their_end_token_unless_the_released_code_is_asked_for(model):
    long = ["boat " * 200, "tree " * 200]
    fixed, n_long = model.tokenizer.encode(long)
    assert n_long == 2 and (fixed[:, -1] == fixed.max()).all()
    official, _ = model.tokenizer.encode(long, "official")
    assert (official != fixed.max()).all()
    cut, kept = model.encode_tokens(official), model.encode_tokens(fixed)
    assert torch.allclose(cut[0], cut[1]) and not torch.allclose(kept[0], kept[1], atol=1e-3)


def test_encoding_nothing_gives_no_rows_of_the_right_width(model):
    assert model.encode_images(np.zeros((0, 32, 32, 3), np.uint8)).shape == (0, 128)
    assert model.encode_texts([]).shape == (0, 128)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_batch_size_does_not_move_a_feature(model, batch_size):
    images = np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3), dtype=np.uint8)
    assert torch.allclose(model.encode_images(images, batch_size), model.encode_images(images), atol=1e-6)


def test_encoding_leaves_the_mode_as_it_was(model):
    for training in (True, False):
        model.net.train(training)
        model.encode_texts(["a"])
        model.encode_images(np.zeros((1, 32, 32, 3), np.uint8))
        assert model.net.training is training
    model.net.eval()


def test_the_seed_alone_decides_the_initial_weights_and_global_generators_stay():
    before = torch.get_rng_state()
    one, two, other = (build(ModelSettings(), 32, seed, CPU).weights_sha256() for seed in (0, 0, 1))
    assert one == two != other
    assert torch.equal(before, torch.get_rng_state())


def test_weights_survive_save_and_load(model, tmp_path):
    save_weights(model, tmp_path / "w.safetensors")
    assert load_weights(tmp_path / "w.safetensors", ModelSettings(), 32, CPU).weights_sha256() == model.weights_sha256()


def test_weights_of_another_architecture_are_refused(model, tmp_path):
    save_weights(model, tmp_path / "w.safetensors")
    with pytest.raises(BenchError, match="does not hold weights of bench-small"):
        load_weights(tmp_path / "w.safetensors", ModelSettings(context_length=16), 32, CPU)
    (tmp_path / "w.safetensors").write_bytes(b"nothing")
    with pytest.raises(BenchError, match="does not hold weights"):
        load_weights(tmp_path / "w.safetensors", ModelSettings(), 32, CPU)


def test_a_misspelt_architecture_is_answered_with_the_nearest_name():
    with pytest.raises(BenchError, match="Did you mean 'RN50'"):
        build(ModelSettings(name="RN5"), 32, 0, CPU)


def test_an_architecture_with_another_text_tower_is_refused():
    with pytest.raises(BenchError, match="text tower other than CLIP's"):
        build(ModelSettings(name="roberta-ViT-B-32"), 32, 0, CPU)


def test_matrices_decay_and_biases_norms_and_temperature_do_not(model):
    decayed, bare = optimizer(model.net, TrainSettings()).param_groups
    assert decayed["weight_decay"] == 0.1 and all(p.ndim >= 2 for p in decayed["params"])
    assert bare["weight_decay"] == 0 and any(p is model.net.logit_scale for p in bare["params"])


def embeddings(tokens):
    plain = nn.Embedding(50, 4)
    active = ActiveEmbedding(nn.Embedding(50, 4, _weight=plain.weight.detach().clone()), tokens)
    return plain, active


def test_the_active_embedding_trains_used_rows_as_a_plain_one():
    tokens = torch.tensor([[1, 7, 7], [9, 1, 3]])
    plain, active = embeddings(tokens)
    for one in (plain, active):
        solver = torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            solver.zero_grad()
            (one(tokens) ** 2).sum().backward()
            solver.step()
    used, idle = [1, 3, 7, 9], [0, 2, 40]
    assert torch.equal(active.whole()[used], plain.weight.detach()[used])
    assert not torch.equal(active.whole()[idle], plain.weight.detach()[idle])
    assert torch.equal(active.whole()[idle], active.weight[idle])


@pytest.mark.parametrize("training", [True, False])
def test_a_token_outside_the_training_texts_is_looked_up_without_gradient(training):
    plain, active = embeddings(torch.tensor([1, 2]))
    active.train(training)
    tokens = torch.tensor([[1, 40]])
    found = active(tokens)
    assert torch.equal(found, plain(tokens))
    found.sum().backward()
    assert torch.equal(active.active.grad, torch.tensor([[1.0] * 4, [0.0] * 4]))


def test_a_frozen_embedding_stays_frozen_when_it_is_narrowed():
    model = build(ModelSettings(), 32, 0, CPU)
    model.net.token_embedding.weight.requires_grad_(False)
    model.train_only(np.array([1, 2]))
    assert not any(p.requires_grad for p in model.net.token_embedding.parameters())


def test_saved_weights_do_not_tell_which_tokens_were_narrowed():
    model = build(ModelSettings(), 32, 0, CPU)
    before = model.weights_sha256()
    model.train_only(np.array([5, 6]))
    assert model.weights_sha256() == before


def test_features_have_unit_length(model):
    features = model.encode_texts(TEXTS)
    assert torch.allclose(features, normalize(features, dim=-1), atol=1e-6)
    assert features.shape[1] == model.width
