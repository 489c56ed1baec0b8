"""The attacker's own model: trained once on the clean pairs or loaded, frozen, written down, and paid for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from test_cell import TINY as TINY_SETS

import benchmark
from benchmark import status
from benchmark.data.attack_lab import AttackLab, SurrogateRequest
from benchmark.data.eval_sets import Suite
from benchmark.data.pairs import Source
from benchmark.data.poison import Poisoned, SealedRecord, poison
from benchmark.errors import BenchError
from benchmark.record import about_poison
from benchmark.registry import configure, find
from benchmark.request import Request, plan
from benchmark.settings import ModelSettings, TrainSettings
from benchmark.stages import Stages
from benchmark.surrogate import Surrogates
from benchmark.testing.world import tiny_surrogates
from benchmark.train.model import build, save_weights

PLUGIN = '''
from attacks._surrogates import SurrogateOptions
from benchmark.contract import Append, Probe, Why


class Look(SurrogateOptions):
    """Appends the held-out image that the surrogate finds most like a boat.

    Source: this test.
    """

    access = "features"

    def poison(self, pairs, lab):
        model = lab.surrogate(self.surrogate_request())
        images = model.encode_images(lab.held_out.images)
        best = int((images @ model.encode_texts(["a photo of a boat"])[0]).argmax())
        lab.n_requested = 1
        lab.keep("best", best)
        yield Append(lab.held_out.image(best), "a photo of a fish", Why(source=lab.held_out.ids[best]))

    def probes(self, suite, kept):
        return [Probe("look", "classify", suite.main.name, "test", None, 3)]
'''


@pytest.fixture(scope="module")
def look(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("plugin") / "look.py"
    file.write_text(PLUGIN)
    return str(file)


@pytest.fixture(scope="module")
def surrogates(source: Source, suite: Suite, stages: Stages) -> Surrogates:
    return tiny_surrogates(source, suite, stages, TINY)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_weights(build(ModelSettings(), 32, 7, torch.device("cpu")), file)
    return str(file)


def test_the_surrogate_is_plain_clip_on_the_clean_pairs_and_trained_once(surrogates: Surrogates, stages: Stages) -> None:
    first = surrogates.find(SurrogateRequest())
    trainings = list((stages.root / "train").glob("*/done.json"))
    second = surrogates.find(SurrogateRequest())
    assert first.about == second.about
    assert list((stages.root / "train").glob("*/done.json")) == trainings
    assert not first.model.net.training
    assert not any(parameter.requires_grad for parameter in first.model.net.parameters())
    facts = json.loads((stages.root / "train" / first.about["training"] / "done.json").read_text())["facts"]
    assert (facts["defense"], facts["options"], facts["augmented"], facts["seed"]) == ("Undefended", {}, False, first.about["seed"])
    assert len(list((stages.root / "train" / first.about["training"]).glob("*.safetensors"))) == 1


def test_two_seeds_are_two_models_and_the_victims_is_refused(surrogates: Surrogates) -> None:
    one, other = (surrogates.find(wanted).about for wanted in (SurrogateRequest(), SurrogateRequest(seed=5)))
    assert one["weights_sha256"] != other["weights_sha256"]
    with pytest.raises(BenchError, match=r"seed 0, which is the victim's own; give another with --set attack\.surrogate_seed"):
        surrogates.find(SurrogateRequest(seed=0))


def test_the_sealed_record_and_the_key_know_the_surrogate(look: str, poison_with: Callable[..., tuple[Poisoned, SealedRecord]], weights: str) -> None:
    trained, loaded = (poison_with(look, options) for options in ({}, {"surrogate": weights, "surrogate_model": "bench-small"}))
    assert trained[1].header["surrogate"]["from"] == "trained here"
    about = loaded[1].header["surrogate"]
    assert (about["from"], about["architecture"], about["seed"], about["data_overlap"]) == ("checkpoint", "bench-small", None, None)
    assert about["weights_sha256"] == build(ModelSettings(), 32, 7, torch.device("cpu")).weights_sha256()
    assert trained[0].record.parent != loaded[0].record.parent
    assert about_poison(loaded[1])["surrogate"] == about
    assert "surrogate" not in about_poison(poison_with("none", {})[1])


def test_only_attacks_with_access_have_another_key(source: Source, suite: Suite, stages: Stages, tmp_path: Path, look: str) -> None:
    budgets = [None, *(tiny_surrogates(source, suite, stages, TINY, TrainSettings(epochs=epochs, batch_size=64)) for epochs in (1, 2))]
    plain, seeing = find("attack", "backdoor"), find("attack", look)
    keys = {poison(plain, configure(plain, {}, {"count": 4}), 0, source, suite, False, Stages(tmp_path), granted).record.parent.name for granted in budgets}
    assert len(keys) == 1
    keys = {poison(seeing, configure(seeing, {}, {}), 0, source, suite, False, Stages(tmp_path), granted).record.parent.name for granted in budgets[1:]}
    assert len(keys) == 2


def test_an_attack_without_access_gets_no_surrogate(source: Source, suite: Suite, look: str) -> None:
    with pytest.raises(BenchError, match="declares access 'none'; declare 'features' or 'gradients'"):
        AttackLab(source, suite, "mine", 0).surrogate()
    plugin = find("attack", look)
    with pytest.raises(BenchError, match=r"look needs a surrogate model \(access: features\)"):
        poison(plugin, configure(plugin, {}, {}), 0, source, suite, False, Stages(Path("unused")))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"surrogate": "nowhere.pt"}, "no file of weights at nowhere.pt"),
        ({"surrogate_model": "RN50"}, "belong to a file"),
        ({"surrogate": "WEIGHTS", "surrogate_hash": "0" * 64}, "holds other weights than before"),
        ({"surrogate_seed": -1}, "attack.surrogate_seed"),
    ],
)
def test_options_that_cannot_be_met_are_refused_at_once(look: str, weights: str, options: dict[str, Any], sentence: str) -> None:
    given = {name: weights if value == "WEIGHTS" else value for name, value in options.items()}
    with pytest.raises(BenchError) as caught:
        configure(find("attack", look), {}, given)
    assert sentence in str(caught.value)


def test_a_surrogate_for_other_images_is_refused(surrogates: Surrogates, weights: str) -> None:
    with pytest.raises(BenchError, match="does not say which architecture"):
        surrogates.find(SurrogateRequest(checkpoint=Path(weights)))
    with pytest.raises(BenchError, match="does not hold weights of RN50"):
        surrogates.find(SurrogateRequest(checkpoint=Path(weights), architecture="RN50"))


def test_a_run_says_which_surrogate_and_what_it_cost(look: str, tmp_path: Path) -> None:
    (asked,) = plan(Request((look,), ("clip",), scale="smoke", sets=(*TINY_SETS, "train.epochs=1", "evaluation.linear_probe=none"), results=tmp_path, baseline=False))
    assert status.cached_parts(asked) == ""
    record = benchmark.run(look, "clip", scale="smoke", sets=(*TINY_SETS, "train.epochs=1", "evaluation.linear_probe=none"), results=tmp_path)
    about = record["poison"]["surrogate"]
    assert about["architecture"] == "bench-small"
    assert about["pairs_trained"] == 256
    (cost,) = (json.loads(path.read_text()) for path in tmp_path.glob("runs/*/cost.json"))
    assert cost["surrogate_pairs_trained"] == 256
    assert cost["surrogate_seconds"] > 0
    assert cost["attack_seconds"] > 0
    assert status.cached_parts(asked) == "data, poison, packed pairs"
