"""Stages: published whole or not at all, damage seen, one maker at a time; and the guard of sealed folders."""

import json
import multiprocessing
import os
import threading
import time
from pathlib import Path

import pandas as pd
import pytest
from pyarrow import parquet

from benchmark.errors import BenchError, PluginError
from benchmark.guard import sealed
from benchmark.stages import DONE, Stages, damage, drop_files, file_sha256, write_atomically

FACTS = {"stage": "letters", "n": 3}


def build(folder: Path) -> None:
    (folder / "inner").mkdir(exist_ok=True)
    (folder / "a.txt").write_text("a")
    (folder / "inner" / "b.txt").write_text("bb")


def no_build(folder: Path) -> None:
    raise AssertionError("made a second time")


def test_a_stage_is_made_once_and_lists_its_files(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    folder = stages.make("letters", FACTS, build)
    assert stages.make("letters", FACTS, no_build) == folder == stages.open("letters", FACTS) == stages.path("letters", FACTS)
    marker = json.loads((folder / DONE).read_text())
    assert marker == {"facts": FACTS, "files": {"a.txt": [1, file_sha256(folder / "a.txt")], "inner/b.txt": [2, file_sha256(folder / "inner" / "b.txt")]}}
    assert stages.make("letters", {**FACTS, "n": 4}, build) != folder


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (lambda folder: (folder / "a.txt").write_text("b"), "a.txt has other bytes than when it was written"),
        (lambda folder: (folder / "a.txt").write_text("long"), "a.txt has 4 bytes instead of 1"),
        (lambda folder: (folder / "inner" / "b.txt").unlink(), "inner/b.txt is missing"),
        (lambda folder: (folder / DONE).unlink(), "done.json is missing or broken"),
        (lambda folder: (folder / DONE).write_text("{"), "done.json is missing or broken"),
        (lambda folder: (folder / DONE).write_text("[]"), "done.json is missing or broken"),
        (lambda folder: (folder / DONE).write_text('{"files": {"a.txt": 1}}'), "done.json is missing or broken"),
    ],
)
def test_damage_is_named_and_the_stage_made_again(tmp_path: Path, harm: object, problem: str) -> None:
    said: list[str] = []
    stages = Stages(tmp_path, said.append)
    folder = stages.make("letters", FACTS, build)
    harm(folder)  # type: ignore[operator]
    assert damage(folder) == problem
    assert stages.open("letters", FACTS) is None
    assert stages.make("letters", FACTS, build) == folder
    assert said == [f"{folder} is damaged ({problem}); making it again"]
    assert damage(folder, thorough=True) is None


def test_large_files_are_read_only_when_asked(tmp_path: Path) -> None:
    folder = Stages(tmp_path).make("letters", FACTS, lambda folder: (folder / "big").write_bytes(bytes(2 << 20)) and None)
    with open(folder / "big", "r+b") as handle:
        handle.write(b"x")
    assert damage(folder) is None
    assert damage(folder, thorough=True) == "big has other bytes than when it was written"


@pytest.mark.parametrize("resume", [True, False])
def test_what_an_interrupted_build_left_is_kept_only_to_resume(tmp_path: Path, resume: bool) -> None:
    stages = Stages(tmp_path)

    def interrupted(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stages.make("letters", FACTS, interrupted)
    assert stages.open("letters", FACTS) is None
    found: list[bool] = []
    stages.make("letters", FACTS, lambda folder: found.append((folder / "half").exists()), resume=resume)
    assert found == [resume]
    assert not list(tmp_path.rglob("*.part"))


def test_a_second_maker_says_that_it_waits_and_then_takes_the_first_ones_result(tmp_path: Path) -> None:
    said: list[str] = []
    entered, go_on = threading.Event(), threading.Event()

    def slow(folder: Path) -> None:
        entered.set()
        assert go_on.wait(20)
        build(folder)

    first = threading.Thread(target=lambda: Stages(tmp_path).make("letters", FACTS, slow))
    first.start()
    assert entered.wait(20)
    found: list[Path] = []
    second = threading.Thread(target=lambda: found.append(Stages(tmp_path, said.append).make("letters", FACTS, no_build)))
    second.start()
    until = time.monotonic() + 20
    while not said and time.monotonic() < until:
        time.sleep(0.01)
    go_on.set()
    first.join(20)
    second.join(20)
    folder = Stages(tmp_path).path("letters", FACTS)
    assert said == [f"waiting for another process that makes letters/{folder.name}"]
    assert found == [folder]


def die(root: Path) -> None:
    Stages(root).make("letters", FACTS, lambda folder: os._exit(9))


def test_the_lock_of_a_dead_process_is_free(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=die, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == 9
    said: list[str] = []
    assert Stages(tmp_path, said.append).make("letters", FACTS, build).is_dir()
    assert said == []


def test_dropping_files_leaves_the_stage_whole(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    folder = stages.make("letters", FACTS, build)
    drop_files(folder, ["a.txt", "not there"])
    assert not (folder / "a.txt").exists()
    assert damage(folder, thorough=True) is None
    assert stages.make("letters", FACTS, no_build) == folder


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BenchError, match=r"cannot write to .*file/cache/letters: Not a directory\. Choose another folder with --results or --cache"):
        Stages(tmp_path / "file" / "cache").make("letters", FACTS, build)


def test_a_file_is_replaced_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    for content in (b"one", b"two"):
        write_atomically(tmp_path / "x", content)
        assert (tmp_path / "x").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_sealed_folders_cannot_be_opened_while_a_defense_runs(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    record = tmp_path / "poisoned.record"
    for folder in (secret, record, tmp_path / "secret-not"):
        folder.mkdir()
        (folder / "x").write_text("x")
    (tmp_path / "link").symlink_to(secret)
    with sealed(secret):
        for path in (secret / "x", record / "x", tmp_path / "poisoned" / ".." / "secret" / "x"):
            with pytest.raises(PluginError, match="a defense must not open"):
                path.read_text()
        assert (tmp_path / "secret-not" / "x").read_text() == "x"
    assert (secret / "x").read_text() == "x"
    with sealed(tmp_path / "link"), pytest.raises(PluginError):
        (tmp_path / "link" / "x").read_text()
    with sealed(), pytest.raises(PluginError):
        (record / "x").read_text()


def test_sealed_tables_cannot_be_opened_through_arrow(tmp_path: Path) -> None:
    record = tmp_path / "poisoned.record"
    record.mkdir()
    table = pd.DataFrame({"id": ["a"]})
    for file in (record / "rows.parquet", tmp_path / "open.parquet"):
        table.to_parquet(file)
    with sealed():
        for read in (pd.read_parquet, parquet.read_table, parquet.ParquetFile, parquet.ParquetDataset):
            for secret in (record / "rows.parquet", str(record)):
                with pytest.raises(PluginError, match="a defense must not open"):
                    read(secret)
        assert pd.read_parquet(tmp_path / "open.parquet").equals(table)
        assert parquet.ParquetFile(str(tmp_path / "open.parquet")).read().num_rows == 1
    assert pd.read_parquet(record / "rows.parquet").equals(table)
