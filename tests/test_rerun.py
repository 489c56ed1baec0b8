"""A recorded run comes out again from its own settings, and what cannot be run again says why."""

import json
from dataclasses import replace

import pytest
from test_cell import TINY

from benchmark.cell import run_cell
from benchmark.data import world
from benchmark.data.image import png_bytes
from benchmark.data.reading import Reading
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
    again = rerun(run, Request(results=tmp_path / "again", cache=results / "cache"), silent(), {})
    assert again.same and again.lines == [f"{run.record['run_id']}: the same record, byte for byte"]
    assert (again.run.folder / "record.json").read_bytes() == (run.folder / "record.json").read_bytes()


def test_a_record_that_does_not_come_out_again_is_shown_where_it_differs(recorded, tmp_path):
    run, results = recorded
    record = json.loads(json.dumps(run.record))
    next(entry for entry in record["metrics"] if entry["name"] == "asr")["value"] = 0.123
    again = rerun(Run(record, {}, run.folder), Request(results=tmp_path / "again", cache=results / "cache"), silent(), {})
    assert not again.same
    assert any(line.startswith("  asr/targeted: 0.123 -> ") for line in again.lines)


def test_a_run_of_other_code_is_the_same_if_its_numbers_are(recorded, tmp_path):
    run, results = recorded
    record = json.loads(json.dumps(run.record))
    record["resolved"]["attack"]["source"] = "older"
    record["run_id"] = "0123456789ab"
    again = rerun(Run(record, {}, run.folder), Request(results=tmp_path / "again", cache=results / "cache"), silent(), {})
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
        asked_again(changed(recorded[0], change), Request(results=tmp_path), {})


def test_other_data_and_the_folder_of_the_record_itself_are_refused(recorded, tmp_path):
    run, results = recorded
    with pytest.raises(BenchError, match="data_hash of the record is other"):
        rerun(changed(run, lambda resolved: resolved.update(data_hash="other")), Request(results=tmp_path, cache=results / "cache"), silent(), {})
    with pytest.raises(BenchError, match="choose another folder with --out"):
        rerun(run, Request(results=results, cache=results / "cache"), silent(), {})


def test_a_run_on_data_of_ones_own_wants_them_read_as_they_were(tmp_path):
    rows = ["picture\twords\n"]
    for row in range(160):
        (tmp_path / f"{row}.png").write_bytes(png_bytes(world.drawn_row(0, "train", row, 32).image))
        rows.append(f"{row}.png\t{world.scene(0, 'train', row).captions[0]}\n")
    (tmp_path / "pairs.tsv").write_text("".join(rows))
    for row in range(24):
        shown = tmp_path / "colours" / "test" / world.scene(0, "test", row).colour
        shown.mkdir(parents=True, exist_ok=True)
        (shown / f"{row}.png").write_bytes(png_bytes(world.drawn_row(0, "test", row, 32).image))
    reading = Reading("own", "picture", "words")
    given = Request(data=tmp_path / "pairs.tsv", eval=(str(tmp_path / "colours"),), templates="openai", reading=reading, results=tmp_path / "r", cache=tmp_path / "cache")
    (asked,) = plan(replace(given, attacks=("none",), defenses=("clip",), scale="smoke", sets=("train.epochs=1", "evaluation.linear_probe=none")))
    run = find_run(run_cell(open_cell(asked, silent()))["run_id"], tmp_path / "r")
    assert rerun(run, replace(given, results=tmp_path / "again"), silent(), {}).same
    with pytest.raises(BenchError, match=r"suite_hash of the record .* whatever else of --templates"):
        rerun(run, replace(given, results=tmp_path / "again", templates="set"), silent(), {})
