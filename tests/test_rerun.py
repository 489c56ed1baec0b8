"""A recorded run comes out again from its own settings, and what cannot be run again says why."""

import json

import pytest
from test_cell import TINY

from benchmark.cell import run_cell
from benchmark.errors import BenchError
from benchmark.matrix import open_cell
from benchmark.progress import silent
from benchmark.report.difference import find_run
from benchmark.report.records import Run
from benchmark.request import Request, plan
from benchmark.rerun import asked_again, rerun
from benchmark.settings import canonical


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    results = tmp_path_factory.mktemp("results")
    (asked,) = plan(
        Request(
            ("targeted",),
            ("roclip+aug",),
            (3,),
            scale="smoke",
            sets=(*TINY, "attack.captions_per_target=2", "roclip.pool_fraction=0.3", "augment.text=none"),
            results=results,
            baseline=False,
        )
    )
    record = run_cell(open_cell(asked, silent()))
    return find_run(record["run_id"], results), results


def test_the_same_record_comes_out_of_other_folders(recorded, tmp_path):
    run, results = recorded
    again = rerun(run, tmp_path / "again", silent(), {}, cache=results / "cache")
    assert again.same and again.lines == [f"{run.record['run_id']}: the same record, byte for byte"]
    assert (again.run.folder / "record.json").read_bytes() == (run.folder / "record.json").read_bytes()


def test_a_record_that_does_not_come_out_again_is_shown_where_it_differs(recorded, tmp_path):
    run, results = recorded
    record = json.loads(json.dumps(run.record))
    next(entry for entry in record["metrics"] if entry["name"] == "asr")["value"] = 0.123
    again = rerun(Run(record, {}, run.folder), tmp_path / "again", silent(), {}, cache=results / "cache")
    assert not again.same
    assert any(line.startswith("  asr/targeted: 0.123 -> ") for line in again.lines)


def test_a_run_of_other_code_is_the_same_if_its_numbers_are(recorded, tmp_path):
    run, results = recorded
    record = json.loads(json.dumps(run.record))
    record["resolved"]["attack"]["source"] = "older"
    record["run_id"] = "0123456789ab"
    again = rerun(Run(record, {}, run.folder), tmp_path / "again", silent(), {}, cache=results / "cache")
    assert again.same
    assert again.lines[0] == "the same numbers, although the settings have changed in attack.source"


def changed(run: Run, change) -> Run:
    record = json.loads(canonical(run.record))
    change(record["resolved"])
    return Run(record, {}, run.folder)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda resolved: resolved.update(train="unknown"), "measure it again with bench eval"),
        (lambda resolved: resolved.update(scale="huge"), "of scale 'huge'"),
        (lambda resolved: resolved.update(dataset="cc3m"), "give it with --data and --eval"),
        (lambda resolved: resolved["defense"].update(file=True), "give its path with --defense"),
    ],
)
def test_what_cannot_be_run_again_says_why(recorded, tmp_path, change, reason):
    with pytest.raises(BenchError, match=reason):
        asked_again(changed(recorded[0], change), tmp_path, {}, None, (), None)


def test_other_data_and_the_folder_of_the_record_itself_are_refused(recorded, tmp_path):
    run, results = recorded
    with pytest.raises(BenchError, match="data_hash of the record is other"):
        rerun(changed(run, lambda resolved: resolved.update(data_hash="other")), tmp_path, silent(), {}, cache=results / "cache")
    with pytest.raises(BenchError, match="choose another folder with --out"):
        rerun(run, results, silent(), {}, cache=results / "cache")
