"""`bench status` and dry runs: what is done, running, failed and to do, without opening anybody's data."""

import errno
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmark import status
from benchmark.errors import BenchError
from benchmark.evaluate.measure import Evaluator
from benchmark.grid import read_grid
from benchmark.matrix import run_all, run_one, side_by_side
from benchmark.progress import silent
from benchmark.request import Asked, Request, absolute, plan

SETS = ("train.epochs=1", "data.n_pairs=128", "data.n_held_out=32", "data.n_clean=32", "data.n_test=100", "data.n_probe=200", "evaluation.linear_probe=none")
FAILING = '''
from benchmark.contract import Defense


class Broken(Defense):
    """Fails."""

    def defend(self, lab):
        raise ValueError("this is why")
'''


def request(results: Path, *defenses: str) -> Request:
    return Request(attacks=("none",), defenses=defenses, scale="smoke", sets=SETS, results=results, jobs=1, baseline=False)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A results folder with one finished and one failed cell, and the request of them and of one more."""
    folder = tmp_path_factory.mktemp("status")
    (folder / "broken.py").write_text(FAILING)
    asked = request(folder / "r", "clip", str(folder / "broken.py"), "random")
    outcomes = run_all(plan(asked)[:2], silent())
    assert [outcome.error is None for outcome in outcomes] == [True, False]
    return asked, outcomes


def test_states_of_a_grid_are_read_from_disk(ran):
    asked, outcomes = ran
    found = status.states(plan(asked))
    assert [state.where for state in found] == ["done", "failed", "to do"]
    assert found[0].run_id == outcomes[0].record["run_id"]
    assert "this is why" in found[1].why
    assert 0 < found[2].seconds < 60


def test_a_cell_that_runs_is_seen_until_its_process_lets_go(ran):
    cells = plan(ran[0])
    with status.noted(cells[2]):
        assert status.states(cells)[2].where == "running"
        assert any("running: none random seed 0 (process" in line for line in status.report([], cells[2].request.results))
    assert status.states(cells)[2].where == "to do"


def test_the_report_names_counts_reasons_and_time_left(ran):
    lines = status.report(plan(ran[0]), ran[0].results)
    assert lines[0].startswith("1 done, 0 running, 1 failed, 1 to do of 3 cells; about ")
    (failed,) = [line for line in lines if line.startswith("failed: ")]
    assert failed.startswith("failed: none broken@")
    assert failed.endswith(" seed 0: defense broken failed: ValueError: this is why")
    assert status.report([], ran[0].results)[0].startswith("1 done, 0 running, 1 failed in ")
    with pytest.raises(BenchError, match="no folder"):
        status.report([], ran[0].results / "nowhere")


def test_a_failure_is_forgotten_when_the_cell_succeeds(ran):
    cell = plan(ran[0])[0]
    status.note_failure(cell, "the disk was full")
    assert len(list(cell.request.results.glob("failed/*.json"))) == 2
    assert run_one(cell, silent()).error is None
    assert len(list(cell.request.results.glob("failed/*.json"))) == 1


def test_a_record_of_other_settings_is_not_this_cell(ran):
    other = replace(ran[0], sets=(*SETS, "train.lr=0.001"))
    assert status.states(plan(other)[:1])[0].where == "to do"


def test_committed_runs_of_before_an_option_came_are_done():
    grid = Path(__file__).parents[1] / "results" / "reference" / "stronger" / "grid.toml"
    cells = read_grid(grid, Request(device="cpu")).cells
    assert {state.where for state in status.states(cells)} == {"done"}


def test_a_dry_run_says_what_is_cached(ran):
    lines, hours = status.preview(plan(ran[0]), look=True)
    assert lines[0].startswith("none clip smoke[data.n_clean=32,")
    assert " seed 0: done " in lines[0]
    assert lines[2].endswith("cached: data, poison, packed pairs")
    assert "3 cells, 2 to do" in lines[3]
    assert 0 < hours < 1


def test_a_dry_run_decodes_no_image_of_the_users(tmp_path, monkeypatch):
    for name in ("images", "eval/train/red", "eval/train/blue", "eval/test/red", "eval/test/blue"):
        (tmp_path / name).mkdir(parents=True)
        Image.fromarray(np.zeros((32, 32, 3), dtype=np.uint8)).save(tmp_path / name / "0.png")
    (tmp_path / "pairs.tsv").write_text("image\tcaption\n" + "images/0.png\ta red cup\n" * 128)

    def decodes(*_):
        raise AssertionError("an image was decoded")

    monkeypatch.setattr("benchmark.data.source.decode_all", decodes)
    asked = replace(request(tmp_path / "r", "clip"), data=tmp_path / "pairs.tsv", eval=(str(tmp_path / "eval"),))
    lines, _ = status.preview(plan(asked), look=True)
    assert lines[0].endswith("nothing cached")
    assert not list((tmp_path / "r").rglob("*.part"))


def test_more_than_two_hours_are_said_first():
    lines, hours = status.preview(plan(Request(scale="small", sets=("train.epochs=4000",), jobs=1)), look=False)
    assert hours > 2
    assert lines[0] == f"about {hours:.1f} hours of work on this machine"


def test_a_full_disk_fails_the_cell_with_a_sentence_and_the_next_start_continues(ran, tmp_path, monkeypatch):
    cell = plan(replace(ran[0], results=tmp_path, sets=("train.epochs=2", *SETS[1:])))[0]

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("benchmark.train.loop.save_weights", full)
        outcome = run_one(cell, silent())
    assert outcome.error is not None
    assert "no room left on the disk" in outcome.error
    assert "no room left" in status.states([cell])[0].why
    assert run_one(cell, silent()).record == run_one(replace(cell, request=replace(cell.request, results=tmp_path / "undisturbed")), silent()).record
    assert not list(tmp_path.glob("failed/*.json"))


def test_an_unforeseen_error_fails_its_cell_alone_and_leaves_its_reason(ran, tmp_path, monkeypatch):
    cells = plan(replace(ran[0], results=tmp_path, defenses=("clip", "random")))
    measured = Evaluator.measure

    def breaks_once(*given):
        monkeypatch.setattr(Evaluator, "measure", measured)
        raise RuntimeError("the device is out of memory")

    monkeypatch.setattr(Evaluator, "measure", breaks_once)
    first, second = run_all(cells, silent())
    assert first.error is not None
    assert first.error.startswith("the run failed:\nTraceback")
    assert not first.bad_request
    assert second.error is None
    assert "out of memory" in status.states(cells)[0].why


def test_a_cell_has_one_name_wherever_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "eval").mkdir()
    asked = Asked("none", "clip", 0, Request(data=Path("pairs.tsv"), eval=("eval",), results=Path("r")))
    elsewhere = replace(absolute(asked), request=replace(absolute(asked).request, device="cuda", jobs=3))
    assert elsewhere.request.data == tmp_path / "pairs.tsv"
    assert status.cell_key(elsewhere) == status.cell_key(asked)
    assert status.cell_key(replace(asked, seed=1)) != status.cell_key(asked)


@pytest.mark.parametrize(
    ("given", "expected"),
    [({"device": "cpu"}, 16), ({"device": "cuda"}, 4), ({"device": "cuda", "scale": "paper"}, 1), ({"device": "cpu", "scale": "paper"}, 2), ({"device": "cuda", "jobs": 7}, 7)],
)
def test_cells_side_by_side_are_as_many_as_the_machine_holds(monkeypatch, given, expected):
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    assert side_by_side(Asked("none", "clip", 0, Request(**given))) == expected
