"""Sources: every dialect gives the same data, broken images are named or counted, and decoding goes on where it stopped."""

import csv
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from benchmark.data import decoding
from benchmark.data.image import png_bytes
from benchmark.data.images import resident
from benchmark.data.pairs import Source
from benchmark.data.reader import name_of, read_pairs
from benchmark.data.reading import Reading
from benchmark.data.shards import write_shards
from benchmark.data.source import load_source, open_source
from benchmark.errors import BenchError
from benchmark.matrix import open_cell
from benchmark.progress import silent
from benchmark.request import Request, plan
from benchmark.settings import DataSettings
from benchmark.stages import Stages

N = 140
SMALL = DataSettings(side=16)
CAPTIONS = ["NA", "null", "", "007", ' "quoted" ', "two\nlines", "tab\there", "emoji 🐈"] + [f"a photo of number {row}" for row in range(N - 8)]
IDS = [f"{row:09d}" for row in range(N)]


def picture(row: int) -> bytes:
    return png_bytes(np.random.default_rng(row).integers(0, 255, (20, 24, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for row in range(N):
        (folder / f"{IDS[row]}.png").write_bytes(picture(row))
    return folder


def write_text(path: Path, image: str, caption: str, ids: bool) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out, delimiter="," if path.suffix == ".csv" else "\t")
        writer.writerow([*(["id"] if ids else []), image, caption])
        writer.writerows([*([IDS[row]] if ids else []), f"photos/{IDS[row]}.png", CAPTIONS[row]] for row in range(N))
    return path


def own(folder: Path, ids: bool) -> Path:
    return write_text(folder / "own.tsv", "image", "caption", ids)


def own_parquet(folder: Path, ids: bool) -> Path:
    columns = {"caption": CAPTIONS, "image": [f"photos/{row_id}.png" for row_id in IDS]} | ({"id": IDS} if ids else {})
    pd.DataFrame(columns).to_parquet(folder / "own.parquet")
    return folder / "own.parquet"


def open_clip(folder: Path, ids: bool) -> Path:
    return write_text(folder / "train.tsv", "filepath", "title", ids)


def cyclip(folder: Path, ids: bool) -> Path:
    return write_text(folder / "train.csv", "path", "caption", ids)


def captions_file(folder: Path, ids: bool) -> Path:
    write_text(folder / "captions.csv", "image", "caption", ids)
    return folder


def beside(folder: Path, ids: bool) -> Path:
    for row, row_id in enumerate(IDS):
        (folder / "photos" / f"{row_id}.txt").write_bytes(CAPTIONS[row].encode() + b"\n")
    return folder / "photos"


def shards(folder: Path, ids: bool) -> Path:
    write_shards(folder / "shards", ((IDS[row], picture(row), "png", CAPTIONS[row]) for row in range(N)), 60)
    return folder / "shards" / "{00000..00002}.tar"


Layout = Callable[[Path, bool], Path]


def opened(data: Path, cache: Path, reading: Reading | None = None) -> Source:
    return open_source(SMALL, data, None, Stages(cache), silent(), reading)


@pytest.fixture(scope="module")
def explicit(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("explicit")
    (folder / "photos").symlink_to(photos)
    data = own(folder, True)
    reading = Reading(allow_outside=True)
    return read_pairs(data, reading).set_hash, opened(data, folder / "cache", reading).content


@pytest.mark.parametrize("layout", [own_parquet, open_clip, cyclip, captions_file, shards])
def test_the_same_pairs_with_ids_are_the_same_data_in_every_dialect(tmp_path: Path, photos: Path, explicit: tuple[str, str], layout: Layout) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    data = layout(tmp_path, True)
    assert (read_pairs(data).set_hash, opened(data, tmp_path / "cache").content) == explicit


@pytest.mark.parametrize("layout", [own, own_parquet, open_clip, cyclip, captions_file, beside, shards])
def test_without_ids_the_rows_and_pixels_are_the_same_in_every_dialect(tmp_path: Path, photos: Path, layout: Layout) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    data = layout(tmp_path, False)
    found = opened(data, tmp_path / "cache")
    assert (len(found.train), len(found.held_out), len(found.clean)) == (N - 64, 32, 32)
    assert read_pairs(data).captions == CAPTIONS
    got = {caption: image.tobytes() for split in (found.train, found.held_out, found.clean) for caption, image in zip(split.captions, split.images, strict=True)}
    whole = opened(own(tmp_path, False), tmp_path / "cache")
    assert got == {caption: image.tobytes() for split in (whole.train, whole.held_out, whole.clean) for caption, image in zip(split.captions, split.images, strict=True)}
    assert found.counts["empty_captions"] == 1


def test_shards_are_listed_once_and_listed_again_when_one_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = shards(tmp_path, True)
    first = opened(data, tmp_path / "cache")
    monkeypatch.setattr("benchmark.data.reader.read_shards", lambda *_: pytest.fail("listed again"))
    assert opened(data, tmp_path / "cache").content == first.content
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "shards")
    write_shards(tmp_path / "shards", ((IDS[row], picture(row + 1), "png", CAPTIONS[row]) for row in range(N)), 60)
    assert opened(data, tmp_path / "cache").content != first.content


def test_the_name_follows_the_data_and_not_the_cache(tmp_path: Path, photos: Path) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    first, copy = own(tmp_path, True), tmp_path / "copy.tsv"
    shutil.copy(first, copy)
    one, two = (opened(data, tmp_path / "cache") for data in (first, copy))
    assert (one.name, two.name) == ("own", "copy")
    assert one.folder == two.folder
    assert name_of(tmp_path) == tmp_path.name


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-400]), "is not a whole JPEG, PNG, WEBP or GIF image"),
        (lambda path: path.write_bytes(b""), "is not a whole JPEG, PNG, WEBP or GIF image"),
        (lambda path: Image.new("1", (20_000, 9_000)).save(path), "180000000 pixels) exceeds limit"),
        (lambda path: Image.new("1", (9_000, 9_000)).save(path), "9000x9000 pixels are more than 50000000"),
    ],
)
def test_a_broken_image_stops_the_run_or_is_left_out_and_counted(tmp_path: Path, photos: Path, harm: Callable[[Path], object], sentence: str) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    harm(tmp_path / "photos" / f"{IDS[7]}.png")
    data, cache = own(tmp_path, True), tmp_path / "cache"
    with pytest.raises(BenchError) as caught:
        opened(data, cache)
    assert f"{data} row 8 (id '000000007'): {tmp_path}/photos/000000007.png" in str(caught.value)
    assert sentence in str(caught.value)
    with pytest.raises(BenchError, match="1 of 140 rows cannot be used"):
        opened(data, cache, Reading(skip_broken=True))
    found = opened(data, cache, Reading(skip_broken=True, max_broken=0.01))
    assert sum(len(split) for split in (found.train, found.held_out, found.clean)) == N - 1
    assert IDS[7] not in [*found.train.ids, *found.held_out.ids, *found.clean.ids]
    assert found.counts["skipped_broken_images"] == 1
    assert "skipped 1 broken images (row 8 (id '000000007'))" in found.warnings
    for row_id, image in zip(found.train.ids, found.train.images, strict=True):
        np.testing.assert_array_equal(image, decoding.decode_ref(str(photos / f"{row_id}.png"), 16))
    for reading in (None, Reading(skip_broken=True)):
        with pytest.raises(BenchError, match="row 8"):
            opened(data, cache, reading)


def test_rows_left_out_of_the_table_and_broken_images_count_together(tmp_path: Path, photos: Path) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos" / f"{IDS[7]}.png").unlink()
    (tmp_path / "photos" / f"{IDS[9]}.png").write_bytes(b"")
    data = own(tmp_path, True)
    with pytest.raises(BenchError, match="2 of 140 rows cannot be used"):
        opened(data, tmp_path / "cache", Reading(skip_broken=True, max_broken=0.01))
    found = opened(data, tmp_path / "cache", Reading(skip_broken=True, max_broken=0.02))
    assert (found.counts["skipped_missing_files"], found.counts["skipped_broken_images"]) == (1, 1)


def test_a_broken_image_in_a_shard_is_named_by_its_key(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", ((IDS[row], picture(row)[: -40 if row == 5 else None], "png", CAPTIONS[row]) for row in range(N)), 60)
    with pytest.raises(BenchError, match=r"shards row 6 \(id '000000005'\): .*00000.tar at byte \d+ is not a whole"):
        opened(tmp_path / "shards", tmp_path / "cache")
    assert opened(tmp_path / "shards", tmp_path / "cache", Reading(skip_broken=True, max_broken=0.01)).counts["skipped_broken_images"] == 1


def test_a_disk_without_room_is_refused_before_work_starts(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    said: list[str] = []
    progress = silent()
    monkeypatch.setattr(type(progress), "say", lambda self, line: said.append(line))
    monkeypatch.setattr(decoding.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 100_000})())
    with pytest.raises(BenchError, match=r"140 images at 16x16 pixels take 0.1 MB, and 0.1 MB are free at .*; choose another folder with --cache"):
        open_source(SMALL, own(tmp_path, True), None, Stages(tmp_path / "cache"), progress)
    assert said[0].startswith("140 images at 16x16 pixels take 0.1 MB in ")


class Stop(Exception):
    """Ends a decoding in the middle."""


def test_a_decoding_that_is_stopped_goes_on_and_gives_the_same_bytes(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    data = own(tmp_path, True)
    whole = opened(data, tmp_path / "whole")
    monkeypatch.setattr(decoding, "_BLOCK_BYTES", 1)
    monkeypatch.setattr(decoding, "_TASK_BYTES", 16 * 16 * 3 * 10)
    monkeypatch.setattr(decoding.os, "sched_getaffinity", lambda process: {0})
    decoded: list[str] = []
    original = decoding.decode_ref

    def counted(ref: str, side: int) -> object:
        decoded.append(ref)
        if len(decoded) == 75:
            raise Stop
        return original(ref, side)

    monkeypatch.setattr(decoding, "decode_ref", counted)
    with pytest.raises(Stop):
        opened(data, tmp_path / "cache")
    (part,) = (tmp_path / "cache" / "source").glob("*.part")
    (part / "images.u8").write_bytes((part / "images.u8").read_bytes() + b"half an image")
    with open(part / "decoded.jsonl", "ab") as log:
        log.write(b'{"end": 140, "hash')
    n = len((part / "decoded.jsonl").read_bytes().splitlines()) - 1
    assert n == 7
    del decoded[:]
    monkeypatch.setattr(decoding, "decode_ref", lambda ref, side: (decoded.append(ref), original(ref, side))[1])
    again = opened(data, tmp_path / "cache")
    assert len(decoded) == N - 10 * n
    assert again.content == whole.content
    for name in ("images.u8", "pixels.txt", "rows.parquet", "source.json"):
        assert (again.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    assert sorted(path.name for path in again.folder.iterdir()) == ["done.json", "images.u8", "pixels.txt", "rows.parquet", "source.json"]


def test_bytes_and_pixels_give_one_source(tmp_path: Path, photos: Path) -> None:
    data = tmp_path / "photos"
    shutil.copytree(photos, data)
    for path in list(data.iterdir()):
        path.with_suffix(".txt").write_text(f"a photo of {path.stem}")
    pixels, encoded = (open_source(DataSettings(side=16), data, None, Stages(tmp_path / codec), silent(), None, codec) for codec in ("pixels", "bytes"))
    assert pixels.content == encoded.content
    for split in ("train", "held_out", "clean"):
        left, right = getattr(pixels, split), getattr(encoded, split)
        assert left.ids == right.ids
        np.testing.assert_array_equal(left.images[:], right.images[:])
        np.testing.assert_array_equal(left.image(3), right.image(3))
    assert resident(pixels.train.images)
    assert not resident(encoded.train.images)
    assert not list((tmp_path / "bytes").rglob("images.u8"))
    files = sorted(path.read_bytes() for path in photos.glob("*.png"))
    kept = next((tmp_path / "bytes").rglob("images.bytes"))
    assert kept.stat().st_size == sum(map(len, files))


KILLED = """
import os, signal, sys
from pathlib import Path
from benchmark.data import decoding
from benchmark.progress import silent
folder, photos, left = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
decoding._BLOCK_BYTES, decoding._TASK_BYTES = 1, 16 * 16 * 3 * 10
original = decoding._put_down
def put_down(*given):
    global left
    original(*given)
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
decoding._put_down = put_down
decoding.decode_all(folder, sorted(map(str, photos.glob("*.png"))), 16, lambda done: None, silent())
"""


def test_a_killed_decoding_goes_on(tmp_path: Path, photos: Path) -> None:
    (tmp_path / "photos").mkdir()
    for path in photos.iterdir():
        (tmp_path / "photos" / path.name).write_bytes(b"" if path.stem == IDS[12] else path.read_bytes())
    codes = []
    for left in (1, 3, 5, -1):
        done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), str(tmp_path / "photos"), str(left)], check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
        codes.append(done.returncode)
    assert codes == [-signal.SIGKILL] * 3 + [0]
    straight = tmp_path / "straight"
    straight.mkdir()
    whole = decoding.decode_all(straight, sorted(map(str, (tmp_path / "photos").glob("*.png"))), 16, lambda done: None, silent())
    assert [row for row, _ in whole.broken] == [12]
    assert (tmp_path / "images.u8").read_bytes() == (straight / "images.u8").read_bytes()
    assert len(whole.hashes) == N - 1


BESIDE = {
    "no text": (["a.png"], "a.png: no .txt of the same name beside it"),
    "no image": (["a.txt"], "a.txt: no image of the same name beside it"),
    "two images": (["a.png", "a.jpg", "a.txt"], "a.jpg: a.png has the same name but for its ending"),
}


@pytest.mark.parametrize("kind", BESIDE)
def test_an_image_without_text_or_a_text_without_image_is_named(tmp_path: Path, kind: str) -> None:
    names, sentence = BESIDE[kind]
    (tmp_path / "sub").mkdir()
    for name in [*names, "sub/b.png", "sub/b.txt", "sub/notes.json"]:
        (tmp_path / name).write_bytes(picture(0) if not name.endswith(".txt") else b"a caption")
    with pytest.raises(BenchError) as caught:
        read_pairs(tmp_path)
    assert sentence in str(caught.value)
    found = read_pairs(tmp_path, Reading(skip_broken=True, max_broken=0.5))
    assert (found.captions, found.counts["skipped_broken_pairs"]) == (["a caption"], 1)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(b"\xff", "a.txt is not UTF-8"), (b"\0", "a.txt holds a NUL character"), (b"x" * (1 << 21), "a.txt has more than 1048576 bytes")],
)
def test_a_text_that_is_no_caption_is_named(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "a.png").write_bytes(picture(0))
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(BenchError) as caught:
        read_pairs(tmp_path)
    assert sentence in str(caught.value)


def test_a_link_out_of_a_folder_of_images_is_refused(tmp_path: Path, photos: Path) -> None:
    (tmp_path / "a.txt").write_text("a caption")
    (tmp_path / "a.png").symlink_to(photos / f"{IDS[0]}.png")
    with pytest.raises(BenchError, match=r"'a\.png' leaves"):
        read_pairs(tmp_path)
    assert read_pairs(tmp_path, Reading(allow_outside=True)).captions == ["a caption"]


@pytest.mark.parametrize(
    ("names", "reading", "root", "sentence"),
    [
        ([], Reading(), False, "holds no pairs; expected captions.tsv, captions.csv or captions.parquet, or images"),
        (["captions.tsv", "captions.csv"], Reading(), False, "holds captions.tsv and captions.csv; name the one that counts"),
        (["a.txt"], Reading(dialect="cyclip"), False, "is a folder without a captions file"),
        (["a.txt"], Reading(caption_column="x"), False, "are for tables"),
        (["a.txt"], Reading(), True, "--image-root is for tables"),
        (["a.txt"], Reading(dialect="webdataset"), False, "holds no tars"),
        (["a.txt"], Reading(dialect="gcc"), False, "it holds no images"),
    ],
)
def test_a_folder_in_no_known_layout_is_refused_with_what_is_known(tmp_path: Path, names: list[str], reading: Reading, root: bool, sentence: str) -> None:
    for name in names:
        (tmp_path / name).write_text("image\tcaption\n")
    with pytest.raises(BenchError) as caught:
        read_pairs(tmp_path, reading, tmp_path if root else None)
    assert sentence in str(caught.value)


def test_no_folder_and_no_table_are_named(tmp_path: Path) -> None:
    for data, reading, sentence in (
        (tmp_path / "x.tsv", Reading(), "no manifest at"),
        (tmp_path / "x", Reading(dialect="folder"), "no folder at"),
        (tmp_path / "x.tar", Reading(), "no shard at"),
    ):
        with pytest.raises(BenchError, match=sentence):
            read_pairs(data, reading)


def test_the_choices_of_a_request_reach_the_reader(tmp_path: Path, photos: Path) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos" / f"{IDS[3]}.png").unlink()
    data = write_text(tmp_path / "pairs.txt", "file", "words", True)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "set" / split / name).mkdir(parents=True)
            for row in range(6):
                Image.fromarray(np.random.default_rng(hash_of(split, name, row)).integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(tmp_path / "set" / split / name / f"{row}.png")
    reading = Reading("own", "file", "words", "minimal", False, True, 0.01)
    request = Request(("none",), ("clip",), scale="smoke", sets=("data.side=16",), data=data, eval=(str(tmp_path / "set"),), reading=reading, results=tmp_path / "results")
    cell = open_cell(plan(request)[0], silent())
    assert cell.source.counts["skipped_missing_files"] == 1
    assert "skipped 1 missing files (row 4)" in cell.source.warnings
    with pytest.raises(BenchError, match="unknown dialect"):
        plan(Request(data=data, eval=("x",), reading=Reading(dialect="tsv")))


def hash_of(*parts: object) -> int:
    return sum(ord(mark) * 31**place for place, mark in enumerate(str(parts))) % 2**32


def test_a_source_made_before_is_opened_as_it_was(tmp_path: Path, photos: Path) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    found = opened(own(tmp_path, True), tmp_path / "cache")
    assert load_source(found.folder).content == found.content
