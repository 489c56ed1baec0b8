"""Committed runs are found again after the code has moved on, and only while they still say what it would."""

import json
import shutil
from pathlib import Path

import pytest
from test_cell import TINY

from benchmark.cell import run_cell
from benchmark.kept import _index, find_kept, keep
from benchmark.matrix import open_cell
from benchmark.progress import silent
from benchmark.request import Request, plan
from benchmark.stages import seal


def cell_of(results: Path, *sets: str, seed: int = 0):
    (asked,) = plan(Request(("backdoor",), ("clip",), (seed,), scale="smoke", sets=(*TINY, *sets), results=results, baseline=False))
    return open_cell(asked, silent())


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return tmp_path_factory.mktemp("results")


@pytest.fixture
def runs(results, tmp_path):
    """A folder with one kept run."""
    cell = cell_of(results)
    run_cell(cell)
    keep(cell.folder, tmp_path / cell.settings.run_id)
    return tmp_path


OTHER = "0123456789ab"


def rewrite(runs: Path, change) -> None:
    """As if the run had been kept by other code: its record changed, under another run id."""
    (folder,) = (path for path in runs.iterdir() if path.is_dir())
    record = json.loads((folder / "record.json").read_text())
    change(record)
    record["run_id"] = OTHER
    (folder / "done.json").unlink()
    (folder / "record.json").write_text(json.dumps(record))
    seal(folder, {})
    folder.rename(runs / OTHER)
    _index.cache_clear()


def older_attack(record) -> None:
    record["resolved"]["attack"]["source"] = "other code"
    del record["resolved"]["attack"]["options"]["overflow"]


def test_a_kept_run_is_found_by_its_id_and_a_damaged_one_is_not(results, runs):
    cell = cell_of(results)
    assert find_kept(cell, runs)["run_id"] == cell.settings.run_id
    assert find_kept(cell_of(results, seed=1), runs) is None
    (runs / cell.settings.run_id / "record.json").write_text("{}")
    _index.cache_clear()
    assert find_kept(cell, runs) is None


def test_a_run_whose_keeping_was_stopped_before_its_last_step_is_found(results, runs):
    cell = cell_of(results)
    own = runs / cell.settings.run_id
    part = own.rename(own.with_name(own.name + ".part"))
    _index.cache_clear()
    assert find_kept(cell_of(results, seed=1), runs) is None
    assert part.is_dir(), "a half is nobody else's run"
    assert find_kept(cell, runs)["run_id"] == own.name
    assert own.is_dir() and not part.exists()
    shutil.copytree(own, part)
    (own / "record.json").unlink()  # stopped while the old folder was being removed
    _index.cache_clear()
    assert find_kept(cell, runs)["run_id"] == own.name


def test_other_attack_code_that_makes_the_same_poison_changes_nothing(results, runs):
    cell = cell_of(results)
    rewrite(runs, older_attack)
    assert find_kept(cell_of(results, "attack.overflow=wrap"), runs) is None
    assert find_kept(cell, runs) is not None
    assert [folder.name for folder in runs.iterdir()] == [cell.settings.run_id]
    assert (runs / cell.settings.run_id / "record.json").read_bytes() == (cell.folder / "record.json").read_bytes()


def test_what_a_defense_was_asked_after_training_does_not_hide_its_run(results, runs):
    rewrite(runs, lambda record: (older_attack(record), record["cards"].update(one={"audit": "clip"}, two={"eval_set": "objects", "detector": "clip"}, three={"defense": "clip"})))
    assert find_kept(cell_of(results), runs) is not None


def test_a_record_that_another_worker_moves_meanwhile_is_passed_over(results, runs, monkeypatch):
    """The folder is gone between the listing and the reading; the cell's own record is found all the same."""
    cell = cell_of(results)
    rewrite(runs, older_attack)
    gone = runs / "ffffffffffff" / "record.json"
    listed = Path.glob
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [*listed(self, pattern), *([gone] if self == runs else [])])
    assert find_kept(cell, runs) is not None


def other_poison(record) -> None:
    record["poison"]["manifest_sha256"] = "0"


def other_questions(record) -> None:
    record["cards"].popitem()


def other_defense(record) -> None:
    record["resolved"]["defense"]["source"] = "other code"


def an_option_of_the_past(record) -> None:
    record["resolved"]["attack"]["options"]["colour"] = "red"


@pytest.mark.parametrize("change", [other_poison, other_questions, other_defense, an_option_of_the_past])
def test_a_kept_run_that_would_come_out_otherwise_is_not_taken(results, runs, change):
    rewrite(runs, lambda record: (older_attack(record), change(record)))
    assert find_kept(cell_of(results), runs) is None
