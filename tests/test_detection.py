from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score, precision_score, roc_auc_score, roc_curve

from benchmark.evaluate.detection import detection, dropped_by_class, filtering, poison_among_neighbours, poisoned_rows, precision_at
from benchmark.evaluate.recompute_rows import of_rows


def values_of(metrics):
    return {metric.name: metric.value for metric in metrics}


@pytest.mark.parametrize("levels", [1000, 5])
def test_metrics_equal_scikit_learns_ties_included(levels):
    rng = np.random.default_rng(0)
    poisoned = rng.random(1500) < 0.1
    scores = np.round((rng.normal(size=1500) + poisoned) * levels) / levels if levels > 10 else rng.integers(0, levels, 1500) + poisoned.astype(float)
    found = values_of(detection("x", scores, scores > 1, poisoned))
    assert found["auroc"] == pytest.approx(roc_auc_score(poisoned, scores))
    assert found["average_precision"] == pytest.approx(average_precision_score(poisoned, scores))
    fpr, tpr, _ = roc_curve(poisoned, scores, drop_intermediate=False)
    assert found["fpr_at_tpr_0.95"] == pytest.approx(fpr[tpr >= 0.95].min())
    assert found["tpr_at_fpr_0.01"] == pytest.approx(tpr[fpr <= 0.01].max())
    assert found["tpr_own"] == pytest.approx((scores > 1)[poisoned].mean()) and found["fpr_own"] == pytest.approx((scores > 1)[~poisoned].mean())
    assert found["f1_own"] == pytest.approx(f1_score(poisoned, scores > 1))
    assert found["precision_own"] == pytest.approx(precision_score(poisoned, scores > 1))
    assert found["flagged_share"] == pytest.approx((scores > 1).mean())
    assert found["base_rate"] == poisoned.mean()


def test_the_example_worked_out_by_hand():
    poisoned = np.array([True, True, False, False, False])
    found = values_of(detection("x", np.array([0.9, 0.4, 0.8, 0.3, 0.1]), None, poisoned))
    assert found["auroc"] == pytest.approx(5 / 6) and found["average_precision"] == pytest.approx(5 / 6)
    assert found["fpr_at_tpr_0.95"] == pytest.approx(1 / 3)
    assert "f1_own" not in found and "tpr_at_fpr_0.01" not in found, "neither a threshold of its own nor a thousand clean rows"


@pytest.mark.parametrize("levels", [1000, 5])
def test_what_is_kept_of_the_poisoned_rows_gives_the_metrics_again(levels):
    rng = np.random.default_rng(1)
    poisoned = rng.random(1500) < 0.1
    scores = SimpleNamespace(name="x", values=np.round((rng.normal(size=1500) + poisoned) * levels / 5), flagged=poisoned & (rng.random(1500) < 0.5))
    kept = np.flatnonzero(rng.random(1500) < 0.7)
    rows = poisoned_rows([scores], kept, poisoned, np.arange(1500))
    recorded = [metric.as_json() for metric in (*detection("x", scores.values, scores.flagged, poisoned), *filtering(kept, poisoned))]
    again = of_rows(rows, recorded)
    assert {"auroc", "average_precision", "fpr_at_tpr_0.95", "precision_at_tpr_0.95", "tpr_own", "n_poison_kept", "recall_dropped"} <= {name for name, _ in again}
    for entry in recorded:
        one = again.get((entry["name"], entry["of"]))
        if one is not None:
            assert (one.value, one.n, one.units) == (pytest.approx(entry["value"], abs=1e-9), entry["n"], entry["units"]), entry["name"]
    assert list(rows["image"]) == list(np.flatnonzero(poisoned))


def test_what_a_filter_loses_is_counted_by_class_among_clean_rows():
    shown = ["boat", "boat", "boat", "car", None, "car"]
    poisoned = np.array([True, False, False, False, False, False])
    found = {metric.of: (metric.value, metric.n) for metric in dropped_by_class(np.array([0, 1, 4]), poisoned, shown)}
    assert found == {"boat": (0.5, 2), "car": (1.0, 2)}
    assert dropped_by_class(np.array([0]), poisoned, None) == []


def test_precision_at_the_true_base_rate_matches_the_hand_value():
    assert precision_at(1, 0.01, 0.001) == pytest.approx(0.09099, abs=1e-5)
    assert precision_at(0, 0, 0.001) == 0
    rng = np.random.default_rng(1)
    poisoned = np.arange(2000) < 20
    scores = rng.normal(size=2000) + 2 * poisoned
    found = values_of(detection("x", scores, scores > 1.5, poisoned))
    assert found["precision_own"] == pytest.approx(precision_at(found["tpr_own"], found["fpr_own"], found["base_rate"]))


def test_recall_among_the_most_suspicious_rows():
    poisoned = np.zeros(1000, dtype=bool)
    poisoned[[0, 5, 40, 300]] = True
    found = values_of(detection("x", -np.arange(1000.0), None, poisoned))
    assert [found[f"recall_at_{share}"] for share in ("0.001", "0.01", "0.05", "0.1", "0.15")] == [0.25, 0.5, 0.75, 0.75, 0.75]


def test_constant_scores_have_auroc_one_half_and_precision_at_the_base_rate():
    poisoned = np.arange(100) < 10
    found = values_of(detection("x", np.zeros(100), None, poisoned))
    assert found["auroc"] == 0.5 and found["average_precision"] == pytest.approx(0.1)


def test_a_detector_that_scores_the_wrong_way_round_is_not_flipped():
    poisoned = np.arange(100) < 10
    assert values_of(detection("x", -poisoned.astype(float), None, poisoned))["auroc"] == 0


def test_the_interval_of_the_auroc_counts_an_image_once_however_many_captions_it_has():
    rng = np.random.default_rng(2)
    images, scores = np.full(1000, -1), rng.normal(size=1000)
    images[:40] = np.repeat(np.arange(4), 10)
    scores[:40] = np.repeat([3.0, 0.5, 0.0, -0.5], 10)
    by_row, by_image = (next(metric for metric in detection("x", scores, None, images >= 0, given) if metric.name == "auroc") for given in (None, images))
    assert by_row.value == by_image.value and by_row.low < by_row.value < by_row.high
    assert by_image.high - by_image.low > 2 * (by_row.high - by_row.low)
    (one,) = (metric for metric in detection("x", scores, None, images == 0, images) if metric.name == "auroc")
    assert one.low is None, "one image says nothing about others"


@pytest.mark.parametrize("n_poison", [0, 10])
def test_without_poison_or_without_clean_rows_there_is_nothing_to_tell(n_poison):
    assert detection("x", np.zeros(10), None, np.arange(10) < n_poison) == []


def test_a_filter_is_told_by_what_it_kept():
    poisoned = np.arange(10) < 3
    found = values_of(filtering(np.array([2, 3, 4, 5, 6, 7]), poisoned))
    assert (found["n_kept"], found["n_dropped"], found["n_poison_kept"]) == (6, 4, 1)
    assert found["clean_lost"] == pytest.approx(2 / 7) and found["poison_rate_kept"] == pytest.approx(1 / 6)
    assert found["recall_dropped"] == pytest.approx(2 / 3) and found["precision_dropped"] == 0.5


def test_the_inverted_regime_is_flagged():
    poisoned = np.arange(1000) < 20
    metrics, warnings = poison_among_neighbours("dao", 16, [np.arange(0, 1000, 5), np.arange(1, 1000, 5)], poisoned)
    assert values_of(metrics) == {"expected_poison_over_k": pytest.approx(0.02 * 200 / 16), "most_poison_over_k": 4 / 16} and not warnings
    metrics, warnings = poison_among_neighbours("dao", 16, [np.arange(0, 1000, 5), np.arange(50)], poisoned)
    assert values_of(metrics)["most_poison_over_k"] == 20 / 16
    assert len(warnings) == 1 and "inverted regime" in warnings[0] and "up to 20" in warnings[0] and "k = 16" in warnings[0]
    trusted, none = poison_among_neighbours("dao", 16, [], poisoned)
    assert values_of(trusted) == {"expected_poison_over_k": 0, "most_poison_over_k": 0} and not none
