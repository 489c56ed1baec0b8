"""Scores by neighbours against values worked out by hand, a double loop, and the regime in which they turn round."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from benchmark.suspicion.neighbours import Points, dao, finite, kdist, lid, nearest, slof

ALL = {"kdist": kdist, "slof": slof, "lid": lid, "dao": dao}


def points(values, first=0):
    features = torch.as_tensor(np.asarray(values), dtype=torch.float64)
    features = features[:, None] if features.ndim == 1 else features
    return Points(features, torch.arange(first, first + len(features)))


HAND = {
    "kdist": [2.5, 1.5, 2, 3.5, 9.5],
    "lid": [2.18271, 4.93261, 6.95212, 3.57388, 8.46064],
    "slof": [1.458333, 0.675, 0.952381, 2.041667, 3.732143],
    "dao": [2.03551, -1.55749, -0.29049, 4.03495, 7.20051],
}


@pytest.mark.parametrize("name", ALL)
def test_five_points_on_a_line(name):
    line = points([0, 1, 2.5, 4.5, 12])
    assert ALL[name](line, line, 2).tolist() == pytest.approx(HAND[name], abs=1e-5)


def brute(name, queries, reference, k):
    """A double loop in plain Python."""

    def distances(point, pair):
        return sorted((math.dist(point, other), place) for place, (other, of) in enumerate(zip(reference.features.tolist(), reference.pairs.tolist(), strict=True)) if of != pair)[
            :k
        ]

    def dimension(near):
        return -1 / (sum(math.log(d / near[-1][0]) for d, _ in near) / k)

    own = [distances(point, pair) for point, pair in zip(reference.features.tolist(), reference.pairs.tolist(), strict=True)]
    found = []
    for point, pair in zip(queries.features.tolist(), queries.pairs.tolist(), strict=True):
        near = distances(point, pair)
        scale = near[-1][0]
        found.append(
            {
                "kdist": lambda scale=scale: scale,
                "lid": lambda near=near: dimension(near),
                "slof": lambda near=near, scale=scale: sum(scale / own[y][-1][0] for _, y in near) / k,
                "dao": lambda near=near, scale=scale: sum(dimension(own[y]) * math.log(scale / own[y][-1][0]) for _, y in near) / k,
            }[name]()
        )
    return found


@pytest.mark.parametrize("name", ALL)
def test_scores_equal_a_double_loop(name):
    for seed in range(50):
        rng = torch.Generator().manual_seed(seed)
        features, pairs = torch.randn(40, 5, generator=rng, dtype=torch.float64), torch.arange(40) // 2
        queries, reference, k = Points(features[:20], pairs[:20]), Points(features, pairs), 2 + seed % 7
        assert ALL[name](queries, reference, k).tolist() == pytest.approx(brute(name, queries, reference, k), rel=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_detector_scores_follow_a_row_permutation(name):
    rng = torch.Generator().manual_seed(0)
    cloud = points(torch.randn(60, 4, generator=rng))
    order = torch.randperm(60, generator=rng)
    moved = Points(cloud.features[order], cloud.pairs[order])
    assert torch.allclose(ALL[name](moved, moved, 5), ALL[name](cloud, cloud, 5)[order])


@pytest.mark.parametrize("name", ALL)
def test_three_times_the_features_triple_the_distance_and_leave_the_ratios(name):
    rng = torch.Generator().manual_seed(1)
    cloud = points(torch.randn(60, 4, generator=rng))
    larger = points(3 * cloud.features)
    assert torch.allclose(ALL[name](larger, larger, 5), ALL[name](cloud, cloud, 5) * (3 if name == "kdist" else 1))


@pytest.mark.parametrize("name", ["kdist", "lid"])
def test_a_caption_never_counts_among_the_neighbours_of_its_image(name):
    rng = torch.Generator().manual_seed(2)
    image, rows = torch.randn(30, 4, generator=rng), torch.arange(30)
    queries, alone = Points(image, rows), Points(image, rows)
    with_copy = Points(torch.cat([image, image[:1]]), torch.cat([rows, rows[:1]]))
    assert ALL[name](queries, with_copy, 5)[0] == pytest.approx(float(ALL[name](queries, alone, 5)[0]))


@pytest.mark.parametrize("name", ALL)
def test_thirty_copies_of_an_image_give_finite_scores(name):
    rng = torch.Generator().manual_seed(3)
    cloud = points(torch.cat([torch.zeros(30, 4), torch.randn(40, 4, generator=rng)]))
    scores, n_odd = finite(ALL[name](cloud, cloud, 8))
    assert torch.isfinite(scores).all() and (n_odd > 0) == (name == "lid")
    assert name != "lid" or scores[:30].min() > scores[30:].max(), "an infinite dimension is the most suspicious"


def test_infinite_scores_move_next_to_the_finite_ones_and_are_counted():
    values, n = finite(torch.tensor([1.0, torch.inf, -torch.inf, torch.nan, 3.0]))
    assert (values.tolist(), n) == ([1, 4, 0, 4, 3], 3)
    assert finite(torch.tensor([torch.nan]))[0].tolist() == [1]


def test_small_distances_are_not_lost_between_large_features():
    far = torch.full((40, 64), 1000.0)
    far[:, 0] += torch.arange(40) * 0.01
    found = nearest(Points(far, torch.arange(40)), Points(far, torch.arange(40)), 1).distances
    assert found[:, 0].tolist() == pytest.approx([0.01] * 40, rel=0.05)


def test_many_queries_are_worked_off_in_blocks_with_the_same_result(monkeypatch):
    rng = torch.Generator().manual_seed(4)
    cloud = points(torch.randn(100, 4, generator=rng))
    whole = dao(cloud, cloud, 5)
    monkeypatch.setattr("benchmark.suspicion.neighbours._BLOCK_BYTES", 100 * 8 * 7)
    assert torch.equal(dao(cloud, cloud, 5), whole)


def toy(n_poison, modes=100, n_clean=2000, seed=0):
    """Clean points around random centres on the sphere, and poisons close together around one more."""
    rng = np.random.default_rng(seed)

    def around(centres, width):
        found = centres + width * rng.normal(size=centres.shape)
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    directions = rng.normal(size=(modes + 1, 64))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    clean, trusted = (around(directions[np.arange(n) % modes], 0.12) for n in (n_clean, 1000))
    poison = around(np.repeat(directions[-1:], n_poison, axis=0), 0.08)
    return points(np.concatenate([poison, clean])), points(trusted, -1000), np.arange(n_poison + n_clean) < n_poison


def auroc(name, cloud, reference, poisoned, k=16):
    return roc_auc_score(poisoned, finite(ALL[name](cloud, reference, k))[0].numpy())


def test_one_poison_among_all_rows_stands_out_and_two_dozen_hide_each_other():
    cloud, _, poisoned = toy(1, modes=50, n_clean=1000)
    assert all(auroc(name, cloud, cloud, poisoned) > 0.95 for name in ALL)
    cloud, _, poisoned = toy(24, modes=50, n_clean=1000)
    assert auroc("kdist", cloud, cloud, poisoned) < 0.1
    assert all(auroc(name, cloud, cloud, poisoned) < 0.8 for name in ("slof", "dao", "lid"))


@pytest.mark.parametrize("n_poison", [20, 40, 200])
def test_a_trusted_reference_finds_them_however_many_there_are(n_poison):
    cloud, trusted, poisoned = toy(n_poison, modes=20)
    assert all(auroc(name, cloud, trusted, poisoned) > 0.95 for name in ("kdist", "slof", "dao"))


def test_a_sample_small_enough_for_the_poison_works_if_it_still_covers_the_clean_modes():
    cloud, _, poisoned = toy(20, modes=20)
    rows = torch.from_numpy(np.random.default_rng(1).permutation(len(poisoned))[: int(16 / (4 * 0.01))])
    sample = Points(cloud.features[rows], cloud.pairs[rows])
    assert all(auroc(name, cloud, sample, poisoned) > 0.95 for name in ("kdist", "slof", "dao"))
