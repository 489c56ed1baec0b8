"""The pictures that the report shows of a poison: what is kept of it, and that they are the images of the poison."""

import json

import numpy as np
import pytest
from conftest import TINY
from PIL import Image

from benchmark.data.image import psnr
from benchmark.evaluate.attack_success import queries
from benchmark.evaluate.measure import Evaluator
from benchmark.evaluate.pictures import MOST_SIDE, N_EDITS, N_QUERIES, gallery_key, keep_pictures, open_pictures, thumbnail
from benchmark.progress import silent
from benchmark.registry import configure, find
from benchmark.report.records import Run
from benchmark.report.remake import remake_pictures
from benchmark.stages import Stages, file_sha256


def kept(results, name, options, poison_with, source, suite, sham=False):
    """The pictures of an attack on the tiny world, as a run would keep them."""
    poisoned, record = poison_with(name, options, sham=sham)
    probes = configure(find("attack", name), {}, options).probes(suite, record.kept)
    run = {"poison": {"manifest_sha256": record.header["poisoned_manifest_sha256"]}, "cards": {name: {}}}
    asked = {probe.name: queries(probe, suite) for probe in probes}
    keep_pictures(results, run, source, suite, poisoned, record, probes, lambda: asked)
    return run, record, asked


def pixels(found, name):
    return np.asarray(Image.open(found["folder"] / name))


def test_a_backdoor_shows_pairs_before_and_after_and_queries_with_the_trigger(tmp_path, poison_with, source, suite):
    run, record, asked = kept(tmp_path, "backdoor", {"rate": 0.05}, poison_with, source, suite)
    found = open_pictures(tmp_path, run)
    assert len(found["edits"]) == N_EDITS
    rows = record.rows.set_index("id")
    for edit in found["edits"]:
        row = source.train.ids.index(edit["id"])
        assert (pixels(found, edit["before"]) == source.train.image(row)).all()
        assert psnr(pixels(found, edit["before"]), pixels(found, edit["after"])) == pytest.approx(edit["psnr"]) == pytest.approx(rows.loc[edit["id"], "psnr"])
        assert 0 < edit["ssim"] < 1
        assert (edit["caption_before"], edit["caption_after"]) == tuple(rows.loc[edit["id"], ["caption_before", "caption_after"]])
        assert edit["goal"] == "boat"
    shown = found["queries"]["backdoor"]
    assert len(shown) == N_QUERIES == len({query["true"] for query in shown})
    for query in shown:
        index = asked["backdoor"].ids.index(query["id"])
        assert (pixels(found, query["triggered"]) == asked["backdoor"].triggered[index]).all()
        assert query["true"] != query["goal"] == suite.main.index("boat")


def test_a_targeted_attack_shows_every_target_and_edits_of_different_targets(tmp_path, poison_with, source, suite):
    run, record, _ = kept(tmp_path, "targeted", {"n_targets": 3, "captions_per_target": 2}, poison_with, source, suite)
    found = open_pictures(tmp_path, run)
    shown = found["queries"]["targeted"]
    assert [query["id"] for query in shown] == [target["id"] for target in record.kept["targets"]]
    for query, image in zip(shown, record.kept["images"], strict=True):
        assert query["triggered"] is None
        assert (pixels(found, query["image"]) == image).all()
    assert len({edit["goal"] for edit in found["edits"]}) == 3
    assert all(edit["before"] is None and edit["caption_before"] == "" for edit in found["edits"]), "the target's image is added as it is"


def test_pictures_are_the_same_bytes_every_time_and_made_once(tmp_path, poison_with, source, suite):
    run, *_ = kept(tmp_path / "a", "backdoor", {"rate": 0.05}, poison_with, source, suite)
    kept(tmp_path / "b", "backdoor", {"rate": 0.05}, poison_with, source, suite)
    first, second = (open_pictures(tmp_path / name, run)["folder"] for name in "ab")
    assert {path.name: file_sha256(path) for path in first.iterdir()} == {path.name: file_sha256(path) for path in second.iterdir()}
    before = (first / "gallery.json").stat().st_mtime_ns
    kept(tmp_path / "a", "backdoor", {"rate": 0.05}, poison_with, source, suite)
    assert (first / "gallery.json").stat().st_mtime_ns == before
    assert sum(path.stat().st_size for path in first.iterdir()) < 60_000


def test_other_questions_have_pictures_of_their_own_and_damaged_ones_are_not_shown(tmp_path, poison_with, source, suite):
    run, *_ = kept(tmp_path, "backdoor", {"rate": 0.05}, poison_with, source, suite)
    assert gallery_key({**run, "cards": {"other": {}}}) != gallery_key(run)
    assert open_pictures(tmp_path, {**run, "cards": {"other": {}}}) is None
    folder = open_pictures(tmp_path, run)["folder"]
    next(folder.glob("*.png")).write_bytes(b"")
    assert open_pictures(tmp_path, run) is None
    kept(tmp_path, "backdoor", {"rate": 0.05}, poison_with, source, suite)
    assert open_pictures(tmp_path, run) is not None


def test_a_run_without_poison_keeps_none(tmp_path, poison_with, source, suite):
    kept(tmp_path, "none", {}, poison_with, source, suite)
    assert not (tmp_path / "gallery").exists()


def test_large_images_are_shown_smaller():
    image = np.random.default_rng(0).integers(0, 256, (224, 224, 3)).astype(np.uint8)
    assert thumbnail(image).shape == (MOST_SIDE, MOST_SIDE, 3)
    assert thumbnail(image[:32, :32]) is not None and (thumbnail(image[:32, :32]) == image[:32, :32]).all()


def test_the_index_is_plain_json(tmp_path, poison_with, source, suite):
    run, *_ = kept(tmp_path, "backdoor", {"rate": 0.05}, poison_with, source, suite)
    text = (open_pictures(tmp_path, run)["folder"] / "gallery.json").read_text()
    assert json.loads(text)["classes"]["objects"] == list(suite.main.classnames)


def recorded(results, name, options, poison_with, source, suite):
    """A run of which the record alone is left."""
    _, record = poison_with(name, options)
    attack = configure(find("attack", name), {}, options)
    about = {"n_poison": record.n_poison, "manifest_sha256": record.header["poisoned_manifest_sha256"]}
    resolved = {"attack": {"name": name, "file": False, "options": attack.model_dump(mode="json")}, "data": TINY.model_dump(), "sham": False, "seed": 0}
    cards = Evaluator(suite, attack.probes(suite, record.kept), "", Stages(results)).cards()
    label = {"attack": name, "defense": "clip"}
    return Run({"poison": about, "resolved": resolved, "cards": cards, "label": label, "data": {"name": "drawn"}}, {}, results / "runs" / name)


def test_pictures_of_older_records_are_made_again_from_the_same_poison(tmp_path, poison_with, source, suite, stages):
    runs = [recorded(tmp_path, *attack, poison_with, source, suite) for attack in (("backdoor", {"rate": 0.05}), ("none", {}))]
    assert remake_pictures(runs, stages.root, silent()) == []
    again = open_pictures(tmp_path, runs[0].record)
    run, *_ = kept(tmp_path / "first", "backdoor", {"rate": 0.05}, poison_with, source, suite)
    first = open_pictures(tmp_path / "first", run)
    assert {name: value for name, value in again.items() if name != "folder"} == {name: value for name, value in first.items() if name != "folder"}
    assert len(list((tmp_path / "gallery").iterdir())) == 1, "there is nothing to show of a run without poison"


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda record: record["poison"].update(manifest_sha256="0"), "makes another poison"),
        (lambda record: record["cards"].popitem(), "asks other questions"),
        (lambda record: record["data"].update(name="cc3m"), "not drawn ones"),
        (lambda record: record["resolved"]["attack"].update(file=True), "given by a file"),
        (lambda record: record["resolved"]["attack"].update(name="gone"), "unknown attack"),
    ],
)
def test_pictures_that_would_not_be_the_records_are_not_made(change, reason, tmp_path, poison_with, source, suite, stages):
    run = recorded(tmp_path, "backdoor", {"rate": 0.05}, poison_with, source, suite)
    change(run.record)
    (note,) = remake_pictures([run], stages.root, silent())
    assert reason in note and note.startswith("no pictures of backdoor, seed 0")
    assert not (tmp_path / "gallery").exists()
