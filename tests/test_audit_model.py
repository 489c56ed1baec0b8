"""`bench audit --checkpoint`: the score of a model beside a reference, and what the command refuses."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from benchmark import cli
from benchmark.audit.model import ModelAudit, audit_model, lines
from benchmark.errors import BenchError, PluginError
from benchmark.progress import silent
from benchmark.settings import ModelSettings
from benchmark.show import listing
from benchmark.train.checkpoints import load_checkpoint
from benchmark.train.model import build, save_weights

PLANTED = '''
import numpy as np
from pydantic import Field
from benchmark.contract import Defense

class Bias(Defense):
    """Scores the sum of one parameter.

    Source: this test.
    """

    kind = "audit"
    n_clean: int = Field(5, ge=1, description="Images.")

    def audit(self, model, images):
        assert images.dtype == np.uint8 and images.shape == (self.n_clean, 32, 32, 3)
        return float(model.net.logit_scale.detach()) + float(images.mean() > 0)
'''


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    (folder / "bias.py").write_text(PLANTED)
    for name, value in (("clean", 1.0), ("suspect", 1.5)):
        model = build(ModelSettings(), 32, 0, torch.device("cpu"))
        with torch.no_grad():
            model.net.logit_scale.fill_(value)
        save_weights(model, folder / f"{name}.safetensors")
    return folder


def invoke(*arguments):
    return CliRunner().invoke(cli.app, [str(one) for one in arguments], catch_exceptions=False)


def test_a_checkpoint_is_audited_beside_its_reference(models, tmp_path):
    given = ("--checkpoint", models / "suspect.safetensors", "--reference", models / "clean.safetensors", "--model", "bench-small", "--device", "cpu")
    result = invoke("audit", *given, "--audit", models / "bias.py", "--set", "defense.n_clean=7", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "+2.5000  suspect.safetensors" in result.output and "+2.0000  clean.safetensors, the reference" in result.output
    assert "0.5000 above the reference" in result.output
    written = json.loads((tmp_path / "out" / "model.json").read_text())
    assert written["checkpoint"]["score"] == 2.5 and written["options"] == {"n_clean": 7} and written["images"] == "drawn images"
    assert written["checkpoint"]["weights"] != written["reference"]["weights"]


def test_an_audit_may_say_what_it_found(models, tmp_path):
    (tmp_path / "says.py").write_text(
        PLANTED.replace("import Defense", "import Audit, Defense").replace("return float(", "return Audit(0.25, 'the corner is odd') if True else float(")
    )
    asked = ModelAudit(models / "suspect.safetensors", "bench-small", models / "clean.safetensors", audit=str(tmp_path / "says.py"), device="cpu")
    found = audit_model(asked, silent())
    assert found["checkpoint"]["score"] == 0.25 and found["checkpoint"]["says"] == "the corner is odd"
    assert lines(found)[1:3] == ["+0.2500  suspect.safetensors. the corner is odd", "+0.2500  clean.safetensors, the reference. the corner is odd"]


def test_an_audit_that_needs_no_images_gets_none_and_one_without_a_number_is_the_plugins_failure(models, tmp_path):
    for name, answer in (("free", "float(len(images))"), ("lost", "float('nan')")):
        text = PLANTED.replace("n_clean: int = Field(5, ge=1", "n_clean: int = Field(0, ge=0").replace("return float(", f"return {answer} if True else float(")
        (tmp_path / f"{name}.py").write_text(text)
    asked = ModelAudit(models / "clean.safetensors", "bench-small", audit=str(tmp_path / "free.py"), device="cpu")
    assert audit_model(asked, silent())["checkpoint"]["score"] == 0.0
    with pytest.raises(PluginError, match="audit must return a finite number, got nan"):
        audit_model(replace(asked, audit=str(tmp_path / "lost.py")), silent())


def test_decree_is_the_default_and_a_score_alone_is_said_to_mean_little(models):
    asked = ModelAudit(models / "clean.safetensors", "bench-small", sets=("defense.epochs=1", "defense.n_clean=8", "decree.batch_size=8"), device="cpu")
    found = audit_model(asked, silent())
    assert found["audit"] == "decree" and -1 <= found["checkpoint"]["score"] < 0 and found["reference"] is None
    assert any("--reference" in line for line in lines(found))


def test_a_model_is_shown_the_training_images_of_an_evaluation_set(models, tmp_path):
    for split in ("train", "test"):
        for number in range(8):
            folder = tmp_path / "set" / split / ("cat" if number % 2 else "dog")
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((32, 32, 3), number + (50 if split == "train" else 0), np.uint8)).save(folder / f"{number}.png")
    asked = {"checkpoint": models / "clean.safetensors", "architecture": "bench-small", "audit": str(models / "bias.py"), "eval": str(tmp_path / "set"), "device": "cpu"}
    found = audit_model(ModelAudit(**asked, results=tmp_path / "r", sets=("defense.n_clean=3",)), silent())
    assert found["images"] == "training images of set" and found["n_images"] == 3
    with pytest.raises(BenchError, match=r"the audit wants 50; lower defense.n_clean"):
        audit_model(ModelAudit(**asked, results=tmp_path / "r", sets=("defense.n_clean=50",)), silent())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"audit": "clip"}, "audits no model"),
        ({"audit": "decre"}, "Did you mean 'decree'"),
        ({"sets": ("train.epochs=2",)}, "takes options of decree"),
        ({"sets": ("defense.epoch=2",)}, "Did you mean 'epochs'"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused(models, change, message):
    with pytest.raises(BenchError, match=message):
        audit_model(ModelAudit(models / "clean.safetensors", "bench-small", **change), silent())


def test_a_reference_of_another_image_side_is_refused(models, monkeypatch):
    from benchmark.audit import model as module

    def load(path, device, ask):
        found = load_checkpoint(path, device, ask)
        return replace(found, model=replace(found.model, side=48)) if path.name.startswith("clean") else found

    monkeypatch.setattr(module, "load_checkpoint", load)
    with pytest.raises(BenchError, match=r"at 32 px and the reference .* at 48 px; scores compare within one architecture alone"):
        audit_model(ModelAudit(models / "suspect.safetensors", "bench-small", models / "clean.safetensors"), silent())


def test_the_writer_says_which_activation_a_trainers_file_has(models, tmp_path):
    state = build(ModelSettings(), 32, 0, torch.device("cpu")).net.state_dict()
    torch.save({"epoch": 3, "name": "run", "state_dict": state, "optimizer": {}}, tmp_path / "epoch_3.pt")
    asked = ModelAudit(tmp_path / "epoch_3.pt", "bench-small", audit=str(models / "bias.py"), device="cpu")
    with pytest.raises(BenchError, match="say --writer open_clip, or --writer cyclip"):
        audit_model(asked, silent())
    found = audit_model(replace(asked, writer="open_clip"), silent())
    assert found["checkpoint"]["score"] == pytest.approx(math.log(1 / 0.07) + 1, abs=1e-4)


def test_options_for_models_and_for_pairs_do_not_mix(models):
    with pytest.raises(BenchError, match="--reference is for a model alone"):
        invoke("audit", "--data", "pairs.tsv", "--reference", models / "clean.safetensors")
    with pytest.raises(BenchError, match="needs --data, the pairs to look at, or --checkpoint"):
        invoke("audit")
    with pytest.raises(BenchError, match="--writer says what a checkpoint is"):
        invoke("audit", "--data", "pairs.tsv", "--writer", "cyclip")
    with pytest.raises(BenchError, match="expected --writer auto, open_clip or cyclip, got 'clip'"):
        invoke("audit", "--checkpoint", models / "clean.safetensors", "--writer", "clip")


def test_the_list_of_defenses_says_kind_paper_clean_data_and_trust():
    rows = {line.split()[0]: line for line in listing("defenses").splitlines()[1:]}
    assert "[audit; clean pairs: 128; trusts: clean pairs] Feng et al. 2023" in rows["decree"]
    assert "[certificate; clean pairs: 0, and labelled images; trusts: the encoder]" in rows["knn_certified"]
    assert "[control; clean pairs: 0; trusts: the record it is told]" in rows["oracle"]
    assert "[pre-training; clean pairs: 0; trusts: nothing]" in rows["clip"]
