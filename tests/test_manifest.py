"""Manifests: captions stay captions, and what is wrong is named with its row."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmark.data.manifest import canonical_tsv, make_ids, read_manifest, read_own, write_manifest
from benchmark.data.source import open_source
from benchmark.errors import BenchError
from benchmark.progress import silent
from benchmark.settings import DataSettings
from benchmark.stages import Stages

CAPTIONS = ["NA", "null", "nan", "None", "#N/A", "", "007", "1e5", "True", "=1+1", " padded ", "a\ttab", "two\nlines", "a\rcarriage", "dos\r\nend"]
CAPTIONS += ['a "quoted" word', '"', "emoji 🐈", "שלום", "zero\u200bwidth", "line\u2028separator", "next\x85line", "x" * 10_000]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (16, 16), "red").save(tmp_path / "images" / name)
    return tmp_path


def write(folder: Path, content: str | bytes, name: str = "pairs.tsv") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refusal(path: Path, image_root: Path | None = None) -> str:
    with pytest.raises(BenchError) as caught:
        read_manifest(path, image_root)
    return str(caught.value)


def test_captions_survive_writing_and_reading(folder: Path) -> None:
    images = ["images/a.png"] * len(CAPTIONS)
    ids = make_ids(images, CAPTIONS)
    write_manifest(folder / "pairs.tsv", ids, images, CAPTIONS)
    table = read_manifest(folder / "pairs.tsv")
    assert table.captions == CAPTIONS
    assert table.ids == ids
    assert read_own(folder / "pairs.tsv") == (ids, images, CAPTIONS)
    assert canonical_tsv(ids, images, CAPTIONS) == (folder / "pairs.tsv").read_bytes()
    assert table.counts == {"empty_captions": 1, "duplicate_pairs": 0}


def test_our_own_manifest_is_read_back_even_where_a_caption_looks_like_a_row(folder: Path) -> None:
    caption = "first\none\ttwo\tthree"
    write_manifest(folder / "manifest.tsv", ["x"], ["images/a.png"], [caption])
    assert read_own(folder / "manifest.tsv")[2] == [caption]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("own.tsv", "image\tcaption\nimages/a.png\tone\nimages/b.png\ttwo\n"),
        ("extra.tsv", "caption\tlabel\timage\none\t3\timages/a.png\ntwo\t4\timages/b.png"),
        ("open_clip.tsv", "filepath\ttitle\nimages/a.png\tone\nimages/b.png\ttwo\n"),
        ("cyclip.csv", "image,caption\nimages/a.png,one\nimages/b.png,two\n"),
        ("roclip.csv", "path,caption\nimages/a.png,one\nimages/b.png,two\n"),
        ("bom.tsv", "\ufeffimage\tcaption\nimages/a.png\tone\nimages/b.png\ttwo\n"),
        ("dos.tsv", "image\tcaption\r\nimages/a.png\tone\r\nimages/b.png\ttwo\r\n"),
        ("blank.tsv", "image\tcaption\nimages/a.png\tone\n\nimages/b.png\ttwo\n\n"),
    ],
)
def test_every_dialect_gives_the_same_pairs(folder: Path, name: str, content: str) -> None:
    table = read_manifest(write(folder, content, name))
    assert table.captions == ["one", "two"]
    assert table.images == [str((folder / "images" / image).resolve()) for image in ("a.png", "b.png")]
    assert table.ids == make_ids(["images/a.png", "images/b.png"], ["one", "two"])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("picture\tcaption\nx\ty\n", "the header picture, caption fits no dialect. Columns of a .tsv manifest: own: image, caption; open_clip: filepath, title"),
        ("image\tcaption\tfilepath\ttitle\na\tb\tc\td\n", "fits more than one dialect"),
        ("image\tcaption\tcaption\na\tb\tc\n", "column 'caption' stands twice in the header"),
        ("", "is empty"),
        ("image\tcaption\nimages/a.png\n", "row 1: 1 fields, the header has 2; starts with 'images/a.png'"),
        ("image\tcaption\nimages/a.png\tone\ttwo\n", "row 1: 3 fields, the header has 2"),
        ("image\tcaption\nimages/a.png\tone\nimages/c.png\ttwo\n", "row 2: no file at images/c.png. Paths are relative to the manifest; --image-root changes that"),
        ("image\tcaption\nc.png\tone\nd.png\ttwo\n", "row 1: no file at c.png, and 1 more rows"),
        ("image\tcaption\n\tone\n", "row 1: the image path is empty"),
        ("image\tcaption\n../a.png\tone\n", "row 1: '../a.png' leaves"),
        ("image\tcaption\n/etc/hostname\tone\n", "row 1: '/etc/hostname' leaves"),
        ("id\timage\tcaption\nx\timages/a.png\tone\nx\timages/b.png\ttwo\n", "row 2: id 'x' is also that of row 1"),
        ("id\timage\tcaption\n\timages/a.png\tone\n", "row 1: the id is empty"),
        ('image\tcaption\nimages/a.png\t"5 inch\nimages/b.png\ttwo\nimages/a.png\t"three\n', "quote"),
        ('image\tcaption\nimages/a.png\t"5 inch\nimages/b.png\ttwo"\n', "row 1: a quoted field swallows the next row; starts with '5 inch"),
        ("image\tcaption\nimages/a.png\tone\rtwo\n", "row 1: a carriage return within a field; quote the field"),
        (b"image\tcaption\nimages/a.png\tone\nimages/b.png\t\xff\n", "row 2: byte 44 is not UTF-8; save the file as UTF-8"),
        (b"image\tcaption\nimages/a.png\ta\x00b\n", "row 1: holds a NUL character"),
        ("image\tcaption\n" + "x" * 300 + "\tone\n", "row 1: no file at xxx"),
    ],
)
def test_what_is_wrong_is_named_with_its_row(folder: Path, content: str | bytes, sentence: str) -> None:
    assert sentence in refusal(write(folder, content))


def test_a_missing_manifest_and_an_unknown_ending_are_named(folder: Path) -> None:
    assert refusal(folder / "none.tsv") == f"no manifest at {folder / 'none.tsv'}"
    assert refusal(write(folder, "x", "pairs.txt")) == "a manifest ends in .tsv or .csv, got 'pairs.txt'"


def test_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside") / "secret.png"
    Image.new("RGB", (16, 16)).save(outside)
    (folder / "images" / "link.png").symlink_to(outside)
    (folder / "linked").symlink_to(outside.parent)
    for image in ("images/link.png", "linked/secret.png"):
        assert f"row 1: {image!r} leaves" in refusal(write(folder, f"image\tcaption\n{image}\tone\n"))


def test_the_image_root_replaces_the_folder_of_the_manifest(folder: Path) -> None:
    path = write(folder, "image\tcaption\na.png\tone\n")
    assert read_manifest(path, folder / "images").captions == ["one"]


def test_ids_follow_the_content_and_not_the_order() -> None:
    images, captions = ["a", "b", "a"], ["one", "two", "one"]
    ids = make_ids(images, captions)
    assert make_ids(images[::-1], captions[::-1])[1] == ids[1]
    assert ids[2] == ids[0] + "-1"
    assert all(len(row_id) == 16 for row_id in ids[:2])


def test_the_set_hash_does_not_follow_the_order(folder: Path) -> None:
    rows = ["images/a.png\tone\n", "images/b.png\ttwo\n"]
    first = read_manifest(write(folder, "image\tcaption\n" + "".join(rows)))
    second = read_manifest(write(folder, "image\tcaption\n" + "".join(rows[::-1])))
    assert first.set_hash == second.set_hash
    assert first.sha256 != second.sha256


def write_photos(folder: Path, n: int, repeated: int = 0) -> Path:
    (folder / "photos").mkdir(parents=True)
    rows = []
    for row in range(n):
        Image.fromarray(np.random.default_rng(row if row >= repeated else 0).integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(folder / "photos" / f"{row}.png")
        rows.append(f"photos/{row}.png\ta photo of number {row}\n")
    return write(folder, "image\tcaption\n" + "".join(rows))


SMALL = DataSettings(side=16)


def test_a_manifest_is_carved_the_same_whatever_its_order(tmp_path: Path) -> None:
    path = write_photos(tmp_path, 140)
    first = open_source(SMALL, path, None, Stages(tmp_path / "cache"), silent())
    assert (len(first.train), len(first.held_out), len(first.clean)) == (76, 32, 32)
    header, *rows = path.read_text().splitlines(keepends=True)
    second = open_source(SMALL, write(tmp_path, header + "".join(rows[::-1])), None, Stages(tmp_path / "cache"), silent())
    assert set(first.held_out.ids) == set(second.held_out.ids)
    assert set(first.train.ids) == set(second.train.ids)


def test_duplicates_are_counted_and_an_image_replaced_under_its_name_is_read_again(tmp_path: Path) -> None:
    path = write_photos(tmp_path, 140, repeated=3)
    first = open_source(SMALL, path, None, Stages(tmp_path / "cache"), silent())
    assert "2 duplicate images among the pairs" in first.warnings
    Image.new("RGB", (20, 24), "red").save(tmp_path / "photos" / "7.png")
    assert open_source(SMALL, path, None, Stages(tmp_path / "cache"), silent()).content != first.content


def test_too_few_pairs_to_hold_any_out_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="pairs has 100 pairs; at least 128 are needed"):
        open_source(SMALL, write_photos(tmp_path, 100), None, Stages(tmp_path / "cache"), silent())
