import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from benchmark.evaluate.detection import detection, filtering


def values_of(metrics):
    return {metric.name: metric.value for metric in metrics}


@pytest.mark.parametrize("levels", [1000, 5])
def test_metrics_equal_scikit_learns_ties_included(levels):
    rng = np.random.default_rng(0)
    poisoned = rng.random(400) < 0.1
    scores = np.round((rng.normal(size=400) + poisoned) * levels) / levels if levels > 10 else rng.integers(0, levels, 400) + poisoned.astype(float)
    found = values_of(detection("x", scores, scores > 1, poisoned))
    assert found["auroc"] == pytest.approx(roc_auc_score(poisoned, scores))
    assert found["average_precision"] == pytest.approx(average_precision_score(poisoned, scores))
    fpr, tpr, _ = roc_curve(poisoned, scores, drop_intermediate=False)
    assert found["fpr_at_tpr_0.95"] == pytest.approx(fpr[tpr >= 0.95].min())
    assert found["tpr_own"] == pytest.approx((scores > 1)[poisoned].mean()) and found["fpr_own"] == pytest.approx((scores > 1)[~poisoned].mean())
    assert found["base_rate"] == poisoned.mean()


def test_constant_scores_have_auroc_one_half_and_precision_at_the_base_rate():
    poisoned = np.arange(100) < 10
    found = values_of(detection("x", np.zeros(100), None, poisoned))
    assert found["auroc"] == 0.5 and found["average_precision"] == pytest.approx(0.1)


def test_a_detector_that_scores_the_wrong_way_round_is_not_flipped():
    poisoned = np.arange(100) < 10
    assert values_of(detection("x", -poisoned.astype(float), None, poisoned))["auroc"] == 0


@pytest.mark.parametrize("n_poison", [0, 10])
def test_without_poison_or_without_clean_rows_there_is_nothing_to_tell(n_poison):
    assert detection("x", np.zeros(10), None, np.arange(10) < n_poison) == []


def test_a_filter_is_told_by_what_it_kept():
    poisoned = np.arange(10) < 3
    found = values_of(filtering(np.array([2, 3, 4, 5, 6, 7]), poisoned))
    assert found == {"n_kept": 6, "n_poison_kept": 1, "clean_lost": pytest.approx(2 / 7)}
