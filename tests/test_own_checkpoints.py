"""Checkpoints of this program say what they are, notice a change, and are read by plain open_clip."""

import json
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmark.errors import BenchError
from benchmark.settings import ModelSettings
from benchmark.stages import file_sha256, seal
from benchmark.train import checkpoint_card
from benchmark.train.checkpoint_card import ABOUT, WEIGHTS, export_checkpoint, self_test
from benchmark.train.checkpoints import Ask, load_checkpoint
from benchmark.train.model import MEAN, STD, Model, build, save_weights

CPU = torch.device("cpu")
SMALL = Ask(model="bench-small")


@pytest.fixture(scope="module")
def model() -> Model:
    built = build(ModelSettings(), 32, 3, CPU)
    built.net.eval()
    return built


def exported(model: Model, folder: Path, **about: object) -> Path:
    return export_checkpoint(model, folder, {"role": "poisoned", "manifest_sha256": "ab12", **about})


def test_what_is_written_is_read_back_with_its_role_preprocessing_and_self_test(model, tmp_path):
    folder = exported(model, tmp_path / "final", defense="Clip")
    about = json.loads((folder / ABOUT).read_text())
    assert (about["role"], about["manifest_sha256"], about["preprocessing"]["side"], about["model"]) == ("poisoned", "ab12", 32, "bench-small")
    assert about["preprocessing"] == {"side": 32, "mean": list(MEAN), "std": list(STD), "interpolation": "bicubic", "geometry": "shorter side, centre crop", "source": "recorded"}
    assert about["tokenizer"] == {"name": "open_clip-simple", "context_length": 32}
    assert np.shape(about["self_test"]["images"]) == np.shape(about["self_test"]["texts"]) == (8, 128)
    for path in (folder, folder / WEIGHTS):
        loaded = load_checkpoint(path, CPU)
        assert (loaded.dialect, loaded.role, loaded.name, loaded.about) == ("own", "poisoned", "final", {"manifest_sha256": "ab12", "defense": "Clip"})
        assert loaded.model.weights_sha256() == model.weights_sha256()
        assert "self-test passed" in loaded.summary()
    assert not list(tmp_path.glob("*.part"))


def test_writing_over_a_folder_or_with_an_unknown_role_is_refused(model, tmp_path):
    exported(model, tmp_path / "final")
    with pytest.raises(BenchError, match="exists; name another folder"):
        exported(model, tmp_path / "final")
    (tmp_path / "file").write_text("")
    with pytest.raises(BenchError, match="cannot write to"):
        exported(model, tmp_path / "file" / "final")
    with pytest.raises(BenchError, match="expected a role among clean, poisoned, defended, unknown"):
        export_checkpoint(model, tmp_path / "other", {"role": "safe"})


def test_the_normalisation_of_a_model_survives(model, tmp_path):
    other = build(ModelSettings(), 32, 3, CPU)
    other.mean, other.std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    loaded = load_checkpoint(exported(other, tmp_path / "bare"), CPU)
    assert loaded.model.mean == (0.0, 0.0, 0.0)
    assert loaded.model.identity() == other.identity()


def edit(folder: Path, **changes: object) -> None:
    about = json.loads((folder / ABOUT).read_text())
    (folder / ABOUT).write_text(json.dumps({**about, "weights_sha256": file_sha256(folder / WEIGHTS), **changes}))


def test_swapped_weights_of_equal_shape_fail_the_self_test(model, tmp_path):
    folder = exported(model, tmp_path / "final")
    tensors = load_file(folder / WEIGHTS)
    first, second = "transformer.resblocks.0.ln_1.weight", "transformer.resblocks.0.ln_1.bias"
    tensors[first], tensors[second] = tensors[second], tensors[first]
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(BenchError, match=r"other bytes than checkpoint.json"):
        load_checkpoint(folder, CPU)
    edit(folder)
    with pytest.raises(BenchError, match="fails its self-test: features of fixed texts differ"):
        load_checkpoint(folder, CPU)


def test_another_preprocessing_than_the_one_it_was_written_with_fails_the_self_test(model, tmp_path):
    folder = exported(model, tmp_path / "final")
    edit(folder, preprocessing={"side": 32, "mean": [0, 0, 0], "std": [1, 1, 1]})
    with pytest.raises(BenchError, match="fails its self-test: features of fixed images differ"):
        load_checkpoint(folder, CPU)


@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        (Ask(model="RN50"), "is of model bench-small, and --model says RN50"),
        (Ask(side=64), "is of side 32, and --set data.side says 64"),
        (Ask(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)), r"is of mean 0\.48\S+, and --mean says 0,0,0"),
    ],
)
def test_what_is_written_beside_the_weights_is_not_overruled(ask, sentence, model, tmp_path):
    with pytest.raises(BenchError, match=sentence):
        load_checkpoint(exported(model, tmp_path / "final"), CPU, ask)


def test_a_description_that_is_broken_or_of_a_newer_version_is_named(model, tmp_path):
    folder = exported(model, tmp_path / "final")
    edit(folder, schema=99)
    with pytest.raises(BenchError, match="has schema 99, this version reads up to 1"):
        load_checkpoint(folder, CPU)
    edit(folder, schema=1, self_test={"images": 3, "texts": []})
    with pytest.raises(BenchError, match=r"self_test\.images"):
        load_checkpoint(folder, CPU)
    edit(folder, self_test={"images": [], "texts": []})
    with pytest.raises(BenchError, match="fails its self-test"):
        load_checkpoint(folder, CPU)


def test_the_self_test_is_in_full_precision_whatever_the_model_runs_in(model):
    half = build(ModelSettings(), 32, 3, CPU, "bf16")
    for ours, theirs in zip(self_test(half), self_test(model), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_the_patterns_of_the_self_test_are_eight_and_alike_at_every_side():
    small, large = checkpoint_card.patterns(32), checkpoint_card.patterns(224)
    assert small.shape == (8, 32, 32, 3)
    assert len({image.tobytes() for image in small}) == 8
    assert np.array_equal(large[:, ::7, ::7], small)


def test_our_files_load_in_plain_open_clip(model, tmp_path):
    folder = exported(model, tmp_path / "final")
    about = json.loads((folder / ABOUT).read_text())
    theirs = open_clip.CLIP(**about["model_cfg"])
    theirs.load_state_dict(load_file(folder / WEIGHTS), strict=True)
    theirs.eval()
    tokens = open_clip.SimpleTokenizer(context_length=32)(["a red boat"])
    with torch.no_grad():
        assert torch.allclose(theirs.encode_text(tokens, normalize=True), model.encode_texts(["a red boat"]), atol=1e-6)


def stage(folder: Path, model: Model, **facts: object) -> Path:
    """What a finished training leaves with --keep-snapshots."""
    folder.mkdir()
    for epoch in (1, 2):
        save_weights(model, folder / f"epoch-{epoch:03d}.safetensors")
    known = {"stage": "train", "model": ModelSettings().model_dump(), "side": 32, "train": {"precision": "bf16"}, "rows": "x", **facts}
    seal(folder, known)
    return folder


def test_a_snapshot_of_ours_says_itself_what_it_is(model, tmp_path):
    folder = stage(tmp_path / "stage", model)
    for path, epoch in ((folder, 2), (folder / "epoch-001.safetensors", 1)):
        loaded = load_checkpoint(path, CPU)
        assert (loaded.dialect, loaded.epoch, loaded.model.precision, loaded.preprocessing.source) == ("own snapshot", epoch, "bf16", "recorded")
        assert loaded.model.weights_sha256() == model.weights_sha256()
        assert loaded.training is not None
    with pytest.raises(BenchError, match="is of model bench-small, and --model says RN50"):
        load_checkpoint(folder, CPU, Ask(model="RN50"))


def test_a_snapshot_that_was_changed_since_is_refused_and_one_taken_elsewhere_needs_its_architecture(model, tmp_path):
    folder = stage(tmp_path / "stage", model)
    alone = shutil.copy(folder / "epoch-002.safetensors", tmp_path / "mine.safetensors")
    with pytest.raises(BenchError, match="name it with --model"):
        load_checkpoint(Path(alone), CPU)
    assert load_checkpoint(Path(alone), CPU, SMALL).dialect == "state_dict"
    save_weights(build(ModelSettings(), 32, 4, CPU), folder / "epoch-002.safetensors")
    with pytest.raises(BenchError, match="has other bytes than when it was written"):
        load_checkpoint(folder, CPU)
