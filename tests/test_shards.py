"""Shards: read in place, nothing lost in silence, and written with fixed bytes."""

import io
import json
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmark.data.image import decode_ref, png_bytes, read_ref, shard_ref
from benchmark.data.manifest import Manifest
from benchmark.data.reader import name_of, read_pairs
from benchmark.data.reading import Reading
from benchmark.data.shards import MAX_IMAGE, MAX_TEXT, expand, write_shards
from benchmark.data.source import open_source
from benchmark.errors import BenchError
from benchmark.progress import silent
from benchmark.settings import DataSettings
from benchmark.stages import Stages

Sample = tuple[str, bytes, str, str]


def picture(value: int) -> bytes:
    return png_bytes(np.full((16, 16, 3), value % 256, dtype=np.uint8))


def samples(n: int, first: int = 0) -> list[Sample]:
    return [(f"{row:09d}", picture(row), "png", f"caption {row}") for row in range(first, first + n)]


def write_tar(path: Path, members: Iterable[tuple[str, bytes] | tarfile.TarInfo]) -> Path:
    """A tar as any program may write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as out:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                out.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                out.addfile(info, io.BytesIO(member[1]))
    return path


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def refusal(data: Path, reading: Reading | None = None) -> str:
    with pytest.raises(BenchError) as caught:
        read_pairs(data, reading)
    return str(caught.value)


def pairs(table: Manifest) -> list[tuple[str, int, str]]:
    return [(row_id, int(decode_ref(image, 16)[0, 0, 0]), caption) for row_id, image, caption in zip(table.ids, table.images, table.captions, strict=True)]


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    captions = ["NA", "null", "", " padded ", "a\ttab", "two\nlines\n", "a\rcarriage", '"', "emoji 🐈", "x" * 10_000]
    given = [(f"{row:09d}", picture(row), ".PNG", caption) for row, caption in enumerate(captions)]
    shards = write_shards(tmp_path / "shards", given, 4)
    assert [path.name for path in shards] == ["00000.tar", "00001.tar", "00002.tar"]
    assert json.loads((tmp_path / "shards" / "sizes.json").read_text()) == {"00000.tar": 4, "00001.tar": 4, "00002.tar": 2}
    table = read_pairs(tmp_path / "shards")
    assert table.captions == captions
    assert table.ids == [key for key, *_ in given]
    assert [read_ref(ref) for ref in table.images] == [image for _, image, _, _ in given]
    assert table.counts == {"empty_captions": 1}


def test_equal_samples_give_equal_bytes_and_no_others(tmp_path: Path) -> None:
    first, second = (write_shards(tmp_path / name, samples(5), 3) for name in ("a", "b"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    with tarfile.open(first[0]) as tar:
        assert {(info.mtime, info.uid, info.gid, info.uname, info.mode) for info in tar} == {(0, 0, 0, "", 0o644)}
        assert tar.getnames() == [f"00000000{row}.{suffix}" for row in range(3) for suffix in ("png", "txt")]
    assert write_shards(tmp_path / "none", [], 3) == []


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ([("a", b"", "png", ""), ("a", b"", "png", "")], "key 'a' stands twice"),
        ([("a.b", b"", "png", "")], "'a.b' cannot be a key"),
        ([("../a", b"", "png", "")], "'../a' cannot be a key"),
        ([("/a", b"", "png", "")], "'/a' cannot be a key"),
        ([("", b"", "png", "")], "'' cannot be a key"),
        ([("a", b"", "bmp", "")], "'bmp' is no image suffix of a shard"),
    ],
)
def test_what_cannot_be_a_shard_is_not_written(tmp_path: Path, given: list[Sample], sentence: str) -> None:
    with pytest.raises(BenchError) as caught:
        write_shards(tmp_path / "shards", given, 10)
    assert sentence in str(caught.value)


def test_shards_are_not_mixed_with_others(tmp_path: Path) -> None:
    write_shards(tmp_path, samples(1), 1)
    with pytest.raises(BenchError, match="holds tars already"):
        write_shards(tmp_path, samples(1), 1)


def test_img2dataset_and_webdataset_layouts_are_read(tmp_path: Path) -> None:
    for shard in range(2):
        members = [
            (f"{shard:05d}{row:04d}.{suffix}", content)
            for row in range(3)
            for suffix, content in (("json", b'{"status": "success"}'), ("jpg", picture(10 * shard + row)), ("txt", f"caption {shard} {row}".encode()))
        ]
        write_tar(tmp_path / "part" / f"{shard:05d}.tar", members)
        (tmp_path / "part" / f"{shard:05d}.parquet").write_bytes(b"metadata")
        (tmp_path / "part" / f"{shard:05d}_stats.json").write_text("{}")
    table = read_pairs(tmp_path)
    assert pairs(table) == [(f"{shard:05d}{row:04d}", 10 * shard + row, f"caption {shard} {row}") for shard in range(2) for row in range(3)]
    (tmp_path / "part" / "00000.tar").unlink()
    members = [
        ("./x/1.TXT", b"one"),
        ("./x/1.seg.png", b"no image of the pair"),
        ("./x/1.JPEG", picture(1)),
        ("README", b""),
        ("x/2.webp", picture(2)),
        ("x/2.txt", b"\xef\xbb\xbftwo"),
    ]
    write_tar(tmp_path / "web.tar", [special("x", tarfile.DIRTYPE), *members])
    assert pairs(read_pairs(tmp_path / "web.tar")) == [("x/1", 1, "one"), ("x/2", 2, "two")]


def test_keys_that_several_shards_have_are_told_apart(tmp_path: Path) -> None:
    write_shards(tmp_path / "a", samples(2), 10)
    write_shards(tmp_path / "b", samples(2, first=1), 10)
    table = read_pairs(tmp_path)
    assert table.ids == ["000000000", "a/00000/000000001", "b/00000/000000001", "000000002"]
    assert read_pairs(tmp_path / "{a,b}" / "00000.tar").ids == table.ids
    assert "stands twice; is a shard named twice?" in refusal(Path(f"{tmp_path}/a/00000.tar::{tmp_path}/a/00000.tar"))


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("s/{00000..00002}.tar", ["s/00000.tar", "s/00001.tar", "s/00002.tar"]),
        ("{9..11}", ["9", "10", "11"]),
        ("{09..11}", ["09", "10", "11"]),
        ("{3..1}", ["3", "2", "1"]),
        ("{0..10..5}", ["0", "5", "10"]),
        ("x{a,b{1..2}}y", ["xay", "xb1y", "xb2y"]),
        ("{a,b}{0..1}", ["a0", "a1", "b0", "b1"]),
        ("a/{0..1}.tar::b/{0..1}.tar", ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]),
        ("{a}{", ["{a}{"]),
        ("{..}{1..}{1..2..0}", ["{..}{1..}{1..2..0}"]),
    ],
)
def test_braces_are_expanded(pattern: str, names: list[str]) -> None:
    assert expand(pattern) == names


def test_a_range_too_long_is_refused_before_it_is_written_out() -> None:
    with pytest.raises(BenchError, match="names more than 1000000 files"):
        expand("{0..999999999999}{0..9}")


def test_a_range_of_shards_is_read_in_order_and_a_missing_one_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path / "shards", samples(6), 2)
    monkeypatch.chdir(tmp_path)
    assert [caption for _, _, caption in pairs(read_pairs(Path("shards/{00002..00001}.tar")))] == ["caption 4", "caption 5", "caption 2", "caption 3"]
    assert refusal(Path("shards/{00000..00004}.tar")) == "no shard at shards/00003.tar, and 1 more of 5"
    assert refusal(Path("shards/{00000..00001}.tar.gz")) == "a shard ends in .tar, got '00000.tar.gz'; compressed tars must be unpacked to plain ones"
    assert [name_of(Path(name)) for name in ("shards", "shards/{00000..00001}.tar", "shards/0{0..1}.tar::shards/9.tar", "shards/00000.tar")] == ["shards"] * 3 + ["00000"]
    (tmp_path / "empty").mkdir()
    assert refusal(tmp_path / "empty", Reading(dialect="webdataset")) == f"{tmp_path / 'empty'} holds no tars"


ODD = {
    "no image": ([("b.txt", b"text")], "00000.tar:b: no image"),
    "no caption": ([("b.png", picture(1))], "00000.tar:b: no caption (.txt)"),
    "two images": ([("b.png", picture(1)), ("b.jpg", picture(1)), ("b.txt", b"x")], "00000.tar:b: two images"),
    "two captions": ([("b.png", picture(1)), ("b.txt", b"x"), ("b.txt", b"y")], "00000.tar:b: two captions"),
    "not UTF-8": ([("b.png", picture(1)), ("b.txt", b"\xff")], "00000.tar:b: a caption that is not UTF-8"),
    "NUL": ([("b.png", picture(1)), ("b.txt", b"\0")], "00000.tar:b: a caption with a NUL character"),
    "long": ([("b.png", picture(1)), ("b.txt", b"x" * (MAX_TEXT + 1))], f"00000.tar:b: .txt of {MAX_TEXT + 1} bytes, at most {MAX_TEXT} are read"),
    "link": ([special("b.png", tarfile.SYMTYPE, "/etc/passwd"), ("b.txt", b"x")], "00000.tar:b: no image"),
    "hard link": ([special("b.png", tarfile.LNKTYPE, "a.png"), ("b.txt", b"x")], "00000.tar:b: no image"),
    "device": ([special("b.txt", tarfile.CHRTYPE), ("b.png", picture(1))], "00000.tar:b: no caption (.txt)"),
    "again": ([("a.png", picture(1)), ("a.txt", b"x")], "00000.tar:a: its key stands twice"),
}


@pytest.mark.parametrize("kind", ODD)
def test_an_odd_sample_stops_or_is_left_out_and_counted(tmp_path: Path, kind: str) -> None:
    members, sentence = ODD[kind]
    write_tar(tmp_path / "00000.tar", [("a.png", picture(0)), ("a.txt", b"first"), ("c.png", picture(2)), ("c.txt", b"second"), *members])
    assert sentence in refusal(tmp_path)
    assert "1 of 3 rows cannot be used" in refusal(tmp_path, Reading(skip_broken=True))
    table = read_pairs(tmp_path, Reading(skip_broken=True, max_broken=0.4))
    assert pairs(table) == [("a", 0, "first"), ("c", 2, "second")]
    assert table.counts["skipped_broken_samples"] == 1


def test_an_image_too_large_is_not_read(tmp_path: Path) -> None:
    info = tarfile.TarInfo("b.png")
    info.size = MAX_IMAGE + 1
    with open(tmp_path / "x.tar", "wb") as out:
        out.write(info.tobuf())
        out.seek(MAX_IMAGE + 512, os.SEEK_CUR)
        text = tarfile.TarInfo("b.txt")
        text.size = 1
        out.write(text.tobuf() + b"x".ljust(512, b"\0") + bytes(1024))
    assert f".png of {MAX_IMAGE + 1} bytes" in refusal(tmp_path)


def test_a_tar_cut_off_anywhere_is_never_taken_for_a_whole_one(tmp_path: Path) -> None:
    whole = write_shards(tmp_path / "whole", samples(3), 10)[0].read_bytes()
    last = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    (tmp_path / "cut").mkdir()
    path = tmp_path / "cut" / "00000.tar"
    for end in range(0, last + 512, 256):
        path.write_bytes(whole[:end])
        assert "cut/00000.tar" in refusal(path)
        assert "00000.tar" in refusal(path, Reading(skip_broken=True))
    path.write_bytes(whole[: last + 512])
    assert len(read_pairs(path)) == 3
    path.write_bytes(whole[:4400])
    table = read_pairs(path, Reading(skip_broken=True, max_broken=0.9))
    assert table.captions == ["caption 0"]
    assert table.warnings == ("skipped 1 damaged shards (00000.tar)",)
    (tmp_path / "cut" / "sizes.json").write_text('{"00000.tar": 3}')
    table = read_pairs(path, Reading(skip_broken=True, max_broken=0.9))
    assert (table.counts["skipped_damaged_shards"], table.counts["skipped_missing_samples"]) == (1, 1)


def test_damage_in_the_middle_and_tars_joined_to_one_are_named(tmp_path: Path) -> None:
    one = write_shards(tmp_path / "one", samples(3), 10)[0].read_bytes()
    path = tmp_path / "00000.tar"
    path.write_bytes(one[:2048] + b"\1" * 512 + one[2560:])
    assert "not a whole tar: damaged at byte 2048" in refusal(path)
    path.write_bytes(one + one)
    assert "it goes on behind its end" in refusal(path)


def test_fewer_samples_than_the_sizes_say_are_named(tmp_path: Path) -> None:
    write_shards(tmp_path, samples(3), 10)
    (tmp_path / "sizes.json").write_text('{"00000.tar": 5}')
    assert "00000.tar: 3 samples, and sizes.json says 5" in refusal(tmp_path)
    (tmp_path / "sizes.json").write_text("[1]")
    assert "sizes.json is damaged" in refusal(tmp_path)


def test_sizes_that_come_or_change_after_a_listing_are_seen(tmp_path: Path) -> None:
    (path,) = write_shards(tmp_path / "tars", samples(140), 200)
    stages = Stages(tmp_path / "cache")
    open_source(DataSettings(side=16), path.parent, None, stages, silent())
    (path.parent / "sizes.json").write_text('{"00000.tar": 200}')
    with pytest.raises(BenchError, match=r"140 samples, and sizes\.json says 200"):
        open_source(DataSettings(side=16), path.parent, None, stages, silent())


def test_a_listing_names_the_file_and_not_the_link_to_it(tmp_path: Path) -> None:
    (path,) = write_shards(tmp_path / "v1", samples(3), 10)
    (tmp_path / "current").symlink_to(tmp_path / "v1")
    assert read_pairs(tmp_path / "current").images == read_pairs(tmp_path / "v1").images
    assert str(path.resolve()) in read_pairs(tmp_path / "current").images[0]


def test_members_with_a_dot_before_their_ending_are_counted(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("1.png", b"x"), ("1.txt", b"a"), ("1.seg.png", b"y"), ("2.v2.png", b"x"), ("2.v2.txt", b"b"), ("1.json", b"{}")])
    table = read_pairs(path)
    assert (table.ids, table.counts["members_with_a_dot_before_their_ending"]) == (["1"], 3)


def test_a_folder_whose_name_is_not_utf8_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    write_shards(folder, samples(3), 10)
    assert "has a name that is not UTF-8" in refusal(folder)


def test_a_place_in_a_shard_is_no_file_name(tmp_path: Path) -> None:
    (shard,) = write_shards(tmp_path, samples(1), 1)
    assert read_ref(shard_ref(shard, 512, 4)) == b"\x89PNG"
    with pytest.raises(BenchError, match="cut off since it was listed"):
        read_ref(shard_ref(shard, 10**6, 4))
    with pytest.raises(BenchError, match="no file at"):
        read_ref(shard_ref(tmp_path / "no.tar", 0, 4))
    with pytest.raises(BenchError, match="at byte 0 is not a whole JPEG, PNG, WEBP or GIF image: its content is something else"):
        decode_ref(shard_ref(shard, 0, 512), 16)
    assert int(decode_ref(read_pairs(tmp_path).images[0], 16)[0, 0, 0]) == 0


FEW = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
NAMES = st.sampled_from(["a.png", "a.txt", "b.jpg", "b.txt", "c.webp", "c.txt", "c.json", "d/a.png", "d/a.txt", ".txt", "e", "\udcff.txt", "\udcff.png", "x" * 120 + ".txt"])


@FEW
@given(st.lists(st.tuples(NAMES, st.binary(max_size=4)), max_size=10))
def test_every_image_and_text_of_a_tar_is_read_or_counted(tmp_path: Path, members: list[tuple[str, bytes]]) -> None:
    path = write_tar(tmp_path / "x.tar", members)
    try:
        table = read_pairs(path, Reading(skip_broken=True, max_broken=0.99))
    except BenchError as error:
        assert "x.tar" in str(error)
    else:
        runs = [name.partition(".")[0] for name, _ in members if name.rpartition("/")[2].partition(".")[0] and name.partition(".")[2] in ("png", "jpg", "webp", "txt")]
        n_samples = sum(left != right for left, right in zip(runs, [None, *runs], strict=False))
        assert len(table) + table.counts.get("skipped_broken_samples", 0) == n_samples


@FEW
@given(cuts=st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=8)), max_size=4), end=st.floats(0, 1), skip=st.booleans())
def test_a_damaged_tar_is_read_or_refused_in_a_sentence(tmp_path: Path, cuts: list[tuple[float, bytes]], end: float, skip: bool) -> None:
    members: list[tuple[str, bytes]] = [("a.png", picture(0)), ("a.txt", b"one"), ("long" * 40 + ".txt", b"two"), ("long" * 40 + ".png", picture(1))]
    content = write_tar(tmp_path / "x.tar", members).read_bytes()[:8192]
    for place, new in cuts:
        at = int(place * len(content))
        content = content[:at] + new + content[at + len(new) :]
    (tmp_path / "x.tar").write_bytes(content[: int(max(end, 0.3) * len(content))] if skip else content)
    try:
        table = read_pairs(tmp_path / "x.tar", Reading(skip_broken=skip, max_broken=0.99))
    except BenchError as error:
        assert "x.tar" in str(error)
    else:
        assert len(table) >= 1
