"""Predictions survive their slim form, and committed ones give the numbers of their records."""

import numpy as np
import pandas as pd
import pytest

from benchmark.errors import BenchError
from benchmark.evaluate.predictions import FOLDER, PRECISION, SLIM, read_predictions, write_slim
from benchmark.kept import slim
from benchmark.stages import seal


def tables(n: int = 400) -> dict[str, pd.DataFrame]:
    rng = np.random.default_rng(0)
    attack = pd.DataFrame(
        {
            "query_id": [f"test/plain/{index}" for index in range(n)],
            "true": rng.integers(0, 20, n),
            "goal": np.full(n, 3),
            "counted": rng.random(n) < 0.9,
            "rank_goal": rng.integers(1, 1000, n),
            "margin": rng.normal(size=n).astype(np.float32),
        }
    )
    few = pd.DataFrame({"query_id": ["b/9", "b/11", "ünï"], "true": [0, -1, 70_000], "pred": [1, 2, 300], "note": ["x", None, ""]})
    clash = pd.DataFrame({"query_id": ["a1", "a2"], "margin": [2, 5], "goal": [1 << 40, 0]})
    return {"attack-backdoor": attack, "zero_shot-objects": attack[["query_id", "true"]].assign(pred=attack["goal"]), "attack-few": few, "attack-clash": clash}


def test_every_table_comes_back_with_its_columns_types_and_rows(tmp_path):
    given = tables()
    write_slim(given, tmp_path / SLIM)
    found = read_predictions(tmp_path)
    assert list(found) == list(given)
    for name, table in given.items():
        exact = [column for column in table.columns if table[column].dtype.kind != "f"]
        pd.testing.assert_frame_equal(found[name][exact], table[exact])
        assert list(found[name].columns) == list(table.columns)
    margin = given["attack-backdoor"]["margin"].to_numpy()
    assert np.all(np.abs(found["attack-backdoor"]["margin"].to_numpy() - margin) <= PRECISION * np.abs(margin))
    assert found["attack-backdoor"]["margin"].nunique() > 350


def test_the_slim_form_is_a_few_bytes_a_query(tmp_path):
    n = 4000
    write_slim(tables(n), tmp_path / SLIM)
    assert (tmp_path / SLIM).stat().st_size < 8 * n


def test_values_that_are_not_finite_stay_so(tmp_path):
    values = np.array([np.inf, -np.inf, np.nan, 0.0, 1e-40, 3.0], dtype=np.float32)
    write_slim({"a": pd.DataFrame({"margin": values})}, tmp_path / SLIM)
    np.testing.assert_array_equal(read_predictions(tmp_path)["a"]["margin"].to_numpy()[[0, 1, 2, 3, 5]], values[[0, 1, 2, 3, 5]])


def test_a_file_that_is_no_predictions_file_is_named(tmp_path):
    (tmp_path / SLIM).write_bytes(b"PAR1")
    with pytest.raises(BenchError, match=r"predictions\.parquet cannot be read"):
        read_predictions(tmp_path)
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / SLIM)
    with pytest.raises(BenchError, match=r"predictions\.parquet cannot be read"):
        read_predictions(tmp_path)


def test_a_table_is_made_slim_in_place_and_its_records_stay(tmp_path):
    run = tmp_path / "runs" / "0123456789ab"
    (run / FOLDER).mkdir(parents=True)
    for name, table in tables().items():
        table.to_parquet(run / FOLDER / f"{name}.parquet")
    (run / "record.json").write_text('{"run_id": "0123456789ab"}')
    seal(run, {})
    before, after = slim(tmp_path)
    assert after < before / 2
    assert sorted(path.name for path in run.iterdir()) == ["done.json", SLIM, "record.json"]
    assert (run / "record.json").read_text() == '{"run_id": "0123456789ab"}'
    assert slim(tmp_path) == (after, after)
    (run / "record.json").write_text("{}")
    with pytest.raises(BenchError, match="is damaged"):
        slim(tmp_path)
    with pytest.raises(BenchError, match="no runs in"):
        slim(tmp_path / "elsewhere")
