"""Dose-response: the fit finds a known curve, admits what it cannot know, and the report knows which option is the dose."""

import numpy as np
import pytest
from test_report import run

from benchmark.errors import BenchError
from benchmark.evaluate.dose import fit_dose
from benchmark.report.dose import COLUMNS, dose_curves, dose_markdown, dose_table

DOSES = (32, 64, 80, 128, 256)


def response(dose, floor=0.02, top=0.98, middle=70.0, slope=4.0):
    return floor + (top - floor) / (1 + np.exp(-slope * (np.log(dose) - np.log(middle))))


def spread(curve, size=0.05):
    return {dose: [float(np.clip(curve(dose) + change, 0, 1)) for change in (-size, 0.0, size)] for dose in DOSES}


def test_the_fit_finds_the_curve_that_made_the_values():
    fit = fit_dose({dose: [float(response(dose))] * 3 for dose in DOSES}, resamples=20)
    assert (fit.floor, fit.top, fit.middle, fit.slope) == pytest.approx((0.02, 0.98, 70.0, 4.0), rel=0.05, abs=0.01)
    assert fit.n50 == pytest.approx(70.0, rel=0.01)
    assert (fit.low, fit.high) == pytest.approx((fit.n50, fit.n50), rel=0.01), "runs that agree leave nothing to resample"
    assert fit(np.array(DOSES)) == pytest.approx(response(np.array(DOSES)), abs=0.01)


def test_the_interval_contains_the_count_and_widens_with_the_spread():
    tight, wide = (fit_dose(spread(response, size), resamples=60) for size in (0.03, 0.15))
    for fit in (tight, wide):
        assert fit.low is not None and fit.high is not None and fit.n50 is not None
        assert fit.low <= fit.n50 <= fit.high
    assert wide.high - wide.low > 2 * (tight.high - tight.low)
    assert fit_dose(spread(response, 0.15), resamples=60) == wide, "the same runs give the same interval"


def test_a_jump_without_a_dose_in_between_is_known_no_better_than_the_gap():
    fit = fit_dose({dose: [float(dose > 80)] * 3 for dose in DOSES}, resamples=20)
    assert (fit.low, fit.high) == pytest.approx((80.0, 128.0))
    assert fit.note == "no dose lies on the slope, between 80 and 128 rows"


@pytest.mark.parametrize(
    ("curve", "note"),
    [
        (lambda dose: 1.0, "above 50 % from the smallest dose on (32 rows)"),
        (lambda dose: 0.1, "below 50 % up to the largest dose (256 rows); the curve levels off at 10 %"),
    ],
)
def test_a_count_outside_the_doses_is_not_extrapolated(curve, note):
    fit = fit_dose(spread(curve, 0.0), resamples=10)
    assert (fit.n50, fit.low, fit.high, fit.note) == (None, None, None, note)


def test_an_interval_that_reaches_beyond_the_doses_stays_open():
    values = {dose: [0.0, 0.2, 1.0] if dose == 256 else [0.0, 0.1, 0.2] for dose in DOSES}
    fit = fit_dose(values, resamples=100)
    assert fit.high is None
    assert fit.n50 is None or "open above 256 rows" in fit.note


@pytest.mark.parametrize(
    ("values", "reason"), [({8: [0.1] * 3, 16: [0.2] * 3}, "2 doses, a fit wants 5"), ({dose: [0.5] * (2 if dose == 80 else 3) for dose in DOSES}, "fewer than 3 runs at 80 rows")]
)
def test_too_few_doses_or_runs_are_not_fitted(values, reason):
    with pytest.raises(ValueError, match=reason):
        fit_dose(values)


def test_a_dose_of_no_rows_is_left_out_of_the_fit():
    values = {dose: [float(response(dose))] * 3 for dose in DOSES}
    assert fit_dose({0: [0.0]} | values, resamples=10) == fit_dose(values, resamples=10)
    with pytest.raises(ValueError, match="4 doses, a fit wants 5"):
        fit_dose({0: [0.0] * 3} | dict(list(values.items())[:4]))


def dosed(n_poison, seed, asr, defense="clip", size=8, rate=None):
    one = run(seed, asr, defense=defense)
    rate = n_poison / 1000 if rate is None else rate
    one.record["poison"] = {"n_poison": n_poison, "poison_rate": rate, "targets": []}
    one.record["resolved"]["attack"]["options"] = {"rate": rate, "size": size}
    inside = [f"rate={rate}"] if n_poison != 10 else []
    inside += [f"size={size}"] if size != 8 else []
    one.record["label"]["attack"] = "backdoor" + (f"[{','.join(inside)}]" if inside else "")
    return one


def test_the_dose_is_the_option_that_changes_the_number_of_rows_and_others_split_the_curves():
    runs = [dosed(n, seed, float(response(n, middle=20.0)), size=size) for n in (5, 10, 20, 40, 80) for seed in range(3) for size in (8, 5)]
    runs += [dosed(n, 0, 0.1, defense="roclip") for n in (5, 10)]
    curves = dose_curves(runs)
    assert [(curve.attack, curve.defense, curve.option, len(curve.points)) for curve in curves] == [
        ("backdoor", "clip", "rate", 5),
        ("backdoor[size=5]", "clip", "rate", 5),
        ("backdoor", "roclip", "rate", 2),
    ]
    assert [point.n_poison for point in curves[0].points] == [5, 10, 20, 40, 80]
    assert curves[0].fit is not None and curves[0].fit.n50 == pytest.approx(20.0, rel=0.05)
    assert curves[2].fit is None and curves[2].note == "2 doses, a fit wants 5"
    table = dose_table(curves)
    assert tuple(table.columns) == COLUMNS
    assert table["n50"].isna().tolist() == [False, False, True]
    shown = dose_markdown(curves)
    assert "20 [20, 20]" in shown and "2 doses, a fit wants 5" in shown and "5: 10.0 %" in shown


@pytest.mark.parametrize(("units", "per_target"), [("targets", 5.0), ("images of targets", 5.0), ("queries", None)])
def test_rows_are_counted_for_each_target_only_where_targets_are_what_counts(units, per_target):
    runs = [dosed(n, seed, float(response(n, middle=20.0))) for n in (5, 10, 20, 40, 80) for seed in range(3)]
    for one in runs:
        one.record["poison"]["targets"] = [{"class": str(index)} for index in range(4)]
        for entry in one.values("asr"):
            entry["units"] = units
    curves = dose_curves(runs)
    found = dose_table(curves)["per_target"][0]
    assert found is None or np.isnan(found) if per_target is None else found == pytest.approx(per_target, rel=0.05)
    assert (" | 5.0 | " in dose_markdown(curves)) == (per_target is not None)


def test_another_scale_makes_no_dose_of_an_option_that_does_not_change_the_rows():
    runs = [dosed(n, seed, float(response(n, middle=20.0))) for n in (5, 10, 20, 40, 80) for seed in range(3)]
    for size in range(1, 8):
        for n_poison, scale in ((10, "small"), (100, "medium")):
            other = dosed(n_poison, 0, 0.5, size=size, rate=0.01)
            other.record["label"]["scale"] = other.record["resolved"]["scale"] = scale
            runs.append(other)
    assert {curve.option for curve in dose_curves(runs)} == {"rate"}


def test_rows_a_target_are_not_counted_where_the_number_of_targets_is_the_dose():
    runs = [dosed(n, seed, float(response(n, middle=20.0))) for n in (5, 10, 20, 40, 80) for seed in range(3)]
    for one in runs:
        one.record["poison"]["targets"] = [{"class": str(index)} for index in range(one.record["poison"]["n_poison"])]
        for entry in one.values("asr"):
            entry["units"] = "targets"
    assert dose_table(dose_curves(runs))["per_target"].isna().all()


def test_a_dose_without_a_rate_in_a_run_is_named():
    runs = [dosed(n, seed, float(response(n, middle=20.0))) for n in (5, 10, 20, 40, 80, 160) for seed in range(3)]
    runs[4].values("asr")[0]["value"] = None
    (curve,) = dose_curves(runs)
    assert len(curve.points) == 5 and curve.fit is not None and curve.note.startswith("no rate in every run at 10 rows")


def test_runs_of_one_dose_have_no_curve():
    with pytest.raises(BenchError, match="more than one dose"):
        dose_curves([dosed(10, seed, 0.5) for seed in range(3)])
    with pytest.raises(BenchError, match="more than one dose"):
        dose_curves([dosed(10, 0, 0.5), dosed(10, 0, 0.5, size=5)])


def test_an_option_of_words_is_no_dose_though_it_changes_the_number_of_rows():
    runs = [dosed(n, seed, 0.5) for n in (5, 10) for seed in range(3)]
    for one in runs:
        one.record["resolved"]["attack"]["options"] = {"mode": "word" if one.record["poison"]["n_poison"] == 5 else "sentence"}
    with pytest.raises(BenchError, match="more than one dose"):
        dose_curves(runs)


def test_doses_that_come_to_one_number_of_rows_are_not_fitted_and_other_training_is_another_curve():
    runs = [dosed(n, seed, float(response(n, middle=20.0))) for n in (5, 10, 20, 40, 80) for seed in range(3)]
    again = [dosed(10, seed, 0.5, rate=0.0104) for seed in range(3)]
    (curve,) = dose_curves([*runs, *again])
    assert curve.fit is None and curve.note == "several doses come to 10 rows"
    for one in again:
        one.record["resolved"]["train"] = {"epochs": 99}
    assert [curve.fit is None for curve in dose_curves([*runs, *again])] == [False]
