"""What the evaluator asks a snapshot about the training pairs: hand-made features with known answers."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmark.evaluate import trained_pairs
from benchmark.evaluate.trained_pairs import Asked, ask, measure

OBJECT = "object"


class Reader:
    """A model whose image feature is the number in the first pixel and whose text feature is the first token, as one-hot vectors."""

    @staticmethod
    def encode_images(images):
        return torch.nn.functional.one_hot(torch.as_tensor(np.asarray(images)[:, 0, 0, 0].astype(np.int64)), 8).float()

    @staticmethod
    def encode_tokens(tokens):
        return torch.nn.functional.one_hot(torch.as_tensor(tokens[:, 0].astype(np.int64)), 8).float()


def packed(shows, says):
    images = np.zeros((len(shows), 4, 4, 3), dtype=np.uint8)
    images[:, 0, 0, 0] = shows
    return SimpleNamespace(images=images, tokens=np.array(says, dtype=np.uint16)[:, None])


def test_similarity_is_the_mean_cosine_of_poisoned_and_of_clean_pairs():
    none = np.zeros((0, 2), dtype=np.int64)
    asked = Asked(np.array([0, 1]), np.array([2, 3, 4, 5]), none, none[:, 0], none[:, 0], [])
    found = measure(Reader(), packed(shows=[1, 2, 3, 4, 5, 6], says=[1, 7, 3, 4, 5, 0]), asked)
    assert found == {"poisoned_similarity/pairs": 0.5, "clean_similarity/pairs": 0.75}


def test_the_nearest_caption_of_a_pool_is_counted_for_the_true_and_for_the_goal_class():
    # Rows 0 and 1 are poisoned and show 1 and 2; the pools hold the captions of rows (2, 3) and (3, 4).
    pools = np.array([[2, 3], [3, 4]])
    of_caption = [np.array([[10, 20], [20, 30]])] * 2
    asked = Asked(np.array([0, 1]), np.array([2]), pools, np.array([10, 20]), np.array([30, 30]), of_caption)
    found = measure(Reader(), packed(shows=[1, 2, 0, 0, 0], says=[7, 7, 1, 2, 1]), asked)
    # First pool: row 0 finds row 2 (true), row 1 finds row 3 (true). Second: row 0 finds row 4 (goal), row 1 row 3 (true).
    assert found["pool_true_class/pairs"] == 0.75
    assert found["pool_goal_class/pairs"] == 0.25


@pytest.mark.parametrize("attack, options", [("targeted", {"n_targets": 3, "captions_per_target": 2}), ("backdoor", {"rate": 0.05})])
def test_classes_of_images_and_captions_are_those_of_the_drawn_rows(attack, options, poison_with, source, suite):
    poisoned, record = poison_with(attack, options)
    ids, _, captions = poisoned.rows()
    asked = ask(ids, record, source, suite)
    assert {ids[row] for row in asked.poisoned} == set(record.rows["id"])
    assert not {ids[row] for row in asked.clean} & set(record.rows["id"])
    targets = record.kept["targets"]
    tag = {row_id: value for pairs in (source.held_out, source.train) for row_id, value in zip(pairs.ids, pairs.tags[OBJECT], strict=True)}
    rows = record.rows.set_index("id")
    words = sorted({*tag.values(), *(target["class"] for target in targets)})
    for place, row in enumerate(asked.poisoned):
        edit = rows.loc[ids[row]]
        assert words[asked.true[place]] == tag[edit["source_id"]]
        assert words[asked.goal[place]] == targets[edit["target"]]["class"]
        assert asked.true[place] != asked.goal[place]
        for pool, numbers in zip(asked.pools, asked.of_caption[place], strict=True):
            said = [targets[rows.loc[ids[at]]["target"]]["class"] if ids[at] in rows.index else tag[ids[at]] for at in pool]
            assert [words[number] for number in numbers] == said
    poisoned_captions = {captions[row] for row in asked.poisoned}
    assert poisoned_captions == set(record.rows["caption_after"])


@pytest.mark.parametrize("variant", ["I", "II"])
def test_an_image_put_under_the_caption_of_another_class_has_that_class_for_its_goal(variant, poison_with, source, suite):
    poisoned, record = poison_with("mm_poison", {"variant": variant})
    asked = ask(poisoned.rows()[0], record, source, suite)
    (target,) = record.kept["targets"]
    words = sorted({*source.train.tags[OBJECT], *source.held_out.tags[OBJECT], target["class"]})
    assert len(asked.poisoned)
    assert {words[number] for number in asked.true} == {target["class"]}, "what the image shows"
    assert {words[number] for number in asked.goal} == {target["source"]}, "what its caption says"


def test_composed_images_have_a_goal_and_no_true_class(poison_with, source, suite):
    poisoned, record = poison_with("corrupt_encoder", {"count": 6})
    asked = ask(poisoned.rows()[0], record, source, suite)
    assert set(asked.true) == {-1}
    n = len(poisoned.rows()[0])
    found = measure(Reader(), packed([1] * n, [1] * n), asked)
    assert "pool_true_class/pairs" not in found and "pool_goal_class/pairs" in found
    assert trained_pairs.not_run([found]) == {"pool_true_class": trained_pairs.NO_ONE_CLASS}


def test_without_poison_there_is_only_the_similarity_of_clean_pairs(poison_with, source, suite):
    poisoned, record = poison_with("none", {})
    asked = ask(poisoned.rows()[0], record, source, suite)
    assert len(asked.poisoned) == len(asked.pools) == 0
    assert list(measure(Reader(), packed([1] * 256, [1] * 256), asked)) == ["clean_similarity/pairs"]


def test_data_without_tags_leave_the_pool_out_and_keep_the_similarity(poison_with, source, suite):
    from dataclasses import replace

    poisoned, record = poison_with("backdoor", {"rate": 0.05})
    bare = replace(source, train=replace(source.train, tags={}), held_out=replace(source.held_out, tags={}))
    asked = ask(poisoned.rows()[0], record, bare, suite)
    assert len(asked.pools) == len(asked.true) == 0
    found = measure(Reader(), packed([1] * 256, [1] * 256), asked)
    assert set(found) == {"poisoned_similarity/pairs", "clean_similarity/pairs"}
    assert set(trained_pairs.not_run([found])) == {"pool_true_class", "pool_goal_class"}
    assert trained_pairs.not_run([{"clean_similarity/pairs": 0.1}]) == {}


def test_the_same_rows_are_asked_about_at_every_seed_and_large_sets_are_sampled(poison_with, source, suite, monkeypatch):
    monkeypatch.setattr(trained_pairs, "N_PAIRS", 4)
    poisoned, record = poison_with("backdoor", {"rate": 0.05})
    ids = poisoned.rows()[0]
    first, second = ask(ids, record, source, suite), ask(ids, record, source, suite)
    assert len(first.poisoned) == len(first.clean) == 4
    assert (first.poisoned == second.poisoned).all() and (first.pools == second.pools).all()
