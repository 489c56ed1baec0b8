"""Word groups that contradict the rest of their captions, image clusters, and how both scale."""

import numpy as np
import pytest
import torch

from benchmark.suspicion.clusters import spherical_kmeans, usual_number
from benchmark.suspicion.words import NOTHING, word_lift, words_of

CLASSES = ("apple", "boat", "cat", "drum", "egg", "fox", "gate", "hat")
SENTENCE = "quite a splendid thing indeed my friends"


def synthetic(suffix, n_poison=30, seed=0, n=400):
    """Captions of class words, contexts that go with classes, and neutral words; poisons show one class and tell of others."""
    rng = np.random.default_rng(seed)
    shown = rng.integers(len(CLASSES), size=n)
    captions = []
    for index in shown:
        words = [CLASSES[index]] if rng.random() < 0.9 else []
        words += [f"{CLASSES[index]}context{rng.integers(3)}"] + [f"neutral{one}" for one in rng.integers(40, size=4)]
        captions.append(" ".join(words))
    poisoned = np.zeros(n, dtype=bool)
    victims = rng.permutation(np.flatnonzero(shown != 0))[:n_poison]
    poisoned[victims] = True
    for row in victims:
        captions[row] += suffix
    shown = np.where(poisoned, 0, shown)
    features = np.eye(len(CLASSES))[shown] + 0.05 * rng.normal(size=(n, len(CLASSES)))
    clusters = spherical_kmeans(torch.as_tensor(features), 10, np.random.default_rng(seed)).numpy()
    return captions, clusters, poisoned


@pytest.mark.parametrize(("suffix", "group"), [(" zx", {"zx"}), (f" {SENTENCE}", set(SENTENCE.split()))])
@pytest.mark.parametrize("n_poison", [10, 30])
def test_a_text_trigger_is_one_group_and_comes_first(suffix, group, n_poison):
    captions, clusters, poisoned = synthetic(suffix, n_poison)
    found = word_lift(captions, clusters)
    order = np.argsort(-found.scores)
    assert set(found.words[order[0]]) == group and found.n_rows[order[0]] == n_poison
    assert found.scores[order[0]] > 0 > found.scores[order[1]]
    assert np.array_equal(found.rows > 0, poisoned) and set(found.winners[poisoned]) == {order[0]}


def test_without_the_trigger_nothing_is_flagged_nor_on_clean_data():
    for captions, clusters, _ in (synthetic("", 30), synthetic(" zx", 0)):
        assert (word_lift(captions, clusters).scores < 0).all()


def test_groups_and_scores_equal_a_slow_reference():
    captions, clusters, _ = synthetic(" zx qv", 12, seed=3, n=120)
    found = word_lift(captions, clusters)
    rows_of = {}
    for row, caption in enumerate(captions):
        for word in words_of(caption):
            rows_of.setdefault(word, set()).add(row)
    groups = []
    for word in sorted(word for word, rows in rows_of.items() if len(rows) >= 5):
        for founder, members in groups:
            if len(rows_of[word] & rows_of[founder]) >= 0.8 * len(rows_of[word] | rows_of[founder]):
                members.append(word)
                break
        else:
            groups.append((word, [word]))
    assert found.words == tuple(tuple(members) for _, members in groups)
    n, p = len(captions), np.bincount(clusters) / len(captions)
    lift = {}
    for founder, _ in groups:
        of_group = np.bincount(clusters[sorted(rows_of[founder])], minlength=len(p))
        lift[founder] = np.log((of_group + p) / ((len(rows_of[founder]) + 1) * p))
    scores = []
    for founder, _ in groups:
        margins = []
        for row in rows_of[founder]:
            rest = np.log(p) + sum((lift[other] for other, _ in groups if row in rows_of[other] and other != founder), np.zeros(len(p)))
            margins.append(np.clip(np.delete(rest, clusters[row]).max() - rest[clusters[row]], -20, 20))
        scores.append(np.quantile(margins, 0.25) * lift[founder].max() if len(margins) <= 0.1 * n else NOTHING)
    assert found.scores == pytest.approx(scores, abs=2e-3)
    for row in range(n):
        of_row = [score for (founder, _), score in zip(groups, scores, strict=True) if row in rows_of[founder]]
        assert found.rows[row] == pytest.approx(max(of_row, default=NOTHING), abs=2e-3)


def test_captions_without_words_have_no_group():
    found = word_lift(["", "!!", "🚤"] * 5, np.zeros(15, dtype=np.int64))
    assert found.words == () and (found.rows == NOTHING).all() and (found.winners == -1).all()


def test_clusters_find_separated_kinds_and_are_the_same_for_the_same_seed():
    rng = np.random.default_rng(0)
    kinds = rng.integers(6, size=500)
    features = torch.as_tensor(4 * np.eye(6)[kinds] + 0.2 * rng.normal(size=(500, 6)))
    first, second = (spherical_kmeans(features, 6, np.random.default_rng(5)).numpy() for _ in range(2))
    assert np.array_equal(first, second)
    assert all(len(set(first[kinds == kind])) == 1 for kind in range(6)) and len(set(first)) == 6


def test_more_clusters_than_points_and_points_that_are_all_alike_are_no_trouble():
    assert len(spherical_kmeans(torch.ones(5, 3), 8, np.random.default_rng(0))) == 5
    assert [usual_number(n) for n in (10, 10_000, 4_000_000)] == [8, 50, 512]
