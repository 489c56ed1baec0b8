"""The committed table of interval coverage is what the code gives, and the documents say where intervals are too narrow."""

import csv
from pathlib import Path

import pytest
from scipy import stats

from benchmark.evaluate.coverage import COLUMNS, row, settings
from benchmark.evaluate.statistics import wilson

ROOT = Path(__file__).parents[1]
ROWS = list(csv.DictReader((ROOT / "results" / "coverage.csv").read_text().splitlines()))


def of(**wanted):
    (found,) = (one for one in ROWS if all(one[name] == str(value) for name, value in wanted.items()))
    return found


def test_the_table_has_every_setting_once():
    assert tuple(ROWS[0]) == COLUMNS
    assert [tuple(one[name] for name in COLUMNS[:5]) for one in ROWS] == [tuple(map(str, setting)) for setting in settings()]


EXACT = [setting for setting in settings() if setting[3] == 1 or (setting[3] == 3 and setting[2] == 16)]
DRAWN = [("t", 0.125, 16, 5, 0.3), ("t", 0.9, 32, 10, 0.0), ("bootstrap", 0.5, 16, 5, 0.3)]


@pytest.mark.parametrize("setting", [*EXACT, *DRAWN], ids=str)
def test_the_code_still_gives_the_row(setting):
    interval, rate, n, runs, spread = setting
    assert list(of(interval=interval, rate=rate, n=n, runs=runs, spread=spread).values()) == row(*setting).text()


@pytest.mark.slow
@pytest.mark.parametrize("setting", [one for one in settings() if one not in EXACT and one not in DRAWN], ids=str)
def test_the_code_still_gives_every_row(setting):
    interval, rate, n, runs, spread = setting
    assert list(of(interval=interval, rate=rate, n=n, runs=runs, spread=spread).values()) == row(*setting).text()


def test_wilsons_rows_equal_a_sum_over_the_binomial():
    for rate in (0.03, 0.5):
        inside = sum(stats.binom.pmf(k, 16, rate) for k in range(17) if wilson(k, 16)[0] <= rate <= wilson(k, 16)[1])
        assert float(of(interval="wilson", rate=rate, n=16, runs=1, spread=0.0)["coverage"]) == pytest.approx(inside, abs=5e-5)
