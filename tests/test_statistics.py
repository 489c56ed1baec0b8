import pytest
from scipy import stats

from benchmark.evaluate.metric import rate
from benchmark.evaluate.statistics import TARGET_IMAGES, Interval, over_runs, paired_difference, wilson

KNOWN = [(0, 16, 0, 0.1936), (1, 16, 0.0111, 0.2833), (2, 16, 0.0350, 0.3602), (15, 16, 0.7167, 0.9889), (16, 16, 0.8064, 1), (23, 24, 0.7976, 0.9926), (0, 300, 0, 0.0126)]


@pytest.mark.parametrize(("successes", "n", "low", "high"), KNOWN)
def test_wilson_has_the_known_values(successes, n, low, high):
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("share", "covered"), [(0.01, 0.851), (0.03, 0.918), (0.5, 0.923)])
def test_wilsons_exact_coverage_at_sixteen_is_what_the_docstring_says(share, covered):
    inside = [wilson(k, 16)[0] <= share <= wilson(k, 16)[1] for k in range(17)]
    assert sum(stats.binom.pmf(k, 16, share) for k in range(17) if inside[k]) == pytest.approx(covered, abs=6e-4)


def test_nothing_measured_says_nothing():
    assert wilson(0, 0) == (0.0, 1.0)
    assert rate("asr", "x", 0, 0, "").value is None


def test_one_run_has_wilson_over_its_units_and_two_have_none():
    assert over_runs([0.5], 16, "targets").low == pytest.approx(wilson(8, 16)[0])
    assert over_runs([0.5]).low is None
    assert over_runs([0.1, 0.9], 16).low is None and over_runs([0.1, 0.9]).kind == "2 runs"


def test_images_of_targets_are_no_units_of_one_run_nor_of_runs_that_agree():
    assert over_runs([0.5], 8, TARGET_IMAGES) == Interval(None, None, "none: images of one target are not independent, one training run")
    assert over_runs([1.0, 1.0, 1.0], 8, TARGET_IMAGES).kind == "all 3 runs equal, Wilson over 3"
    assert over_runs([0.5, 0.6, 0.7], 8, TARGET_IMAGES) == over_runs([0.5, 0.6, 0.7], 8, "targets")


def test_three_runs_have_students_interval():
    values = [0.2, 0.5, 0.6]
    low, high = stats.t.interval(0.95, 2, loc=sum(values) / 3, scale=stats.sem(values))
    found = over_runs(values, 16)
    assert (found.low, found.high) == pytest.approx((max(0, low), min(1, high)))
    assert found.kind == "t over 3 runs"


def test_runs_that_all_agree_on_zero_count_targets_of_all_runs_but_queries_of_none():
    assert over_runs([0.0] * 3, 16, "targets").high == pytest.approx(wilson(0, 48)[1])
    assert over_runs([1.0] * 3, 900, "queries").low == pytest.approx(wilson(3, 3)[0])


def test_runs_that_all_agree_in_between_are_no_more_certain_than_their_targets():
    found = over_runs([1 / 16] * 5, 16, "targets")
    assert (found.low, found.high) == pytest.approx(wilson(5, 80))
    # Three tenths that are equal have a standard deviation of 1.7e-17.
    assert over_runs([0.1] * 3, 10, "targets").low == pytest.approx(wilson(3, 30)[0])
    assert over_runs([0.1] * 3, 1000, "queries").low == pytest.approx(wilson(0.3, 3)[0])
    assert over_runs([0.1] * 3).low is None, "a mean over several probes"


def test_paired_differences_equal_scipys():
    left, right = [0.9, 0.8, 0.95, 0.7], [0.5, 0.6, 0.5, 0.65]
    mean, low, high = paired_difference(left, right)
    theirs = stats.ttest_rel(left, right).confidence_interval(0.95)
    assert (low, high) == pytest.approx((theirs.low, theirs.high)) and mean == pytest.approx(0.275)
    assert paired_difference([0.5, 0.2], [0.1, 0.1])[1:] == (None, None)
