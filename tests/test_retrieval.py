"""Retrieval probes: ranks and floors by hand, what is left out, several models, and where captions come from."""

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from benchmark.contract import Images, Probe, Texts
from benchmark.data import world
from benchmark.data.captioned import captioned
from benchmark.data.eval_readers import read_captions
from benchmark.data.eval_sets import EvalSet, Split, Suite, open_suite
from benchmark.errors import BenchError
from benchmark.evaluate.features import Encoder
from benchmark.evaluate.measure import Evaluator, has_linear_probe, read
from benchmark.evaluate.retrieval import chance, fused, min_rank, retrieval_card, retrieval_queries, retrieval_success
from benchmark.progress import silent
from benchmark.report.difference import _queries
from benchmark.report.records import Run
from benchmark.report.targets import hits
from benchmark.settings import DataSettings
from benchmark.stages import Stages

CLASSES = ("cat", "dog", "owl", "city")
CAPTIONS = ("a cat", "two dogs", "an owl", "the cities", "cat at night", "my dog", "owl up high", "a city")


@dataclasses.dataclass(frozen=True)
class Suffix:
    words: str = "zx"

    def image(self, image, key, at_test=False):
        return image.copy()

    def text(self, text, key):
        return f"{text} {self.words}"

    def spec(self):
        return {"kind": "suffix", "words": self.words}


class Reader:
    """Puts an image by its first pixel and a caption by its place in CAPTIONS; `zx` leads to image 0."""

    def encode_images(self, images):
        return torch.eye(8)[torch.from_numpy(images[:, 0, 0, 0].astype(np.int64))]

    def encode_texts(self, texts):
        return torch.eye(8)[[0 if text.endswith("zx") else CAPTIONS.index(text) for text in texts]]


class Constant(Reader):
    def encode_images(self, images):
        return normalize(torch.ones(len(images), 8), dim=-1)

    def encode_texts(self, texts):
        return normalize(torch.ones(len(texts), 8), dim=-1)


def picture(place):
    image = np.zeros((4, 4, 3), dtype=np.uint8)
    image[0, 0] = place
    return image


IDS = tuple(f"i{place}" for place in range(8))
GALLERY = Images(IDS, np.stack([picture(place) for place in range(8)]), tuple(place % 4 for place in range(8)))
TEXTS = Texts(tuple(f"{row_id}#0" for row_id in IDS), CAPTIONS, IDS)


@pytest.fixture
def made():
    split = Split(GALLERY.images, np.array(GALLERY.true), IDS)
    captions = {row_id: (text,) for row_id, text in zip(IDS, CAPTIONS, strict=True)}
    return Suite({"made": EvalSet("made", CLASSES, ("{c}",), {"cat": ("kitten",)}, None, split, split, split, {}, captions)}, "content", Path("nowhere"), {})


def probe_of(**changes):
    usual = {"name": "words", "task": "text_to_image", "eval_set": "made", "queries": TEXTS, "trigger": Suffix(), "goal": (0, 4), "ks": (1, 5), "gallery": GALLERY, "shows": 0}
    return Probe(**{**usual, **changes})


def measured(model, probe, suite):
    metrics, table = retrieval_success(Encoder(model if isinstance(model, list) else [model]), probe, retrieval_queries(probe, suite), suite)
    return {metric.name: metric for metric in metrics}, table


def some(texts, places):
    return Texts(*(tuple(column[place] for place in places) for column in (texts.ids, texts.texts, texts.of)))


def test_a_planted_text_backdoor_has_hit_one_and_floor_zero(made):
    found, table = measured(Reader(), probe_of(), made)
    assert (found["asr"].value, found["asr"].n, found["asr_top5"].value) == (1.0, 6, 1.0)
    assert (found["asr_floor"].value, found["asr_floor"].n) == (0.0, 6)
    assert found["goal_rank_median"].value == found["goal_rank_mean"].value == 1
    assert (found["triggered_recall5"].value, found["retrieval_recall5"].value) == (0.0, 1.0)
    assert (len(table), int(table["counted"].sum()), set(table.loc[~table["floor"], "first"])) == (16, 12, {"i0"})


def test_ties_outside_the_goal_never_help_and_inside_do_not_matter():
    scores = torch.tensor([[0.5, 0.5, 0.5, 0.1], [0.9, 0.2, 0.9, 0.1], [0.1, 0.7, 0.3, 0.7]])
    assert min_rank(scores, torch.tensor([True, False, False, False])).tolist() == [3, 2, 4]
    assert min_rank(scores, torch.tensor([True, False, True, False])).tolist() == [2, 1, 3]


def test_a_constant_encoder_finds_nothing(made):
    found, _ = measured(Constant(), probe_of(), made)
    assert found["asr"].value == found["asr_top5"].value == found["asr_floor"].value == found["retrieval_recall5"].value == 0
    assert (found["goal_rank_mean"].value, found["n_ties"].value) == (7, 6)


def test_chance_is_that_of_a_random_order(made):
    assert chance(10, 1, 1) == pytest.approx(0.1) and chance(10, 3, 5) == pytest.approx(1 - 21 / 252)
    found, _ = measured(Reader(), probe_of(), made)
    assert found["asr_chance"].value == pytest.approx(0.25) and found["goal_rank_chance"].value == pytest.approx(3)
    draws = torch.rand(20_000, 10, generator=torch.Generator().manual_seed(0))
    assert float((min_rank(draws, torch.arange(10) < 3) <= 2).float().mean()) == pytest.approx(chance(10, 3, 2), abs=0.015)


def test_captions_of_the_goal_class_are_in_neither_queries_nor_floor(made):
    floor = Texts(("f0", "f1", "f2"), ("two Cats", "a kitten", "my dog"))
    asked = retrieval_queries(probe_of(trigger=None, floor=floor), made)
    assert asked.counts.tolist() == [False, True, True, True, False, True, True, True]
    assert asked.floor_counts.tolist() == [False, False, True]
    assert asked.excluded == {"captions of a goal image": 2, "captions that mention the goal's class": 2}
    assert retrieval_card(probe_of(trigger=None, floor=floor), asked, made)["excluded"] == asked.excluded


def test_a_caption_of_a_goal_image_does_not_count_whatever_it_says(made):
    assert retrieval_queries(probe_of(goal=2, shows=None), made).counts.tolist() == [True, True, False, True, True, True, True, True]


def test_a_copy_of_a_goal_image_belongs_to_the_goal(made):
    twice = Images((*IDS, "copy"), np.concatenate([GALLERY.images, GALLERY.images[:1]]), (*GALLERY.true, 0))
    assert retrieval_queries(probe_of(gallery=twice, goal=0), made).goal.tolist() == [True] + [False] * 7 + [True]


def test_images_find_texts(made):
    given = {"task": "image_to_text", "queries": GALLERY, "gallery": TEXTS, "trigger": None, "goal": 1, "shows": 1}
    floor = Images(("x", "y"), np.stack([picture(1), picture(3)]), (-1, -1))
    found, table = measured(Reader(), probe_of(**given, floor=floor), made)
    assert (found["asr"].value, found["asr"].n) == (0.0, 6)
    assert (found["asr_floor"].value, found["asr_floor"].n) == (0.5, 2)
    assert found["triggered_recall5"].value == 1 and found["retrieval_recall5"].n == 0
    assert table["first"].tolist()[0] == "i0#0"


def test_a_control_reports_under_its_own_name_and_adds_to_no_asr(made):
    found, _ = measured(Reader(), probe_of(control="asr_wrong_trigger", trigger=Suffix("zx zx")), made)
    assert {name: metric.value for name, metric in found.items()} == {"asr_wrong_trigger": 1.0}


def test_several_models_vote_by_places(made):
    first, second = torch.tensor([[0.9, 0.5, 0.1]]), torch.tensor([[0.0, 0.1, 0.2]])
    assert fused([first]) is first
    assert fused([first, first, second])[0].tolist() == pytest.approx([-5 / 3, -2.0, -7 / 3])
    assert fused([torch.ones(1, 4)] * 2).tolist() == [[-4.0] * 4]
    found, _ = measured([Reader(), Reader(), Constant()], probe_of(), made)
    assert found["asr"].value == 1.0
    found, _ = measured([Constant(), Constant()], probe_of(), made)
    assert found["asr"].value == 0.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queries": GALLERY}, "text_to_image asks with Texts, its floor too, and ranks a gallery of Images"),
        ({"gallery": None}, "ranks a gallery of Images"),
        ({"goal": 8}, "goal 8 in a gallery with places 0 to 7"),
        ({"goal": ()}, "goal of no place in a gallery"),
        ({"goal": {0: 1}}, "one place in the gallery or several, got dict"),
        ({"ks": (1, 8)}, "k = 8 of 8 items is no success"),
        ({"trigger": None}, "has neither a trigger nor a floor"),
        ({"queries": some(TEXTS, [0, 4])}, "every query rightly reaches the goal"),
        ({"trigger": None, "floor": some(TEXTS, [0])}, "every query of the floor rightly reaches the goal"),
        ({"eval_set": "mode"}, "Did you mean 'made'"),
    ],
)
def test_what_is_no_retrieval_is_refused(made, changes, message):
    with pytest.raises(BenchError, match=message):
        retrieval_queries(probe_of(**changes), made)


def test_the_evaluator_measures_both_tasks_and_the_linear_probe_leaves_retrieval_out(made, tmp_path):
    evaluator = Evaluator(made, [probe_of()], "poison", Stages(tmp_path))
    reader = Reader()
    reader.encode_texts = lambda texts: torch.eye(8)[[0 if text.endswith("zx") else [*CAPTIONS, *CLASSES].index(text) % 8 for text in texts]]
    folder = evaluator.measure(lambda: [reader], ["weights"], "fp32", "lbfgs")
    metrics, _ = read(folder)
    found = {(metric.name, metric.of): metric for metric in metrics}
    assert found["asr", "words"].value == 1.0 and not has_linear_probe(probe_of())
    assert ("linear_probe_asr", "words") not in found and ("linear_probe_acc1", "made") in found
    assert found["asr", "words"].card in evaluator.cards()
    assert (folder / "predictions" / "attack-words.parquet").is_file()
    assert evaluator.not_run() == {}


def test_items_that_follow_the_seed_do_not_change_the_card(made):
    def card(row_id):
        gallery = Images((*IDS, row_id), np.concatenate([GALLERY.images, picture(9)[None]]), (*GALLERY.true, -1))
        probe = probe_of(gallery=gallery, goal=8)
        return retrieval_card(probe, retrieval_queries(probe, made), made)

    assert card("drawn one") == card("drawn another")
    assert card("i") != retrieval_card(probe_of(), retrieval_queries(probe_of(), made), made)


def test_the_drawn_world_knows_the_captions_of_its_test_images(suite, settings):
    for name, variant in (("objects", False), ("combinations", True)):
        found = captioned(suite, name)
        for place in (0, 7):
            what = world.scene(settings.seed, "test", place, combinations=variant)
            assert found.captions[place] == what.captions
        texts = found.texts([3])
        assert texts.of == (suite.get(name).test.ids[3],) * 2 and texts.texts == found.captions[3] and len(set(texts.ids)) == 2
    assert len(captioned(suite, "objects").gallery().ids) == len(suite.main.test.ids)
    assert "captions" not in (suite.folder / "suite.json").read_text()


def own_set(folder):
    for name, value in (("cat", 10), ("dog", 200)):
        (folder / "pets" / "test" / name).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (16, 16), (value, number * 40, 0)).save(folder / "pets" / "test" / name / f"{number}.png")
    return folder / "pets"


def opened(folder, cache):
    return open_suite(DataSettings(side=16), [folder], Stages(cache), silent())


def test_a_set_of_ones_own_brings_captions_in_a_file(tmp_path):
    folder = own_set(tmp_path)
    without = opened(folder, tmp_path / "cache")
    with pytest.raises(BenchError, match=r"evaluation set 'pets' has no captions.*captions\.tsv \(image<TAB>caption\)"):
        captioned(without, "pets")
    (folder / "captions.tsv").write_text("test/cat/0.png\ta cat\ntest/cat/0.png\tthe cat\n\ntest/dog/1.png\tmy dog\n")
    suite = opened(folder, tmp_path / "cache")
    assert suite.content != without.content
    found = captioned(suite, "pets")
    assert found.captions == (("a cat", "the cat"), (), (), ("my dog",))
    assert found.texts(range(4)).of == ("test/cat/0.png", "test/cat/0.png", "test/dog/1.png")


def test_captions_may_be_many_and_hold_other_line_ends_than_a_files(tmp_path):
    (tmp_path / "captions.tsv").write_text("a.png\tone\u2028two\r\n" + "a.png\tthe same again and again, so that it is a long file\n" * 30_000, newline="")
    found = read_captions(tmp_path / "captions.tsv", ["a.png"])["a.png"]
    assert (len(found), found[0]) == (30_001, "one\u2028two")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("test/cat/0.png a cat\n", r"captions\.tsv row 1: expected image<TAB>caption"),
        ("test/cat/0.png\ta cat\ntest/cat/7.png\ta cat\n", r"row 2: 'test/cat/7\.png' is no test image of this set; they are named like 'test/cat/0\.png'"),
        ("\n", "has no captions"),
    ],
)
def test_captions_that_cannot_be_read_are_refused(tmp_path, text, message):
    folder = own_set(tmp_path)
    (folder / "captions.tsv").write_text(text)
    with pytest.raises(BenchError, match=message):
        opened(folder, tmp_path / "cache")


def run_of(folder, ranks, control=False):
    """A run whose one retrieval probe has these ranks: two queries, then the same as the floor."""
    (folder / "predictions").mkdir(parents=True)
    table = pd.DataFrame({"query_id": ["a", "b", "a", "b"], "floor": [False, False, True, True], "counted": True, "first": "i0", "rank_goal": ranks})
    table.to_parquet(folder / "predictions" / "attack-words.parquet")
    return Run({"metrics": [{"name": "asr_cross" if control else "asr", "of": "words", "value": 0.5, "card": "", "units": "queries"}]}, {}, folder)


def test_runs_are_compared_by_attacked_queries_and_not_by_the_floor_or_a_control(tmp_path):
    left, right = run_of(tmp_path / "one", [1, 1, 1, 9]), run_of(tmp_path / "two", [1, 2, 9, 1])
    assert hits(left) == {"words": {"a": True, "b": True}} and hits(right)["words"]["b"] is False
    assert hits(run_of(tmp_path / "three", [1, 1, 1, 1], control=True)) == {}
    (line,) = _queries(left, right)
    assert "1 reach the goal in both, 1 in the first alone, 0 in the second alone, of 2 queries" in line
