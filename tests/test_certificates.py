"""Certificates against every poisoning of small cases (docs/methods/certificates.md)."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmark.contract import View
from benchmark.errors import BenchError
from defenses._certificates import (
    ball_votes,
    few_shot_radii,
    gaps,
    joint_turned,
    knn_added,
    knn_mixed,
    knn_modified,
    knn_removed,
    nearest_votes,
    partition_certificates,
    trimmed,
    winners,
)
from defenses._distances import cosine_distances, typical_radius
from defenses.fcert import FCert, first_of_each
from defenses.knn_certified import KNNCertified
from defenses.rnn_certified import RNNCertified

labels_lists = st.lists(st.integers(0, 2), min_size=4, max_size=6)


def vote(labels, n_classes=3):
    """The class with the most labels, ties to the smaller; 0 without any."""
    counts = Counter(labels)
    return max(range(n_classes), key=lambda one: (counts[one], -one))


def removals(labels, size):
    """Every list that is left when up to `size` labels go."""
    for n in range(size + 1):
        for gone in itertools.combinations(range(len(labels)), n):
            yield [label for place, label in enumerate(labels) if place not in gone]


def additions(labels, size):
    """Every list with up to `size` labels more, at any places."""
    yield list(labels)
    if size:
        for shorter in additions(labels, size - 1):
            for place in range(len(shorter) + 1):
                for label in range(3):
                    yield [*shorter[:place], label, *shorter[place:]]


def fronts(labels, size):
    """Every list with up to `size` labels more in front, the worst place."""
    for n in range(size + 1):
        for new in itertools.product(range(3), repeat=n):
            yield [*new, *labels]


def knn(labels, k):
    return nearest_votes(np.arange(len(labels), dtype=float)[None], np.array(labels), 3, k + len(labels))


@settings(max_examples=60, deadline=None)
@given(labels_lists, st.integers(1, 4))
def test_knn_certificates_are_sound_and_as_large_as_they_can_be(labels, k):
    votes, predicted = knn(labels, k), vote(labels[:k])
    assert winners(votes[:, k]) == [predicted]
    attacks = {
        "insert": (int(knn_added(votes, k)[0]), lambda size: fronts(labels, size)),
        "delete": (int(knn_removed(votes, k)[0]), lambda size: removals(labels, size)),
        "modify": (int(knn_modified(votes, k)[0]), lambda size: (new for left in removals(labels, size) for new in fronts(left, size))),
    }
    for name, (radius, all_attacks) in attacks.items():
        for size in range(3):
            held = all(vote(new[:k]) == predicted for new in all_attacks(size))
            possible = name != "modify" or size <= len(labels)
            assert held >= (size <= radius), (name, size)
            if possible and (name != "delete" or predicted != 0 or len(set(labels)) > 1):
                assert held == (size <= radius), (name, size)


@settings(max_examples=25, deadline=None)
@given(labels_lists, st.integers(1, 4))
def test_images_added_anywhere_are_no_worse_than_in_front(labels, k):
    radius = min(2, int(knn_added(knn(labels, k), k)[0]))
    assert all(vote(new[:k]) == vote(labels[:k]) for new in additions(labels, radius))


@settings(max_examples=60, deadline=None)
@given(labels_lists, st.integers(1, 4), st.sampled_from([(1, 0), (0, 1), (1, 1), (2, 1), (1, 2)]))
def test_mixed_budgets_are_certified_exactly_when_no_attack_succeeds(labels, k, budget):
    added, removed = budget
    held = all(vote(new[:k]) == vote(labels[:k]) for left in removals(labels, removed) for new in fronts(left, added))
    assert bool(knn_mixed(knn(labels, k), k, added, removed)[0]) == held
    size = min(budget)
    if knn_mixed(knn(labels, k), k, size, size)[0]:
        assert size <= knn_modified(knn(labels, k), k)[0]


def test_knn_certificates_match_worked_values():
    def radii(labels, k):
        votes = knn(labels, k)
        return int(knn_modified(votes, k)[0]), int(knn_added(votes, k)[0]), int(knn_removed(votes, k)[0])

    assert radii([1, 1, 0, 1, 1, 0, 0, 1, 2, 0], 5) == (1, 1, 1)
    assert radii([1, 1, 1, 1, 1, 0, 1, 2, 1, 1], 3) == (1, 1, 4)
    assert radii([1, 1, 1, 1, 1, 0, 1, 2, 1, 1], 5) == (2, 2, 6)
    assert radii([1, 1, 1], 1)[1] == 0  # one new image is the whole vote


def test_equal_votes_go_to_the_smaller_class():
    votes = np.array([[3, 3, 0], [5, 2, 1], [2, 5, 1]])
    assert winners(votes).tolist() == [0, 0, 1] and gaps(votes).tolist() == [0, 3, 2]


def test_equal_distances_go_by_place_in_the_support():
    votes = nearest_votes(np.array([[1.0, 1.0, 0.5, 1.0]]), np.array([2, 1, 0, 1]), 3, 4)
    assert votes[0].tolist() == [[0, 0, 0], [1, 0, 0], [1, 0, 1], [1, 1, 1], [1, 2, 1]]


def in_ball(points, labels, query, radius):
    return [label for point, label in zip(points, labels, strict=True) if abs(point - query) <= radius]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2)), min_size=4, max_size=6))
def test_ball_certificates_are_sound_and_as_large_as_they_can_be(pairs):
    points, labels = zip(*pairs, strict=True)
    votes = ball_votes(np.abs(np.array(points, dtype=float))[None], np.array(labels), 3, 2.0)
    ball = in_ball(points, labels, 0, 2)
    gap, predicted = int(gaps(votes)[0]), vote(ball)
    assert winners(votes) == [predicted] and votes.sum() == len(ball)
    for size in range(3):
        assert all(vote(new) == predicted for new in fronts(ball, size)) == (size <= gap)
        left_alone = all(vote(new) == predicted for new in removals(ball, size))
        assert left_alone if size <= gap else (not left_alone or predicted == 0)
        both = all(vote(new) == predicted for left in removals(ball, size) for new in fronts(left, size))
        assert both == (size <= gap // 2)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 2)), min_size=5, max_size=5), st.lists(st.integers(0, 6), min_size=3, max_size=3), st.sampled_from([1, 2]))
def test_no_attack_turns_more_queries_than_the_joint_certificate_says(pairs, queries, size):
    points, labels = zip(*pairs, strict=True)
    votes = ball_votes(np.abs(np.array(queries, dtype=float)[:, None] - np.array(points)), np.array(labels), 3, 1.0)
    predicted = winners(votes)
    correct = np.array([True, True, True])
    bound = joint_turned(gaps(votes), predicted, correct, size)
    balls = [{place for place, point in enumerate(points) if abs(point - query) <= 1} for query in queries]
    sites = sorted({*queries, *((a + b) / 2 for a, b in itertools.combinations(queries, 2))})
    reach = {site: [abs(site - query) <= 1 for query in queries] for site in sites}
    options = list(dict.fromkeys((label, tuple(reach[site])) for site in sites for label in range(3)))
    for n in range(size + 1):
        for gone in itertools.combinations(range(len(points)), n):
            left = [Counter(labels[place] for place in ball if place not in gone) for ball in balls]
            for m in range(size + 1):
                for new in itertools.combinations_with_replacement(options, m):
                    turned = 0
                    for query, counts in enumerate(left):
                        now = counts + Counter(label for label, reached in new if reached[query])
                        turned += max(range(3), key=lambda one: (now[one], -one)) != predicted[query]
                    assert turned <= bound


def test_the_joint_certificate_matches_worked_values_and_is_never_below_the_single_one():
    ahead, predicted, correct = np.array([0, 2, 3]), np.array([0, 1, 2]), np.array([True, True, True])
    assert [joint_turned(ahead, predicted, correct, size) for size in range(4)] == [0, 1, 2, 3]
    assert [int((ahead // 2 >= size).sum()) for size in range(4)] == [3, 2, 0, 0]
    rng = np.random.default_rng(0)
    for _ in range(50):
        ahead, predicted, correct = rng.integers(0, 9, 30), rng.integers(0, 4, 30), rng.random(30) < 0.7
        for size in range(6):
            assert correct.sum() - joint_turned(ahead, predicted, correct, size) >= (correct & (ahead // 2 >= size)).sum()
    assert joint_turned(ahead, predicted, np.zeros(30, bool), 3) == 0


HAND = np.array([[[0.1, 0.2, 0.3, 0.4, 0.5], [0.35, 0.45, 0.55, 0.65, 0.75]]])


def test_few_shot_certificates_match_worked_values():
    assert trimmed(HAND)[0].tolist() == [0.3, 0.55]
    assert few_shot_radii(HAND, everywhere=True)[1] == [1]
    assert few_shot_radii(HAND, everywhere=False)[1] == [2]
    assert trimmed(np.array([1.0, 2.0, 4.0, 9.0])) == 3.0  # an even number: the mean of the two in the middle


@settings(max_examples=150, deadline=None)
@given(st.integers(3, 6).flatmap(lambda shots: st.lists(st.lists(st.integers(0, 3), min_size=shots, max_size=shots), min_size=3, max_size=3)), st.randoms(use_true_random=False))
def test_no_attack_of_the_certified_size_turns_a_few_shot_prediction(distances, random):
    table = np.array([distances], dtype=float)
    shots = table.shape[2]
    single, single_radius = few_shot_radii(table, everywhere=True)
    group, group_radius = few_shot_radii(table, everywhere=False)
    assert single == group == trimmed(np.sort(table, axis=2)).argmin(axis=1)
    assert group_radius >= single_radius >= 0
    for _ in range(10):
        for radius, everywhere in ((int(single_radius[0]), True), (int(group_radius[0]), False)):
            own = random.randint(0, radius)
            changed = table[0].copy()
            for one in range(3):
                budget = radius if everywhere else own if one == single[0] else radius - own
                # at the worst the own class moves away and the others come near
                places = np.argsort(changed[one])[:budget] if one == single[0] else np.argsort(-changed[one])[:budget]
                changed[one, places] = random.choice([9, random.randint(0, 9)]) if one == single[0] else random.choice([-9, random.randint(-9, 3)])
            if not everywhere:
                lonely = random.choice([one for one in range(3) if one != single[0]])
                changed[[one for one in range(3) if one not in (lonely, single[0])]] = table[0][[one for one in range(3) if one not in (lonely, single[0])]]
            assert trimmed(np.sort(changed, axis=1)).argmin() == single[0], shots


def test_partition_certificates_match_worked_values():
    def of(votes):
        predicted = np.repeat(np.arange(3), votes)[:, None]
        found = {one.name: one for one in partition_certificates(predicted, 3)}
        assert {one.trusts for one in found.values()} == {"none"}
        return int(found["insert_delete"].predicted[0]), int(found["insert_delete"].radius[0]), int(found["modify"].radius[0])

    assert of((4, 1, 0)) == (0, 1, 0)
    assert of((3, 2, 0)) == (0, 0, 0)
    assert of((2, 3, 0)) == (1, 0, 0)
    assert of((5, 0, 0)) == (0, 2, 1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=2, max_size=6))
def test_changing_as_many_partitions_as_certified_turns_nothing_and_one_more_can(predicted):
    (certificate, modified) = partition_certificates(np.array(predicted)[:, None], 3)
    radius = int(certificate.radius[0])
    assert modified.radius[0] == radius // 2

    def holds(size):
        return all(
            vote([new.get(place, one) for place, one in enumerate(predicted)]) == vote(predicted)
            for places in itertools.combinations(range(len(predicted)), size)
            for values in itertools.product(range(3), repeat=size)
            for new in [dict(zip(places, values, strict=True))]
        )

    assert holds(radius) and not holds(radius + 1)


def views(rng, n=60, m=20, width=8):
    support, queries = (torch.nn.functional.normalize(torch.from_numpy(rng.standard_normal((size, width))), dim=1).float() for size in (n, m))
    return [View(support, queries, torch.zeros(m, dtype=torch.int64))], torch.from_numpy(rng.integers(0, 3, n))


def test_the_plugins_predict_as_a_direct_loop_does():
    rng = np.random.default_rng(0)
    (view,), labels = views(rng)
    by_name = {one.name: one for one in KNNCertified(k=7).certify([view], labels, 3)}
    distances = cosine_distances(view.queries, view.support)
    expected = [vote([int(labels[place]) for place in sorted(range(60), key=lambda place: (row[place], place))[:7]]) for row in distances]
    assert set(by_name) == {"insert", "modify", "delete"} and by_name["insert"].predicted.tolist() == expected
    assert by_name["insert"].radius.max() <= 6 and by_name["delete"].largest == 60
    ball = RNNCertified(radius=0.5)
    ball._radius = 0.5
    insert, modify, delete = ball.certify([view], labels, 3)
    for row, predicted, radius in zip(distances, insert.predicted, insert.radius, strict=True):
        inside = [int(label) for label, distance in zip(labels, row, strict=True) if distance <= 0.5]
        assert predicted == vote(inside) and (radius == -1) == (not inside)
    assert (modify.radius <= delete.radius).all() and modify.joint is not None and insert.joint is None


@pytest.mark.parametrize("size", [1, 7])
def test_certificates_are_the_same_in_blocks_of_queries(monkeypatch, size):
    (view,), labels = views(np.random.default_rng(4))
    ball = RNNCertified()
    ball._radius = 0.5
    seen = []

    def measured(queries, support):
        seen.append(len(queries))
        return np.round(cosine_distances(queries, support), 9)  # a product of another shape may round in another way

    for module in ("knn_certified", "rnn_certified"):
        monkeypatch.setattr(f"defenses.{module}.cosine_distances", measured)
    for defense, of_each in ((KNNCertified(k=7), 24 * 60 + 24 * (7 + 60 + 1) * 3), (ball, 24 * 60)):
        whole = defense.certify([view], labels, 3)
        assert seen == [20], "small input is one block"
        with monkeypatch.context() as smaller:
            smaller.setattr("defenses._distances.BLOCK_BYTES", size * of_each + of_each - 1)
            parts = defense.certify([view], labels, 3)
        assert max(seen[1:]) == size and sum(seen[1:]) == 20
        for one, other in zip(whole, parts, strict=True):
            assert one.name == other.name and np.array_equal(one.predicted, other.predicted) and np.array_equal(one.radius, other.radius)
        seen.clear()


def test_the_ball_is_chosen_so_that_it_typically_holds_the_share():
    rng = np.random.default_rng(1)
    features = torch.nn.functional.normalize(torch.from_numpy(rng.standard_normal((101, 8))), dim=1)
    radius = typical_radius(features, 0.1)
    inside = (cosine_distances(features, features) <= radius).sum(axis=1) - 1
    assert np.median(inside) == 10


def test_few_shots_are_the_first_of_each_class_and_a_class_without_any_is_an_error():
    labels = np.array([1, 0, 1, 1, 0, 2, 0, 2])
    assert first_of_each(labels, 3, 5).tolist() == [[1, 4], [0, 2], [5, 7]]
    with pytest.raises(BenchError, match="class 3 of the evaluation set has no labelled image"):
        first_of_each(labels, 4, 2)
    rng = np.random.default_rng(2)
    (view,), labels = views(rng)
    for distance in ("squared", "euclidean"):
        group, individual = FCert(shots=7, distance=distance).certify([view], labels, 3)
        assert group.largest == 3 and (group.radius >= individual.radius).all() and group.unit != individual.unit
