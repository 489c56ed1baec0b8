"""Manifests: captions stay captions, and what is wrong is named with its row."""

import csv
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from benchmark.data.manifest import canonical_tsv, load_manifest, make_ids, read_manifest, read_own, save_manifest, write_manifest
from benchmark.data.reading import Reading, check_reading
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


def refusal(path: Path, image_root: Path | None = None, reading: Reading | None = None) -> str:
    with pytest.raises(BenchError) as caught:
        read_manifest(path, image_root, reading)
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
    assert refusal(write(folder, "x", "pairs.txt")) == "a manifest ends in .tsv, .csv or .parquet, got 'pairs.txt'; --dialect says what a file of another name is"


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


def write_table(path: Path, rows: list[dict[str, str]], quote_all: bool = False, end: str = "\r\n") -> Path:
    """Rows as another program would write them: by Python's csv module, or by pandas to Parquet."""
    if path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
        return path
    with open(path, "w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, list(rows[0]), delimiter="," if path.suffix == ".csv" else "\t", quoting=csv.QUOTE_ALL if quote_all else csv.QUOTE_MINIMAL, lineterminator=end)
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize(("quote_all", "end"), [(False, "\r\n"), (True, "\r\n"), (True, "\n")])
@pytest.mark.parametrize(
    ("name", "image", "caption"), [("own.tsv", "image", "caption"), ("own.parquet", "image", "caption"), ("open_clip.tsv", "filepath", "title"), ("cyclip.csv", "path", "caption")]
)
def test_captions_stay_captions_in_every_dialect(folder: Path, name: str, image: str, caption: str, quote_all: bool, end: str) -> None:
    rows = [{"id": f"row {row}", image: "images/a.png", "further": "x", caption: text} for row, text in enumerate(CAPTIONS)]
    table = read_manifest(write_table(folder / name, rows, quote_all, end))
    assert table.captions == CAPTIONS
    assert table.ids == [f"row {row}" for row in range(len(CAPTIONS))]
    save_manifest(table, folder)
    again = load_manifest(folder)
    assert (again.captions, again.ids, again.images, again.counts, again.stamp) == (table.captions, table.ids, table.images, table.counts, table.stamp)


def test_both_containers_of_the_same_rows_have_the_same_hash(folder: Path) -> None:
    rows = [{"id": str(row), "image": "images/a.png", "caption": text} for row, text in enumerate(CAPTIONS)]
    write_manifest(folder / "own.tsv", *([row[name] for row in rows] for name in ("id", "image", "caption")))
    tsv, parquet = read_manifest(folder / "own.tsv"), read_manifest(write_table(folder / "own.parquet", rows))
    assert tsv.sha256 == parquet.sha256
    assert tsv.set_hash == parquet.set_hash


@pytest.mark.parametrize(
    ("name", "content", "reading"),
    [
        ("pairs.csv", "filepath\ttitle\nimages/a.png\tone\n", Reading(dialect="open_clip")),
        ("pairs.txt", "path,caption\nimages/a.png,one\n", Reading(dialect="cyclip")),
        ("pairs.tsv", "image\tcaption\tfilepath\ttitle\nimages/b.png\ttwo\timages/a.png\tone\n", Reading(dialect="open_clip")),
        ("pairs.tsv", "file\ttext\nimages/a.png\tone\n", Reading(image_column="file", caption_column="text")),
        ("pairs.tsv", "file\tcaption\nimages/a.png\tone\n", Reading(image_column="file")),
        ("pairs.csv", "image,path,caption\nimages/b.png,images/a.png,one\n", Reading(image_column="path")),
    ],
)
def test_the_dialect_and_the_columns_can_be_named(folder: Path, name: str, content: str, reading: Reading) -> None:
    table = read_manifest(write(folder, content, name), reading=reading)
    assert (table.captions, [Path(image).name for image in table.images]) == (["one"], ["a.png"])


@pytest.mark.parametrize(
    ("name", "content", "reading", "sentence"),
    [
        ("pairs.csv", "filepath\ttitle\na\tb\n", Reading(), "it holds tabs: --dialect open_clip reads tab-separated files"),
        ("pairs.csv", "image,path,caption\na,b,c\n", Reading(), "fits more than one dialect"),
        ("cc3m.tsv", "a cat on a mat\thttp://example.org/1.jpg\na dog\thttp://example.org/2.jpg\n", Reading(), "it holds no images. Give it the header"),
        ("cc3m.tsv", "a cat on a mat\thttp://example.org/1.jpg\n", Reading(dialect="gcc"), "download them with img2dataset"),
        ("pairs.tsv", "image\tcaption\na\tb\n", Reading(image_column="imag"), "has no column 'imag'. Did you mean 'image'?"),
        ("pairs.tsv", "image\tcaption\na\tb\n", Reading(dialect="webdataset"), "dialect 'webdataset' is a folder"),
        ("pairs.parquet", "image\tcaption\na\tb\n", Reading(), "is not a whole Parquet file"),
    ],
)
def test_a_table_in_another_dialect_is_refused_with_the_remedy(folder: Path, name: str, content: str, reading: Reading, sentence: str) -> None:
    assert sentence in refusal(write(folder, content, name), reading=reading)


@pytest.mark.parametrize(
    ("column", "values", "sentence"),
    [
        ("caption", ["one", None], "row 2: the caption is missing"),
        ("caption", [1, 2], "column 'caption' holds int64, not text"),
        ("image", ["images/a.png", "images/\0.png"], "row 2: the image holds a NUL character"),
        ("caption", pa.array([b"one", b"\xff"]).view(pa.utf8()), "row 2: the caption is not UTF-8"),
    ],
)
def test_what_is_wrong_in_parquet_is_named_with_its_row(folder: Path, column: str, values: list[object], sentence: str) -> None:
    pq.write_table(pa.table({"image": ["images/a.png"] * 2, "caption": ["one", "two"]} | {column: values}), folder / "pairs.parquet")
    assert sentence in refusal(folder / "pairs.parquet")


def test_numbers_are_ids_in_parquet(folder: Path) -> None:
    pq.write_table(pa.table({"id": [7, 8], "image": pa.array(["images/a.png"] * 2).dictionary_encode(), "caption": ["one", "two"]}), folder / "pairs.parquet")
    assert read_manifest(folder / "pairs.parquet").ids == ["7", "8"]


def test_quotes_are_characters_where_there_is_no_quoting(folder: Path) -> None:
    path = write(folder, 'image\tcaption\nimages/a.png\t"5 inch\nimages/b.png\ttwo"\nimages/a.png\t"a ""b"""\n')
    assert "--quoting none" in refusal(path)
    assert read_manifest(path, reading=Reading(quoting="none")).captions == ['"5 inch', 'two"', '"a ""b"""']


def test_a_field_that_looks_like_rows_is_taken_if_the_user_says_so(folder: Path) -> None:
    path = write(folder, 'image\tcaption\nimages/a.png\t"5 inch\nimages/b.png\ttwo"\n')
    assert read_manifest(path, reading=Reading(quoting="minimal")).captions == ["5 inch\nimages/b.png\ttwo"]


def test_images_may_lie_outside_if_the_user_says_so(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside") / "a.png"
    Image.new("RGB", (16, 16)).save(outside)
    (folder / "images" / "link.png").symlink_to(outside)
    path = write(folder, f"image\tcaption\n{outside}\tone\nimages/link.png\ttwo\n../{outside.parent.name}/../{folder.name}/images/a.png\tthree\n")
    assert "--allow-outside lets them leave it" in refusal(path)
    assert read_manifest(path, reading=Reading(allow_outside=True)).captions == ["one", "two", "three"]


BROKEN = {
    "no file": "images/c.png\tone\n",
    "a folder": "images\tone\n",
    "a short row": "images/a.png\n",
    "a long row": "images/a.png\tone\ttwo\n",
    "a carriage return": "images/a.png\tone\rtwo\n",
    "no UTF-8": "images/a.png\t\udcff\n",
    "a NUL": "images/a.png\t\0\n",
    "no path": "\tone\n",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_row_stops_or_is_left_out_and_counted(folder: Path, kind: str) -> None:
    good = [f"images/{'ab'[row % 2]}.png\tcaption {row}\n" for row in range(9)]
    rows = [*good[:4], BROKEN[kind], *good[4:]]
    path = write(folder, ("image\tcaption\n" + "".join(rows)).encode("utf-8", "surrogateescape"))
    assert "row 5: " in refusal(path)
    assert "1 of 10 rows cannot be used, which is more than the share of 0.001 that --max-broken allows" in refusal(path, reading=Reading(skip_broken=True))
    table = read_manifest(path, reading=Reading(skip_broken=True, max_broken=0.1))
    assert table.captions == [f"caption {row}" for row in range(9)]
    assert table.numbers.tolist() == [1, 2, 3, 4, 6, 7, 8, 9, 10]
    ((name, count),) = [(name, count) for name, count in table.counts.items() if name.startswith("skipped_")]
    assert count == 1
    assert table.warnings == (f"skipped 1 {name.removeprefix('skipped_').replace('_', ' ')} (row 5)",)


def test_of_two_rows_with_one_id_the_first_stays(folder: Path) -> None:
    path = write(folder, "id\timage\tcaption\nx\timages/a.png\tone\ny\timages/a.png\ttwo\nx\timages/b.png\tthree\n\timages/b.png\tfour\n")
    assert "row 3: id 'x' is also that of row 1" in refusal(path)
    table = read_manifest(path, reading=Reading(skip_broken=True, max_broken=0.5))
    assert (table.captions, table.counts["skipped_duplicate_ids"], table.counts["skipped_empty_ids"]) == (["one", "two"], 1, 1)


def test_a_refusal_lists_the_rows(folder: Path) -> None:
    rows = [f"images/{'a' if row % 2 else 'c'}.png\tx{row}\n" for row in range(30)]
    assert "row 1: no file at images/c.png, and 14 more rows (3, 5, 7, 9, 11, 13, 15, 17, 19, ...). Paths" in refusal(write(folder, "image\tcaption\n" + "".join(rows)))


@pytest.mark.parametrize(
    ("reading", "given", "sentence"),
    [
        (Reading(dialect="openclip"), True, "unknown dialect 'openclip'. Did you mean 'open_clip'?"),
        (Reading(quoting="all"), True, "unknown quoting 'all'"),
        (Reading(max_broken=1.5), True, "expected --max-broken in [0, 1), got 1.5"),
        (Reading(skip_broken=True), False, "--skip-broken needs --data"),
        (Reading(caption_column="x"), False, "--caption-column needs --data"),
    ],
)
def test_choices_that_do_not_exist_are_refused(reading: Reading, given: bool, sentence: str) -> None:
    with pytest.raises(BenchError) as caught:
        check_reading(reading, given)
    assert sentence in str(caught.value)


TEXTS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=12) | st.sampled_from(CAPTIONS[:-1])
FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)


@FEW
@given(captions=st.lists(TEXTS, min_size=1, max_size=8), name=st.sampled_from(["x.tsv", "x.csv", "x.parquet"]), quote_all=st.booleans())
def test_no_caption_is_changed_or_lost(folder: Path, captions: list[str], name: str, quote_all: bool) -> None:
    path = write_table(folder / name, [{"image": "images/a.png", "caption": text} for text in captions], quote_all)
    assert read_manifest(path, reading=Reading(quoting=None if name.endswith("parquet") else "minimal")).captions == captions


def damaged(content: bytes, cuts: list[tuple[float, bytes]]) -> bytes:
    for place, new in cuts:
        at = int(place * len(content))
        content = content[:at] + new + content[at + len(new) :]
    return content


CUTS = st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=3) | st.sampled_from([b'"', b"\t", b"\n", b"\r", b"\xff", b"\0", b'"\n'])), max_size=5)


@FEW
@given(
    captions=st.lists(TEXTS, min_size=1, max_size=6),
    name=st.sampled_from(["x.tsv", "x.csv", "x.parquet"]),
    cuts=CUTS,
    skip=st.booleans(),
    quoting=st.sampled_from([None, "minimal", "none"]),
)
def test_a_damaged_table_is_read_or_refused_in_a_sentence(folder: Path, captions: list[str], name: str, cuts: list[tuple[float, bytes]], skip: bool, quoting: str | None) -> None:
    whole = write_table(folder / name, [{"image": "images/a.png", "caption": text} for text in captions]).read_bytes()
    path = write(folder, damaged(whole, cuts), name)
    try:
        table = read_manifest(path, reading=Reading(quoting=quoting, skip_broken=skip, max_broken=0.99))
    except BenchError as error:
        assert str(path) in str(error)
    else:
        assert len(table) == len(set(table.ids)) == len(table.captions)


@FEW
@given(rows=st.lists(st.tuples(TEXTS, st.booleans()), min_size=1, max_size=8))
def test_every_row_is_read_or_counted(folder: Path, rows: list[tuple[str, bool]]) -> None:
    """Whatever the captions hold: rows read and rows left out are all rows."""
    table = write_table(folder / "x.tsv", [{"image": "images/a.png" if there else "images/c.png", "caption": text} for text, there in rows])
    n_there = sum(there for _, there in rows)
    if n_there == 0:
        assert "no" in refusal(table, reading=Reading(skip_broken=True, max_broken=0.99, quoting="minimal"))
        return
    found = read_manifest(table, reading=Reading(skip_broken=True, max_broken=0.99, quoting="minimal"))
    assert found.captions == [text for text, there in rows if there]
    assert found.counts.get("skipped_missing_files", 0) == len(rows) - n_there


@pytest.mark.slow
def test_three_million_rows_are_read_in_two_gigabytes_and_a_minute(tmp_path: Path) -> None:
    from benchmark.perf.reading import measured, write_pairs

    path = write_pairs(tmp_path, 3_000_000)
    seconds, memory = measured(f"from benchmark.data.manifest import read_manifest\nassert len(read_manifest(__import__('pathlib').Path({str(path)!r}))) == 3_000_000")
    assert seconds < 60
    assert memory < 2e9


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
