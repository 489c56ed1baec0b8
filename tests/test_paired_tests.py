"""Tests between methods and the planner, against known values, scipy and brute force."""

import itertools

import numpy as np
import pytest
from scipy import stats

from benchmark.evaluate import planning
from benchmark.evaluate.paired_tests import fisher, holm, mcnemar, over_pairs, sign_flip


def test_sign_flips_equal_brute_force_and_scipy():
    differences = np.random.default_rng(0).normal(0.3, 1, 7)
    wanted = np.mean([abs(np.dot(signs, differences)) >= abs(differences.sum()) - 1e-12 for signs in itertools.product((1, -1), repeat=7)])
    assert sign_flip(differences) == pytest.approx(wanted)
    theirs = stats.permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=np.inf, alternative="two-sided")
    assert sign_flip(differences) == pytest.approx(theirs.pvalue)


@pytest.mark.parametrize("runs", [6, 8, 12])
def test_the_smallest_p_of_sign_flips_is_two_over_all_patterns(runs):
    found = over_pairs([1.0] * runs, [0.5] * runs)
    assert found.p == pytest.approx(2 / 2**runs)
    assert found.kind == f"sign flips of {runs} runs, exact"


def test_many_runs_draw_their_flips_the_same_way_each_time():
    differences = np.random.default_rng(1).normal(0.1, 1, 25)
    assert sign_flip(differences) == sign_flip(differences)
    assert sign_flip(differences) == pytest.approx(stats.ttest_1samp(differences, 0).pvalue, abs=0.02)


def test_three_to_five_runs_have_the_paired_t_test_and_say_so():
    left, right = [0.9, 0.8, 0.95, 0.7], [0.5, 0.6, 0.5, 0.65]
    found = over_pairs(left, right)
    assert found.p == pytest.approx(stats.ttest_rel(left, right).pvalue)
    assert "t over 4 runs (few" in found.kind


def test_where_there_is_no_test_there_is_a_reason():
    assert (over_pairs([0.1], [0.2]).p, over_pairs([0.1], [0.2]).kind) == (None, "1 shared run, no test")
    assert over_pairs([0.1, 0.2], [0.2, 0.3]).p is None
    assert over_pairs([1.0] * 3, [0.5] * 3).kind == "all 3 differences equal, no t test"
    assert over_pairs([0.5] * 3, [0.5] * 3).p == 1.0


def test_six_targets_one_way_are_the_fewest_that_mcnemar_takes_for_a_difference():
    assert mcnemar(6, 0) == pytest.approx(0.03125) and mcnemar(0, 5) == pytest.approx(0.0625)
    assert mcnemar(3, 3) == mcnemar(0, 0) == 1.0
    assert mcnemar(9, 2) == pytest.approx(stats.binomtest(9, 11, 0.5).pvalue)


def test_two_of_sixteen_against_none_is_no_difference():
    assert fisher(2, 16, 0, 16) == pytest.approx(0.484, abs=5e-4)


def test_holm_is_the_textbook_example_and_keeps_order_and_gaps():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([None, 0.02, None, 0.5]) == [None, 0.04, None, 0.5]
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


@pytest.mark.parametrize(
    ("n", "half", "zero"), [(16, 0.22, 0.19), (32, 0.16, 0.11), (64, 0.12, 0.057), (100, 0.10, None), (300, 0.056, None), (1000, 0.031, None), (128, None, 0.029)]
)
def test_units_of_one_rate(n, half, zero):
    if half is not None:
        assert planning.half_width(n) == pytest.approx(half, abs=0.005)
        assert planning.units_for_half_width(planning.half_width(n)) == n
    if zero is not None:
        assert planning.bound_of_zero(n) == pytest.approx(zero, abs=0.005)


@pytest.mark.parametrize(("first", "second", "n"), [(0.125, 0, 58), (0.125, 0.0625, 341), (0.2, 0.1, 199), (0.5, 0.4, 388), (0.9375, 0.125, 5)])
def test_units_that_tell_two_rates_apart(first, second, n):
    assert planning.units_for_rates(first, second) == planning.units_for_rates(second, first) == n
    found = planning.detectable_rate(first, n)
    assert found is not None and found == pytest.approx(second, abs=0.035) and found >= second - 1e-6
    assert planning.units_for_rates(first, found) <= n


@pytest.mark.parametrize(("first", "second", "n"), [(0.125, 0, 61), (0.15, 0.05, 155)])
def test_paired_units(first, second, n):
    assert planning.units_for_discordance(first, second) == n


@pytest.mark.parametrize(("runs", "factor"), [(3, 2.48), (4, 1.59), (5, 1.24), (6, 1.05), (8, 0.84), (10, 0.72)])
def test_runs(runs, factor):
    assert planning.factor_of_runs(runs) == pytest.approx(factor, abs=0.005)
    assert planning.runs_for_half_width(0.1, 0.1 * planning.factor_of_runs(runs) + 1e-9) == runs


def test_the_detectable_difference_is_found_in_four_of_five_simulated_plans():
    difference, rng = planning.detectable(0.2, 5), np.random.default_rng(0)
    draws = rng.normal(difference, 0.2, (20_000, 5))
    assert np.mean(stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05) == pytest.approx(0.8, abs=0.01)
    assert planning.runs_to_detect(0.2, difference + 1e-6) == 5


def test_from_six_runs_on_the_plan_is_for_the_sign_flip_test_that_the_report_uses():
    # Six runs reach p < .05 only if all differences have one sign: norm.cdf(x) ** 6 = .8, the other side being nil.
    assert planning.detectable(1.0, 6) == pytest.approx(stats.norm.ppf(0.8 ** (1 / 6)), abs=0.02)
    rng = np.random.default_rng(1)
    for runs in (7, 9):
        draws = rng.normal(planning.detectable(0.2, runs), 0.2, (1500, runs))
        assert np.mean([sign_flip(one) < 0.05 for one in draws]) == pytest.approx(0.8, abs=0.035)
    assert planning.detectable(1.0, 5) < planning.detectable(1.0, 6), "five by t find more than six by signs"
    found = [planning.detectable(1.0, runs) for runs in range(6, 16)]
    assert found == sorted(found, reverse=True)
    assert planning.runs_to_detect(1.0, planning.detectable(1.0, 7)) == 7
    assert planning.runs_to_detect(1.0, planning.detectable(1.0, 6)) == 5


def test_differences_and_rates_that_no_plan_finds():
    assert planning.runs_to_detect(10.0, 0.001) is None and planning.runs_for_half_width(10.0, 0.001) is None
    assert planning.detectable_rate(0.05, 16) is None
