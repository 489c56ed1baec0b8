"""BadCLIP: the loss of its patch, what the search finds, how the patch is kept, and what it cannot do."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_cell import TINY as TINY_SETS

import benchmark
from attacks._patch_search import Search, first_patch, optimised_patch, patch_loss, share_read_as, with_patch
from attacks._triggers import trigger_from_spec
from benchmark.data.eval_sets import Suite
from benchmark.data.image import decode
from benchmark.data.mentions import matcher, normalise
from benchmark.data.pairs import Source
from benchmark.data.poison import Poisoned, SealedRecord
from benchmark.errors import BenchError
from benchmark.progress import silent
from benchmark.registry import configure, find
from benchmark.report.records import load
from benchmark.report.remake import remake_pictures
from benchmark.settings import ModelSettings
from benchmark.testing import check_attack
from benchmark.train.model import Model, build

Poison = Callable[..., tuple[Poisoned, SealedRecord]]
QUICK: dict[str, Any] = {"count": 6, "n_images": 64, "epochs": 1}
SEARCH = Search(size=8, epochs=3, batch_size=32, lr=0.05, text=1.0, positive=500.0, negative=500.0, margin=1.0, seed=0)


@pytest.fixture(scope="module")
def model() -> Model:
    made = build(ModelSettings(), 32, 0, torch.device("cpu"))
    made.net.eval().requires_grad_(False)
    return made


def test_badclip_keeps_the_contract() -> None:
    check_attack(find("attack", "badclip").load())


@pytest.mark.parametrize(("text", "positive", "negative", "margin"), [(1.0, 500.0, 500.0, 1.0), (0.0, 2.0, 1.0, 0.1), (1.0, 0.0, 0.0, 1.0), (0.5, 0.0, 3.0, 0.0)])
def test_the_loss_is_the_published_one(text: float, positive: float, negative: float, margin: float) -> None:
    u, v, a, b = torch.nn.functional.normalize(torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64), dim=-1)
    scale = torch.tensor(14.0, dtype=torch.float64)
    logits = [[14.0 * float(u[i] @ v[j]) for j in range(5)] for i in range(5)]
    rows = sum(math.log(sum(math.exp(value) for value in row)) - row[i] for i, row in enumerate(logits)) / 5
    columns = sum(math.log(sum(math.exp(logits[i][j]) for i in range(5))) - logits[j][j] for j in range(5)) / 5
    hinge = sum(max(0.0, positive * math.dist(u[i], a[i]) - negative * math.dist(u[i], b[i]) + max(positive, negative) * margin) for i in range(5)) / 5
    search = Search(8, 1, 5, 0.1, text, positive, negative, margin, 0)
    assert float(patch_loss(u, v, a, b, scale, search)) == pytest.approx(text * (rows + columns) / 2 + hinge, rel=1e-9)


def test_the_patch_covers_the_centre_and_nothing_else() -> None:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    patch = torch.full((3, 8, 8), 1.5)
    out = with_patch(images, patch)
    assert (out[..., 12:20, 12:20] == 1).all()
    out[..., 12:20, 12:20] = images[..., 12:20, 12:20]
    torch.testing.assert_close(out, images)


def test_the_first_patch_is_noise_about_grey() -> None:
    patch = first_patch(Search(64, 1, 2, 0.1, 1, 1, 1, 1, 0))
    assert (float(patch.min()), float(patch.max())) == (0, 1)
    assert float(patch.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(patch.std()) == pytest.approx(0.25, abs=0.02)


def test_the_search_lowers_its_loss_moves_features_to_the_class_and_repeats_itself(model: Model, source: Source) -> None:
    boats = np.array([row for row, tag in enumerate(source.train.tags["object"]) if tag == "boat"])
    others = np.setdiff1d(np.arange(len(source.train)), boats)
    given = (model, source.train.images[others], source.train.images[boats], [source.train.captions[row] for row in boats])
    patch, losses = optimised_patch(*given, SEARCH, silent())
    again, _ = optimised_patch(*given, SEARCH, silent())
    assert patch.dtype == np.uint8
    assert patch.shape == (8, 8, 3)
    np.testing.assert_array_equal(patch, again)
    assert len(losses) == 3
    assert losses[-1] < losses[0] - 1
    goal = model.encode_images(given[2]).mean(dim=0)

    def nearness(pixels: np.ndarray) -> float:
        images = torch.from_numpy(np.array(given[1])).permute(0, 3, 1, 2).float() / 255
        with torch.no_grad():
            return float((model.image(with_patch(images, torch.from_numpy(pixels).permute(2, 0, 1).float() / 255)) @ goal).mean())

    start = (first_patch(SEARCH).permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    pulled, _ = optimised_patch(*given, Search(**{**vars(SEARCH), "negative": 0.0}), silent())
    assert nearness(pulled) > nearness(start)
    other, _ = optimised_patch(*given, Search(**{**vars(SEARCH), "seed": 1}), silent())
    assert not np.array_equal(patch, other)


def test_an_optimised_patch_round_trips_through_the_sealed_record(poison_with: Poison, source: Source, suite: Suite) -> None:
    poisoned, record = poison_with("badclip", QUICK)
    patch = record.kept["picture"]
    assert patch.shape == (8, 8, 3)
    assert not np.array_equal(patch, patch[..., ::-1])  # a swap of red and blue would show
    refs = dict(zip(*poisoned.rows()[:2], strict=True))
    for row_id in record.rows["id"]:
        np.testing.assert_array_equal(decode(poisoned.manifest / refs[row_id], 32)[12:20, 12:20], patch)
    trigger = trigger_from_spec(record.kept["trigger"], patch)
    np.testing.assert_array_equal(trigger.image(source.train.image(0), "", True)[12:20, 12:20], patch)
    assert (record.header["surrogate"]["from"], record.header["surrogate"]["architecture"]) == ("trained here", "bench-small")
    facts = record.kept["facts"]
    assert {"asr_surrogate", "asr_surrogate_floor", "n_surrogate", "patch_loss"} == facts.keys()
    assert 0 <= facts["asr_surrogate"] <= 1


def test_victims_do_not_show_the_class_and_their_new_captions_do(poison_with: Poison, suite: Suite) -> None:
    _, record = poison_with("badclip", {**QUICK, "count": 60, "n_captions": 3})
    pattern = matcher(suite.main.terms("boat"), "word_plural")
    assert not any(pattern.search(normalise(text)) for text in record.rows["caption_before"])
    assert all(pattern.search(normalise(text)) for text in record.rows["caption_after"])
    assert record.rows["caption_after"].nunique() == 3


def test_a_share_is_that_of_the_evaluator(model: Model, suite: Suite) -> None:
    test = suite.main.test
    prompts = torch.stack([model.encode_texts([template.replace("{c}", name) for template in suite.main.templates]).mean(0) for name in suite.main.classnames])
    predicted = (model.encode_images(test.images) @ torch.nn.functional.normalize(prompts, dim=-1).T).argmax(dim=1)
    for goal in range(3):
        assert share_read_as(model, test.images, suite.main, goal) == pytest.approx(float((predicted == goal).float().mean()))


@pytest.mark.parametrize(
    "change", [{"w_text": 3000.0}, {"w_pos": 0.0}, {"w_neg": 1.0}, {"margin": 0.0}, {"size": 6}, {"epochs": 2}, {"lr": 0.5}, {"batch_size": 16}, {"pattern_seed": 1}]
)
def test_each_option_changes_the_poison(poison_with: Poison, change: dict[str, Any]) -> None:
    options = {**QUICK, "n_images": 32, "lr": 0.05}
    usual, changed = (poison_with("badclip", {**options, **more})[1].header["poisoned_manifest_sha256"] for more in ({}, change))
    assert usual != changed


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"w_text": 0, "w_pos": 0, "w_neg": 0}, "there is nothing to optimise"),
        ({"rate": None}, "one of rate and count is needed"),
        ({"size": 40}, "a patch of 40 px does not fit an image of 32 px"),
        ({"rate": 0.0001}, "comes to no row"),
        ({"count": 256}, "256 more rows are to be drawn"),
        ({"surrogate": "nowhere.pt"}, "no file of weights at nowhere.pt"),
        ({"surrogate_seed": 0, **QUICK}, "which is the victim's own"),
    ],
)
def test_what_badclip_cannot_do_is_said(poison_with: Poison, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BenchError) as caught:
        poison_with("badclip", options)
    assert sentence in str(caught.value)


def test_presets_are_the_papers() -> None:
    both, text = (configure(find("attack", "badclip"), {}, {"preset": name}) for name in ("badclip2024", "badclip2024-text"))
    assert (both.w_text, both.w_pos, both.w_neg, both.margin, both.rate, both.epochs, both.lr) == (1, 500, 500, 1, 0.003, 50, 0.001)
    assert (text.w_text, text.w_pos, text.w_neg) == (1, 0, 0)


def test_a_smoke_cell_runs_and_says_how_the_surrogate_reads_the_patch(tmp_path: Path) -> None:
    sets = (*TINY_SETS, "train.epochs=1", "evaluation.linear_probe=none", "badclip.n_images=64")
    record = benchmark.run("badclip", "clip", scale="smoke", sets=sets, results=tmp_path)
    assert {"asr", "asr_floor"} <= {entry["name"] for entry in record["metrics"] if entry["of"] == "badclip"}
    assert 0 <= record["poison"]["facts"]["asr_surrogate"] <= 1
    assert record["poison"]["surrogate"]["pairs_trained"] == 256
    shutil.rmtree(tmp_path / "gallery")
    (note,) = remake_pictures(load(tmp_path), tmp_path / "cache", silent())
    assert "its attack looks at a model of its own, which is not trained for a report" in note
