from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from benchmark.contract import Images, Probe
from benchmark.data.eval_sets import EvalSet, Split, Suite
from benchmark.errors import BenchError
from benchmark.evaluate.attack_success import attack_success, card_of, queries
from benchmark.evaluate.features import Encoder
from benchmark.evaluate.measure import Evaluator
from benchmark.evaluate.statistics import wilson
from benchmark.report.tables import kind_of_interval
from benchmark.stages import Stages

CLASSES = tuple(f"class{index}" for index in range(10))
GOAL = 3


@dataclass(frozen=True)
class Corner:
    """Sets one pixel, so that a planted model can see it."""

    value: int = 255

    def image(self, image, key, at_test=False):
        out = image.copy()
        out[-1, -1] = self.value
        return out

    def text(self, text, key):
        return text

    def spec(self):
        return {"kind": "corner", "value": self.value}


class Planted:
    """Reads the class off the first row; with the trigger it says the goal."""

    def encode_images(self, images):
        features = torch.from_numpy(images[:, 0, :, 0].astype(np.float32))
        features[torch.from_numpy(images[:, -1, -1, 0] == 255)] = torch.eye(10)[GOAL] * 255
        return normalize(features, dim=-1)

    def encode_texts(self, texts):
        return torch.eye(10)[[CLASSES.index(text) for text in texts]]


class Scattered(Planted):
    """Random features of an image's bytes and its texts."""

    def encode_images(self, images):
        seeds = [int(image.astype(np.int64).reshape(-1) @ np.arange(image.size)) % 2**31 for image in images]
        return normalize(torch.stack([torch.randn(10, generator=torch.Generator().manual_seed(seed)) for seed in seeds]), dim=-1)


class Constant(Planted):
    def encode_images(self, images):
        return normalize(torch.ones(len(images), 10), dim=-1)

    def encode_texts(self, texts):
        return normalize(torch.ones(len(texts), 10), dim=-1)


def suite_of(labels, noise=40):
    images = np.random.default_rng(0).integers(0, noise, (len(labels), 12, 10, 3), dtype=np.uint8)
    images = np.pad(images, ((0, 0), (0, 0), (0, 2), (0, 0)))[:, :, :10]
    images[np.arange(len(labels)), 0, np.asarray(labels)] = 250
    images[:, -1, -1] = 0
    split = Split(images, np.asarray(labels, dtype=np.int64), tuple(f"q{index}" for index in range(len(labels))))
    return Suite({"made": EvalSet("made", CLASSES, ("{c}",), {}, None, split, split, split)}, "content", None, {})


def probe_of(**changes):
    return Probe(**{"name": "backdoor", "task": "classify", "eval_set": "made", "queries": "test", "trigger": Corner(), "goal": GOAL, "ks": (1, 5), **changes})


def measured(model, probe, suite):
    metrics, table = attack_success(Encoder([model]), probe, queries(probe, suite), suite)
    return {metric.name: metric for metric in metrics}, table


BALANCED = [label for label in range(10) for _ in range(20)]


def test_a_planted_perfect_backdoor_scores_asr_one_and_floor_zero():
    found, table = measured(Planted(), probe_of(), suite_of(BALANCED))
    assert (found["asr"].value, found["asr"].n) == (1.0, 180)
    assert found["asr_floor"].value == 0 and found["triggered_acc1"].value == 0 and found["untriggered_acc1"].value == 1
    assert found["asr_all"].n == 200 and found["goal_rank_median"].value == 1
    assert table["counted"].sum() == 180 and len(table) == 200


def test_a_random_encoder_scores_chance():
    labels = BALANCED * 5
    found, _ = measured(Scattered(), probe_of(), suite_of(labels, noise=250))
    for name in ("asr", "asr_floor", "untriggered_acc1"):
        low, high = wilson(round(0.1 * found[name].n), found[name].n)
        assert low - 0.02 < found[name].value < high + 0.02


def test_a_constant_encoder_scores_zero_everywhere():
    found, _ = measured(Constant(), probe_of(), suite_of(BALANCED))
    assert found["asr"].value == found["asr_floor"].value == found["asr_all"].value == found["triggered_acc1"].value == 0
    assert found["n_ties"].value == 180


def test_adding_target_class_images_does_not_move_asr():
    few, _ = measured(Scattered(), probe_of(), suite_of(BALANCED))
    labels = BALANCED + [GOAL] * 200
    suite = suite_of(labels)
    images = suite.main.test.images
    images[:200] = suite_of(BALANCED).main.test.images
    many, _ = measured(Scattered(), probe_of(), suite)
    assert (many["asr"].value, many["asr"].n) == (few["asr"].value, few["asr"].n)
    assert many["asr_all"].n == 400


def test_a_set_of_target_images_alone_has_no_asr():
    found, _ = measured(Planted(), probe_of(), suite_of([GOAL] * 20))
    assert found["asr"].value is None and found["asr"].n == 0
    one, _ = measured(Planted(), probe_of(), suite_of([GOAL] * 20 + [1]))
    assert (one["asr"].value, one["asr"].n) == (1.0, 1)


def test_sources_leave_other_classes_out():
    found, _ = measured(Planted(), probe_of(sources=(1, 2, GOAL)), suite_of(BALANCED))
    assert found["asr"].n == 40


def test_an_all_to_all_goal_is_a_map_of_classes():
    found, _ = measured(Planted(), probe_of(goal={label: (label + 1) % 10 for label in range(10)}), suite_of(BALANCED))
    assert (found["asr"].value, found["asr"].n) == (pytest.approx(0.1), 200)


def targets(true=(0, 1, 2, -1)):
    suite = suite_of(BALANCED)
    return Images(tuple(f"t{index}" for index in range(4)), suite.main.test.images[[0, 20, 60, 60]], true), suite


def test_a_targeted_attack_counts_targets_and_its_floor_other_images():
    asked, suite = targets()
    found, table = measured(Planted(), probe_of(queries=asked, trigger=None, goal=(5, 6, 3, 3), ks=(1, 3)), suite)
    assert (found["asr"].value, found["asr"].n, found["asr"].units) == (0.5, 4, "targets")
    assert found["asr_floor"].value == 0 and "asr_all" not in found
    assert (found["triggered_acc1"].value, found["triggered_acc1"].n) == (pytest.approx(2 / 3), 3)
    assert table["rank_true"].tolist()[3] == -1


def test_images_of_one_target_have_a_rate_and_no_interval():
    asked, suite = targets()
    found, _ = measured(Planted(), probe_of(queries=asked, trigger=None, goal=(5, 5, 3, 3), ks=(1, 3), per_target=2), suite)
    for name in ("asr", "asr_top3", "triggered_acc1"):
        assert (found[name].units, found[name].low, found[name].high) == ("images of targets", None, None)
    assert (found["asr"].value, found["asr"].n) == (0.5, 4)
    assert kind_of_interval(found["asr"].as_json()) == "none: images of one target are not independent"
    card = card_of(probe_of(queries=asked, trigger=None, goal=(5, 5, 3, 3), per_target=2), queries(probe_of(queries=asked, trigger=None, goal=(5, 5, 3, 3)), suite), suite)
    assert (card["n_targets"], card["images_per_target"]) == (2, 2)


def test_as_many_goals_as_queries_are_wanted():
    asked, suite = targets()
    with pytest.raises(BenchError, match="has 3 goals for 4 queries"):
        queries(probe_of(queries=asked, trigger=None, goal=(5, 6, 3)), suite)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ks": (1, 10)}, "k = 10 of 10 classes"),
        ({"task": "text_to_image"}, "images are classified, and this one is a text_to_image of str"),
        ({"eval_set": "mode"}, "Did you mean 'made'"),
    ],
)
def test_a_probe_that_cannot_be_measured_is_refused(changes, message):
    with pytest.raises(BenchError, match=message):
        measured(Planted(), probe_of(**changes), suite_of(BALANCED))


def test_queries_are_stamped_with_the_probes_own_trigger_and_never_in_place():
    suite = suite_of(BALANCED)
    asked = queries(probe_of(), suite)
    assert (asked.triggered[:, -1, -1] == 255).all() and (suite.main.test.images[:, -1, -1] == 0).all()


def test_probes_of_one_trigger_share_its_images(tmp_path):
    probes = [probe_of(name=name, trigger=trigger) for name, trigger in (("a", Corner()), ("b", Corner()), ("c", Corner(254)))]
    a, b, c = Evaluator(suite_of(BALANCED), probes, "key", Stages(tmp_path)).asked().values()
    assert a.triggered is b.triggered and a.triggered is not c.triggered and (c.triggered[:, -1, -1] == 254).all()


def test_prompts_without_a_finite_feature_fail_the_evaluation():
    class Broken(Planted):
        def encode_texts(self, texts):
            return super().encode_texts(texts) * torch.nan

    with pytest.raises(BenchError, match="text 0 of the prompts of made has a feature that is not finite"):
        measured(Broken(), probe_of(), suite_of(BALANCED))


def test_asr_and_triggered_accuracy_never_sum_to_more_than_one():
    for model in (Planted(), Scattered(), Constant()):
        found, _ = measured(model, probe_of(), suite_of(BALANCED))
        assert found["asr"].value + found["triggered_acc1"].value <= 1


def test_a_linear_probe_that_does_not_exist_yet_is_refused(tmp_path):
    evaluator = Evaluator(suite_of(BALANCED), [], "key", Stages(tmp_path))
    with pytest.raises(BenchError, match="linear probe 'roclip' is not available yet"):
        evaluator.measure(lambda: [torch.nn.Identity()], ["w"], "fp32", "roclip")
