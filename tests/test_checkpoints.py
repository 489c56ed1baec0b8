"""Checkpoints of every known writer are read strictly and safely."""

import json
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmark.errors import BenchError
from benchmark.settings import ModelSettings
from benchmark.train import checkpoints
from benchmark.train.checkpoints import Ask, load_checkpoint, load_pretrained
from benchmark.train.model import MEAN, STD, Model, assemble, build
from benchmark.train.weights import read_weights

CPU = torch.device("cpu")
TINY_RN = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
SMALL = Ask(model="bench-small")


@pytest.fixture(scope="module")
def model() -> Model:
    built = build(ModelSettings(), 32, 3, CPU)
    built.net.eval()
    return built


@pytest.fixture(scope="module")
def state(model: Model) -> dict[str, torch.Tensor]:
    return model.state()


@pytest.fixture(scope="module")
def resnet() -> Model:
    """A small model of the tower that CyCLIP trains, with its activation."""
    built = assemble("tiny", {**TINY_RN, "quick_gelu": True}, 0, CPU)
    built.net.eval()
    return built


def trained(state: dict[str, torch.Tensor], **more: object) -> dict[str, object]:
    """What a training loop saves: AdamW's state too, with a NumPy learning rate as a cosine schedule leaves it."""
    weight = torch.nn.Parameter(torch.zeros(2))
    adam = torch.optim.AdamW([weight], lr=1.0)
    weight.sum().backward()
    adam.step()
    for group in adam.param_groups:
        group["lr"] = 0.5 * (1 + np.cos(np.float64(1.0)))
        group["initial_lr"] = np.float32(1e-3)
    return {"epoch": 30, "name": "a-run", "state_dict": state, "optimizer": adam.state_dict(), **more}


def prefixed(state: dict[str, torch.Tensor], *prefixes: str) -> dict[str, torch.Tensor]:
    return {"".join(prefixes) + name: value for name, value in state.items()}


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def config_file(folder: Path, content: object = TINY_RN) -> str:
    (folder / "tiny.json").write_text(json.dumps(content))
    return str(folder / "tiny.json")


WRITERS = {
    "weights.pt": (lambda state: state, "auto", "state_dict"),
    "model_state_dict": (lambda state: state, "auto", "state_dict"),
    "weights.bin": (lambda state: {"state_dict": state}, "auto", "state_dict"),
    "epoch_1.pt": (lambda state: trained(state, scaler={"scale": 65536.0}), "auto", "open_clip_train"),
    "epoch_2.pt": (lambda state: trained(prefixed(state, "module.")), "open_clip", "open_clip_train"),
    "epoch_3.pt": (lambda state: trained(prefixed(state, "_orig_mod."), scaler={}), "auto", "open_clip_train"),
    "epoch_4.pt": (lambda state: trained(prefixed(state, "module.", "_orig_mod."), scaler={}), "auto", "open_clip_train"),
    "epoch_5.pt": (lambda state: trained(prefixed(state, "_orig_mod.", "module."), scaler={}), "auto", "open_clip_train"),
    "half.pt": (lambda state: {name: value.half() if value.is_floating_point() else value for name, value in state.items()}, "auto", "state_dict"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_checkpoint_of_each_writer_is_the_model_it_was_saved_from(name, model, state, tmp_path):
    make, writer, recorded = WRITERS[name]
    loaded = load_checkpoint(saved(tmp_path / name, make(state)), CPU, Ask(model="bench-small", writer=writer))
    assert loaded.dialect == recorded
    assert not loaded.model.net.training
    if name == "half.pt":
        assert all(value.dtype == torch.float32 for value in loaded.model.state().values() if value.is_floating_point())
        assert torch.allclose(loaded.model.encode_texts(["a boat"]), model.encode_texts(["a boat"]), atol=1e-2)
    else:
        assert loaded.model.weights_sha256() == model.weights_sha256()
        assert loaded.epoch == (30 if name.startswith("epoch") else None)


def test_a_safetensors_file_of_open_clip_is_read_and_what_it_does_not_say_is_marked_as_assumed(model, state, tmp_path):
    save_file(state, tmp_path / "open_clip_model.safetensors")
    loaded = load_checkpoint(tmp_path / "open_clip_model.safetensors", CPU, SMALL)
    assert loaded.model.weights_sha256() == loaded.model.identity() == model.weights_sha256()
    assert loaded.preprocessing.source == "assumed"
    assert "assumed" in loaded.notes[0]
    assert "bench-small" in loaded.summary()
    assert model.weights_sha256()[:12] in loaded.summary()


def test_a_checkpoint_of_the_cyclip_family_goes_into_the_quick_gelu_configuration(resnet, tmp_path):
    path = saved(tmp_path / "epoch.best.pt", trained(prefixed(resnet.state(), "module.")))
    config = config_file(tmp_path)
    with pytest.raises(BenchError, match=r"--writer open_clip, or --writer cyclip \(quick GELU"):
        load_checkpoint(path, CPU, Ask(model=config))
    loaded = load_checkpoint(path, CPU, Ask(model=config, writer="cyclip"))
    assert (loaded.dialect, loaded.epoch, loaded.preprocessing.side) == ("cyclip", 30, 64)
    assert loaded.model.name.startswith("tiny@")
    assert loaded.model.name.endswith("-quickgelu")
    assert torch.equal(loaded.model.encode_texts(["a boat"]), resnet.encode_texts(["a boat"]))
    other = load_checkpoint(path, CPU, Ask(model=config, writer="open_clip"))
    assert not torch.allclose(other.model.encode_texts(["a boat"]), resnet.encode_texts(["a boat"]), atol=1e-3)
    said = load_checkpoint(path, CPU, Ask(model=config_file(tmp_path, {**TINY_RN, "quick_gelu": True})))
    assert torch.equal(said.model.encode_texts(["a boat"]), resnet.encode_texts(["a boat"]))


def test_numpy_scalars_under_their_old_name_are_read_too(state, tmp_path):
    new, old = saved(tmp_path / "new.pt", trained(state, scaler={})), tmp_path / "old.pt"
    with zipfile.ZipFile(new) as read, zipfile.ZipFile(old, "w", zipfile.ZIP_STORED) as written:
        renamed = 0
        for entry in read.infolist():
            content = read.read(entry)
            if entry.filename.endswith("data.pkl"):
                renamed = content.count(b"numpy._core.multiarray\n")
                content = content.replace(b"numpy._core.multiarray\n", b"numpy.core.multiarray\n")
            written.writestr(entry.filename, content)
    assert renamed
    assert load_checkpoint(old, CPU, SMALL).dialect == "open_clip_train"


def test_what_is_allowed_for_one_load_is_allowed_for_that_load_alone(state, tmp_path):
    before = set(torch.serialization.get_safe_globals())
    path = saved(tmp_path / "epoch_1.pt", trained(state, scaler={}))
    load_checkpoint(path, CPU, SMALL)
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


class Bomb:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.canary), "w")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["top", "state", "optimizer"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(zipped, place, state, tmp_path):
    bomb = Bomb(tmp_path / "canary")
    content = {"top": bomb, "state": {"state_dict": {**state, "visual.bomb": bomb}}, "optimizer": trained(state, scaler=bomb)}[place]
    torch.save(content, tmp_path / "epoch_1.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(BenchError, match=r"holds \S*open, which could run code and is not loaded.*save \{'state_dict'"):
        load_checkpoint(tmp_path / "epoch_1.pt", CPU, SMALL)
    (tmp_path / "plain").write_bytes(pickle.dumps(bomb))
    with pytest.raises(BenchError):
        load_checkpoint(tmp_path / "plain", CPU, SMALL)
    assert not (tmp_path / "canary").exists()


def test_a_whole_pickled_model_is_refused(model, tmp_path):
    with pytest.raises(BenchError, match="which could run code"):
        load_checkpoint(saved(tmp_path / "model.pt", model.net), CPU, SMALL)


def test_a_torchscript_program_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "RN50.pt", "w") as archive:
        archive.writestr("RN50/constants.pkl", b"")
    with pytest.raises(BenchError, match="is a TorchScript program"):
        load_checkpoint(tmp_path / "RN50.pt", CPU, SMALL)


def test_missing_unexpected_and_misshapen_tensors_are_listed_ten_at_most(state, tmp_path):
    missing = dict(list(state.items())[12:])
    missing["logit_scale"] = torch.zeros(2)
    missing |= {f"extra.{index:02d}": torch.zeros(1) for index in range(11)}
    with pytest.raises(BenchError) as caught:
        load_checkpoint(saved(tmp_path / "w.pt", missing), CPU, SMALL)
    message = str(caught.value)
    assert "w.pt does not hold weights of bench-small at 32 px and 32 tokens" in message
    gone = len(set(state) - set(missing))
    assert f"{gone} missing (" in message
    assert "11 unexpected (extra.00, " in message
    assert "extra.09 and 1 more" in message
    assert "extra.10" not in message
    assert "1 of another shape (logit_scale (2) where () is expected)" in message


def test_one_missing_key_is_an_error(state, tmp_path):
    with pytest.raises(BenchError, match=r"1 missing \(ln_final.bias\)"):
        load_checkpoint(saved(tmp_path / "w.pt", {name: value for name, value in state.items() if name != "ln_final.bias"}), CPU, SMALL)


def test_a_prefix_that_not_all_names_have_is_no_prefix(state, tmp_path):
    mixed = {**prefixed(state, "module."), "extra": torch.zeros(1)}
    with pytest.raises(BenchError, match=r"missing.*unexpected"):
        load_checkpoint(saved(tmp_path / "w.pt", mixed), CPU, SMALL)


def test_another_context_length_or_side_is_an_error_with_its_remedy(resnet, model, state, tmp_path):
    path = saved(tmp_path / "w.pt", state)
    with pytest.raises(BenchError, match=r"positional_embedding \(32, 128\) where \(16, 128\).*--set model.context_length"):
        load_checkpoint(path, CPU, Ask(model="bench-small", context_length=16))
    other = saved(tmp_path / "rn.pt", resnet.state())
    with pytest.raises(BenchError, match=r"visual.attnpool.positional_embedding \(5, 256\).*Perhaps it is the image side, with --set data.side=N\."):
        load_checkpoint(other, CPU, Ask(model=config_file(tmp_path), side=96))


def test_names_from_the_file_cannot_write_to_the_terminal(state, tmp_path):
    with pytest.raises(BenchError) as caught:
        load_checkpoint(saved(tmp_path / "w.pt", {**state, "a\x1b[31m\u202eb": torch.zeros(1)}), CPU, SMALL)
    assert "\x1b" not in str(caught.value)
    assert "\u202e" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({}, "holds no weights: it is empty"),
        ([torch.zeros(1)], "holds a list and not weights by name"),
        ({"epoch": 3, "weights": {}}, "holds no weights: epoch, weights"),
        ({"logit_scale": torch.tensor(float("nan"))}, "not finite, in logit_scale"),
    ],
)
def test_a_file_without_weights_says_what_it_holds(content, sentence, tmp_path):
    with pytest.raises(BenchError, match=sentence):
        load_checkpoint(saved(tmp_path / "w.pt", content), CPU, SMALL)


def test_a_broken_missing_or_unknown_file_is_one_sentence(state, tmp_path):
    path = saved(tmp_path / "w.pt", state)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(BenchError, match=r"is not a whole file of torch\.save"):
        load_checkpoint(path, CPU, SMALL)
    (tmp_path / "w.txt").write_text("hello")
    with pytest.raises(BenchError, match="is neither a safetensors file nor one of"):
        load_checkpoint(tmp_path / "w.txt", CPU, SMALL)
    with pytest.raises(BenchError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "nowhere.pt", CPU, SMALL)
    with pytest.raises(BenchError, match=r"is a folder without weights\.safetensors"):
        load_checkpoint(tmp_path, CPU, SMALL)


def test_a_file_that_does_not_say_its_architecture_needs_it_and_a_misspelt_one_gets_the_nearest(state, tmp_path):
    path = saved(tmp_path / "w.pt", state)
    with pytest.raises(BenchError, match="name it with --model"):
        load_checkpoint(path, CPU)
    with pytest.raises(BenchError, match="Did you mean 'RN50'"):
        load_checkpoint(path, CPU, Ask(model="RN5"))
    with pytest.raises(BenchError, match="text tower other than CLIP's"):
        load_checkpoint(path, CPU, Ask(model="roberta-ViT-B-32"))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"embed_dim": None}, "embed_dim is missing"),
        ({"custom_text": True}, "text tower other than CLIP's"),
        ({"multimodal_cfg": {}}, "asks for multimodal_cfg"),
        ({"text_cfg": {**TINY_RN["text_cfg"], "hf_tokenizer_name": "x"}}, "asks for hf_tokenizer_name"),
        ({"text_cfg": {**TINY_RN["text_cfg"], "vocab_size": 32000}}, "vocabulary of 32000 tokens"),
        ({"vision_cfg": {"timm_model_name": "hf-hub:a/b", "image_size": 64}}, "is no plain name of a timm architecture"),
        ({"vision_cfg": {"timm_model_name": "no_such_tower", "image_size": 64}}, "open_clip cannot build"),
        ({"vision_cfg": {**TINY_RN["vision_cfg"], "image_size": [64, 32]}}, "image_size must be one number"),
    ],
)
def test_a_configuration_that_is_no_plain_clip_is_refused(change, sentence, state, tmp_path):
    path = saved(tmp_path / "w.pt", state)
    with pytest.raises(BenchError, match=sentence):
        load_checkpoint(path, CPU, Ask(model=config_file(tmp_path, {**TINY_RN, **change})))


def test_a_configuration_that_is_no_json_or_says_a_thing_twice_is_refused(state, tmp_path):
    path, config = saved(tmp_path / "w.pt", state), tmp_path / "tiny.json"
    for text, sentence in (("{", "not valid JSON"), ('{"embed_dim": 1, "embed_dim": 2}', "a key stands twice"), ("[]", "no JSON object")):
        config.write_text(text)
        with pytest.raises(BenchError, match=sentence):
            load_checkpoint(path, CPU, Ask(model=str(config)))
    with pytest.raises(BenchError, match="cannot read"):
        load_checkpoint(path, CPU, Ask(model=str(tmp_path / "none.json")))


def test_a_temperature_that_is_no_logarithm_is_refused_unless_it_is_said_to_be_none(model, state, tmp_path):
    path = saved(tmp_path / "w.pt", {**state, "logit_scale": state["logit_scale"].exp()})
    with pytest.raises(BenchError, match=r"logit_scale 14\.28.*--logit-scale-is-exp"):
        load_checkpoint(path, CPU, SMALL)
    loaded = load_checkpoint(path, CPU, Ask(model="bench-small", exponential=True))
    assert torch.allclose(loaded.model.scale, model.scale)


def test_what_no_weight_tells_is_part_of_a_models_identity(resnet):
    plain = replace(resnet, config={**resnet.config, "quick_gelu": False})
    heads = replace(resnet, config={**resnet.config, "vision_cfg": {**resnet.config["vision_cfg"], "head_width": 8}})
    assert len({one.weights_sha256() for one in (resnet, plain, heads)}) == 1
    assert len({one.identity() for one in (resnet, plain, heads)}) == 3


def test_a_model_trained_without_normalisation_is_given_images_as_they_are(model, state, tmp_path):
    path = saved(tmp_path / "model_state_dict", state)
    bare = load_checkpoint(path, CPU, Ask(model="bench-small", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)))
    assert bare.preprocessing.source == "given"
    assert bare.notes == ()
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    as_if = model.image((torch.from_numpy(images).permute(0, 3, 1, 2) / 255) * std + mean)
    assert torch.allclose(bare.model.encode_images(images), as_if.detach(), atol=1e-5)
    assert bare.model.weights_sha256() == model.weights_sha256()
    assert bare.model.identity() != model.identity(), "features of the one must not be taken for the other's"
    with pytest.raises(BenchError, match="--mean and --std together"):
        load_checkpoint(path, CPU, Ask(model="bench-small", mean=(0.0, 0.0, 0.0)))
    with pytest.raises(BenchError, match="must be above 0"):
        load_checkpoint(path, CPU, Ask(model="bench-small", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 0.0)))


def test_preprocessing_is_taken_from_the_configuration_where_it_is_written(resnet, tmp_path):
    path = saved(tmp_path / "w.pt", resnet.state())
    wrapped = {"model_cfg": {**TINY_RN, "quick_gelu": True}, "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bilinear"}}
    loaded = load_checkpoint(path, CPU, Ask(model=config_file(tmp_path, wrapped)))
    assert (loaded.preprocessing.mean, loaded.preprocessing.source) == ((0.5, 0.5, 0.5), "config")
    assert loaded.model.mean == (0.5, 0.5, 0.5)
    assert "bilinear" in loaded.notes[0]


def test_pretrained_weights_are_taken_from_the_cache_and_never_fetched(resnet, tmp_path, monkeypatch):
    ask = Ask(model="RN50-quickgelu")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repository, file: None)
    with pytest.raises(BenchError, match=r"are not cached on this machine.*downloads nothing"):
        load_pretrained("cc12m", CPU, ask)
    with pytest.raises(BenchError, match="Did you mean 'cc12m'"):
        load_pretrained("cc12", CPU, ask)
    with pytest.raises(BenchError, match="use --model RN50-quickgelu"):
        load_pretrained("cc12m", CPU, Ask(model="RN50"))
    with pytest.raises(BenchError, match="needs --model"):
        load_pretrained("cc12m", CPU, Ask())
    with pytest.raises(BenchError, match="knows no pretrained weights of 'bench-small'"):
        load_pretrained("cc12m", CPU, SMALL)

    asked = []
    save_file(resnet.state(), tmp_path / "cached.safetensors")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repository, file: asked.append((repository, file)) or str(tmp_path / "cached.safetensors"))
    monkeypatch.setattr(checkpoints, "configuration", lambda name: {**TINY_RN, "quick_gelu": True})
    loaded = load_pretrained("cc12m", CPU, ask)
    assert asked == [("timm/resnet50_clip.cc12m", "open_clip_model.safetensors")]
    assert (loaded.dialect, loaded.name, loaded.preprocessing.source) == ("pretrained", "RN50-quickgelu-cc12m", "pretrained")
    assert loaded.model.weights_sha256() == resnet.weights_sha256()


def test_reading_moves_no_global_generator(state, tmp_path):
    path = saved(tmp_path / "w.pt", state)
    before = torch.get_rng_state()
    load_checkpoint(path, CPU, SMALL)
    assert torch.equal(before, torch.get_rng_state())


def test_a_parameter_is_a_tensor_and_an_epoch_that_is_no_number_is_left_out(state, tmp_path):
    path = saved(tmp_path / "w.pt", {"state_dict": {name: torch.nn.Parameter(value) if value.is_floating_point() else value for name, value in state.items()}, "epoch": "last"})
    weights = read_weights(path)
    assert weights.epoch is None
    assert all(not value.requires_grad for value in weights.state.values())
