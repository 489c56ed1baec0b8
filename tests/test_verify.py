"""What `bench verify` and `bench diff` find, and what they call it."""

import csv
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import TINY
from PIL import Image
from typer.testing import CliRunner

from attacks._triggers import PatternTrigger
from benchmark import cli
from benchmark.data import world
from benchmark.data.diff import _stem, compare
from benchmark.data.export import export, layout
from benchmark.data.image import decode, png_bytes
from benchmark.data.look import compare_images, compare_looks, look_at
from benchmark.data.manifest import write_manifest
from benchmark.data.opened import open_pairs
from benchmark.data.pairs import Source
from benchmark.data.poison import Poisoned, SealedRecord, poison
from benchmark.data.poison_folder import write_folder
from benchmark.data.source import open_source
from benchmark.data.verify import Verified, report, verify
from benchmark.errors import BenchError
from benchmark.progress import silent
from benchmark.registry import configure, find
from benchmark.settings import SCHEMA
from benchmark.stages import Stages

Poison = Callable[..., tuple[Poisoned, SealedRecord]]
REQUEST: dict[str, Any] = {"schema": SCHEMA, "attack": "backdoor", "data": None, "data_settings": TINY.model_dump(mode="json")}


def jpeg(image: Any, quality: int = 75) -> Any:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer).convert("RGB"))


@pytest.fixture(scope="module")
def whole(poison_with: Poison, source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A poison folder with three exports beside it, never changed."""
    root = tmp_path_factory.mktemp("whole")
    made, _ = poison_with("backdoor", {"count": 9})
    write_folder(made, source, REQUEST, root / "p", silent())
    for to in ("open_clip", "cyclip", "webdataset"):
        export(made, source, REQUEST, layout(to, per_shard=100), root / to, silent())
    export(made, source, REQUEST, layout("open_clip", image_format="jpeg"), root / "jpeg", silent())
    return root


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to tamper with."""
    shutil.copytree(whole, tmp_path / "copy")
    return tmp_path / "copy"


def checked(path: Path, source: Source) -> Verified:
    return verify(path, lambda request: source, silent())


def found(path: Path, source: Source) -> list[tuple[str, str]]:
    return [(finding.kind, finding.row) for finding in checked(path, source).findings]


def rows_of(folder: Path) -> tuple[list[list[str]], list[str]]:
    """Lines of the manifest and the ids of poisoned rows."""
    lines = [line.split("\t") for line in (folder / "p" / "poisoned" / "manifest.tsv").read_text().splitlines()[1:]]
    return lines, pd.read_parquet(folder / "p" / "poisoned.record" / "rows.parquet")["id"].tolist()


def rewrite(folder: Path, lines: list[list[str]]) -> None:
    write_manifest(folder / "p" / "poisoned" / "manifest.tsv", *zip(*lines, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["p", "p/poisoned", "open_clip", "cyclip", "webdataset", "jpeg"])
def test_what_was_not_touched_is_whole(whole: Path, source: Source, name: str) -> None:
    result = checked(whole / name, source)
    assert not result.findings
    lines = "" if name == "webdataset" else " from 257 lines"
    assert result.facts[:2] == [f"read 256 rows{lines}; the record has 256", "poisoned rows with the recorded caption and pixels: 9 of 9; images of all rows: 256 of 256"]
    assert list(report(result))[-1] == "whole: everything is as recorded"


def test_a_changed_caption_is_named_whether_the_row_is_poisoned_or_not(folder: Path, source: Source) -> None:
    lines, poisoned = rows_of(folder)
    bad = next(row for row, line in enumerate(lines) if line[0] == poisoned[0])
    clean = next(row for row, line in enumerate(lines) if line[0] not in poisoned)
    lines[bad][2], lines[clean][2] = "what it was", "another\tone"
    rewrite(folder, lines)
    result = checked(folder / "p", source)
    assert {(finding.kind, finding.row) for finding in result.findings} == {("caption", lines[bad][0]), ("caption", lines[clean][0]), ("count", "")}
    text = "\n".join(report(result))
    assert "the poisoned row's caption is 'what it was'; recorded is '" in text
    assert "the row's caption is 'another\\tone'" in text
    assert "8 poisoned rows are as recorded instead of 9" in text


def test_missing_added_repeated_and_moved_rows_are_named(folder: Path, source: Source) -> None:
    lines, poisoned = rows_of(folder)
    gone = next(line for line in lines if line[0] == poisoned[3])
    rest = [line for line in lines if line[0] != gone[0]]
    rewrite(folder, rest)
    assert found(folder / "p", source) == [("missing", gone[0]), ("count", ""), ("count", "")]
    assert "read 255 rows from 256 lines; the record has 256" in checked(folder / "p", source).facts[0]
    rewrite(folder, [*lines, ["feedfeedfeedfeed", lines[0][1], "new"]])
    assert found(folder / "p", source) == [("added", "feedfeedfeedfeed"), ("count", "")]
    rewrite(folder, [*lines, lines[7]])
    assert found(folder / "p", source) == [("repeated", lines[7][0]), ("count", "")]
    rewrite(folder, [*lines[1:], lines[0]])
    assert found(folder / "p", source) == [("order", lines[0][0])]


def test_an_image_that_was_encoded_anew_is_told_from_another_image(folder: Path, source: Source) -> None:
    lines, poisoned = rows_of(folder)
    stored = {line[0]: folder / "p" / "poisoned" / line[1] for line in lines if line[0] in poisoned}
    again, other, same, gone, torn, *_ = sorted(stored)
    stored[again].write_bytes(png_bytes(jpeg(decode(stored[again], 32))))
    stored[other].write_bytes(png_bytes(source.train.image(1)))
    Image.fromarray(decode(stored[same], 32)).save(stored[same], compress_level=0)
    stored[gone].unlink()
    stored[torn].write_bytes(stored[torn].read_bytes()[:100])
    result = checked(folder / "p", source)
    kinds = {finding.row: finding.kind for finding in result.findings if finding.row}
    assert kinds == {again: "re-encoded", other: "replaced", same: "rewritten", gone: "broken", torn: "broken"}
    text = "\n".join(report(result))
    assert "no file at" in text
    assert "is not a whole JPEG, PNG, WEBP or GIF image" in text


def test_a_row_that_shows_another_image_is_named(folder: Path, source: Source) -> None:
    lines, poisoned = rows_of(folder)
    clean = [row for row, line in enumerate(lines) if line[0] not in poisoned]
    lines[clean[0]][1], lines[clean[1]][1] = lines[clean[1]][1], lines[clean[0]][1]
    lines[clean[2]][1] = "images/../../../../etc/passwd"
    lines[clean[3]][1] = "/etc/hostname"
    rewrite(folder, lines)
    assert found(folder / "p", source) == [(kind, lines[clean[place]][0]) for place, kind in enumerate(("replaced", "replaced", "broken", "broken"))]


@pytest.mark.parametrize("column", ["caption_after", "caption_before", "pixels_sha256_after", "pixels_sha256_before"])
def test_a_record_that_was_edited_in_one_place_is_found_out(folder: Path, source: Source, column: str) -> None:
    path = folder / "p" / "poisoned.record" / "rows.parquet"
    table = pd.read_parquet(path)
    table.loc[4, column] = "0" * 64
    table.to_parquet(path, index=False)
    assert found(folder / "p", source) == [("source" if column.endswith("before") else "record", table.loc[4, "id"])]


def test_counts_of_the_record_must_agree(folder: Path, source: Source) -> None:
    path = folder / "p" / "poisoned.record" / "record.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "n_poison": 10}))
    assert [finding.text for finding in checked(folder / "p", source).findings] == [
        "record.json says n_poison 10, and its tables have 9",
        "9 poisoned rows are as recorded instead of 10",
    ]


def test_a_damaged_record_is_one_sentence(folder: Path, source: Source) -> None:
    record = folder / "p" / "poisoned.record"
    rows = pd.read_parquet(record / "rows.parquet")
    rows.drop(columns="role").to_parquet(record / "rows.parquet")
    with pytest.raises(BenchError, match=r"rows\.parquet has no role; it is damaged"):
        checked(folder / "p", source)
    rows.to_parquet(record / "rows.parquet", index=False)
    (record / "all_rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(BenchError, match=r"all_rows\.parquet cannot be read"):
        checked(folder / "p", source)
    (record / "layout.npy").write_bytes(b"")
    with pytest.raises(BenchError, match=r"the sealed record .* cannot be read: No data left"):
        checked(folder / "p", source)
    (record / "record.json").write_text("{")
    with pytest.raises(BenchError, match=r"the sealed record .* cannot be read"):
        checked(folder / "p", source)


def test_a_source_that_has_changed_since_is_said_row_by_row(suite: Any, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for row in range(140):
        Image.fromarray(world.drawn_row(5, "train", row, 40).image).save(folder / f"{row:03d}.png")
    (folder / "pairs.csv").write_text("image,caption\n" + "".join(f"{row:03d}.png,photo {row}\n" for row in range(140)))

    def opened(request: Any = None) -> Source:
        return open_source(TINY, folder / "pairs.csv", None, Stages(tmp_path / "cache"), silent())

    plugin, before = find("attack", "backdoor"), opened()
    made = poison(plugin, configure(plugin, {}, {"count": 5}), 0, before, suite, False, Stages(tmp_path / "cache"))
    write_folder(made, before, REQUEST, tmp_path / "p", silent())
    assert not verify(tmp_path / "p", opened, silent()).findings
    done = compare(open_pairs(folder / "pairs.csv", None, opened, silent()), open_pairs(tmp_path / "p", None, opened, silent()), silent())
    assert {kind: n for kind, n in done.counts().items() if n} == {"removed": 64, "caption": 5, "replaced": 5}, "64 pairs are set apart for targets and as clean ones"
    ids, refs, captions = made.rows()
    again, other = [row for row, ref in enumerate(refs) if ref.startswith("/")][:2]
    Image.fromarray(jpeg(decode(Path(refs[again]), 40))).save(refs[again])
    Image.fromarray(255 - decode(Path(refs[other]), 40)).save(refs[other])
    result = verify(tmp_path / "p", opened, silent())
    texts = {(finding.kind, finding.row): finding.text for finding in result.findings}
    assert texts["source", ids[again]] == "the source's image has been re-encoded since"
    assert texts["source", ids[other]] == "the source's image has been replaced since"
    assert set(texts) == {("source", ids[again]), ("source", ids[other]), ("re-encoded", ids[again]), ("replaced", ids[other])}
    assert captions[again].startswith("photo")
    Path(refs[other]).unlink()
    result = verify(tmp_path / "p", opened, silent())
    assert [(finding.kind, finding.row) for finding in result.findings] == [("source", "")]
    assert "no file at" in result.findings[0].text
    assert "poisoned rows with the recorded caption and pixels: 5 of 5" in result.facts[1], "what needs no source is still checked"


@pytest.mark.parametrize("to", ["open_clip", "cyclip"])
def test_an_export_that_was_changed_is_found_out(folder: Path, source: Source, to: str) -> None:
    images = sorted((folder / to / "images").rglob("*.png"))
    images[5].write_bytes(png_bytes(jpeg(decode(images[5], 32))))
    images[9].write_bytes(png_bytes(PatternTrigger("patch:checker", 8, 1.0, 2, "fixed", 0, "corner", "", "clip").image(decode(images[9], 32), "x")))
    images[11].unlink()
    table = folder / to / ("pairs.tsv" if to == "open_clip" else "pairs.csv")
    lines = table.read_text().splitlines()
    mark = "\t" if to == "open_clip" else ","
    lines[21] = lines[21].partition(mark)[0] + mark + "another caption"
    table.write_text("\n".join([*lines[:31], *lines[32:]]) + "\n")
    (folder / to / "poisoned.record").mkdir()
    names = {row: str(image.relative_to(folder / to)) for row, image in enumerate(images)}
    differences = {(kind, row) for kind, row in found(folder / to, source) if kind != "count"}
    assert differences == {
        ("re-encoded", names[5]),
        ("replaced", names[9]),
        ("broken", names[11]),
        ("caption", names[20]),
        ("missing", names[30]),
        ("record", ""),
    }


def test_a_table_with_other_bytes_and_the_same_pairs_is_said(folder: Path, source: Source) -> None:
    table = folder / "open_clip" / "pairs.tsv"
    table.write_bytes(table.read_bytes().replace(b"\n", b"\r\n"))
    assert [finding.text for finding in checked(folder / "open_clip", source).findings] == ["pairs.tsv holds the recorded pairs in other bytes: its sha256 is not the recorded one"]


def test_an_export_that_no_longer_says_it_is_poisoned_is_found_out(folder: Path, source: Source) -> None:
    card, page = folder / "cyclip" / "DATASET_CARD.json", folder / "cyclip" / "README.md"
    card.write_text(card.read_text().replace('"poisoned": true', '"poisoned": false'))
    page.write_text(page.read_text().partition("\n")[2])
    assert [finding.text for finding in checked(folder / "cyclip", source).findings] == [
        "DATASET_CARD.json says poisoned False; recorded is True",
        "the first line of README.md is not '# These data ARE POISONED: 9 of 256 pairs'",
    ]


def test_a_shard_that_is_cut_off_or_missing_is_found_out(folder: Path, source: Source) -> None:
    shard = folder / "webdataset" / "00001.tar"
    shard.write_bytes(shard.read_bytes()[:100_000])
    texts = "\n".join(report(checked(folder / "webdataset", source)))
    assert "00001.tar: not a whole tar" in texts
    assert re.search(r"missing: 00001\d{4}: ", texts)
    shard.unlink()
    kinds = [kind for kind, _ in found(folder / "webdataset", source)]
    assert kinds.count("missing") == 100 + 1


@pytest.mark.parametrize(("path", "sentence"), [("nowhere", "no folder at"), ("p/poisoned/images", "has no sealed record in it"), ("alone", "has no sealed record beside it")])
def test_what_cannot_be_checked_is_one_sentence(folder: Path, source: Source, path: str, sentence: str) -> None:
    shutil.copytree(folder / "open_clip", folder / "alone")
    with pytest.raises(BenchError, match=sentence):
        checked(folder / path, source)


def test_looks_tell_an_encoder_from_a_trigger() -> None:
    checker = PatternTrigger("patch:checker", 8, 1.0, 2, "fixed", 0, "corner", "", "clip")
    called: dict[str, list[str]] = {"jpeg": [], "patch": [], "other": []}
    for row in range(100):
        image = world.drawn_row(0, "train", row, 32).image
        for name, changed in (("jpeg", jpeg(image)), ("patch", checker.image(image, "x")), ("other", world.drawn_row(0, "train", row + 1, 32).image)):
            called[name].append(compare_images(image, changed))
            assert compare_looks(look_at(image), look_at(changed)) == called[name][-1]
        assert compare_images(image, image.copy()) == "same"
    assert set(called["jpeg"]) == {"re-encoded"}
    assert set(called["patch"]) == {"replaced"}
    assert set(called["other"]) == {"replaced"}


def pairs(path: Path, source: Source) -> Any:
    return open_pairs(path, None, lambda request: source, silent())


def test_a_diff_of_poisoned_and_clean_is_what_the_record_says(whole: Path, poison_with: Poison, source: Source, tmp_path: Path) -> None:
    write_folder(poison_with("none", {})[0], source, REQUEST, tmp_path / "clean", silent())
    record = pd.read_parquet(whole / "p" / "poisoned.record" / "rows.parquet")
    done = compare(pairs(tmp_path / "clean", source), pairs(whole / "p", source), silent())
    assert (done.by, done.n_same) == ("id", 247)
    assert done.counts() == {"removed": 0, "added": 0, "caption": 9, "re-encoded": 0, "replaced": 9, "broken": 0}
    captions = {one.row: (one.before, one.after) for one in done.differences if one.kind == "caption"}
    assert captions == {row_id: (before, after) for row_id, before, after in zip(record["id"], record["caption_before"], record["caption_after"], strict=True)}
    assert {one.row for one in done.differences if one.kind == "replaced"} == set(record["id"])


def test_a_path_without_its_ending_keeps_the_dots_before_it() -> None:
    assert [_stem(path) for path in ("a/2023.01.02.png", "b/a.jpeg", "c", "d.e/f")] == ["a/2023.01.02", "b/a", "/c", "d.e/f"]


def test_a_diff_finds_appended_rows(poison_with: Poison, source: Source, tmp_path: Path) -> None:
    for name, options in (("none", {}), ("targeted", {"n_targets": 2, "captions_per_target": 4})):
        made, record = poison_with(name, options)
        write_folder(made, source, REQUEST, tmp_path / name, silent())
        export(made, source, REQUEST, layout("cyclip"), tmp_path / f"{name}-cyclip", silent())
    by_id = compare(pairs(tmp_path / "none", source), pairs(tmp_path / "targeted", source), silent())
    assert {one.row for one in by_id.differences} == set(record.rows["id"])
    by_content = compare(pairs(tmp_path / "none-cyclip", source), pairs(tmp_path / "targeted-cyclip", source), silent())
    assert by_content.by == "content"
    for done, kind in ((by_id, "added"), (by_content, "added"), (compare(pairs(tmp_path / "targeted-cyclip", source), pairs(tmp_path / "none", source), silent()), "removed")):
        assert {name: n for name, n in done.counts().items() if n} == {kind: 8}
        assert done.n_same == 256
        assert sorted(one.before + one.after for one in done.differences) == sorted(record.rows["caption_after"])


@pytest.mark.parametrize("to", ["open_clip", "cyclip", "webdataset"])
def test_an_export_differs_in_nothing_from_what_it_was_made_of(whole: Path, source: Source, to: str) -> None:
    done = compare(pairs(whole / "p", source), pairs(whole / to, source), silent())
    assert not done.differences
    assert done.n_same == 256


def test_a_jpeg_export_is_encoded_anew_and_nothing_else(whole: Path, source: Source) -> None:
    done = compare(pairs(whole / "open_clip", source), pairs(whole / "jpeg", source), silent())
    assert {kind: n for kind, n in done.counts().items() if n} == {"re-encoded": 256}


def test_manifests_without_ids_are_matched_by_content(folder: Path, source: Source) -> None:
    changed = folder / "open_clip"
    lines = (changed / "pairs.tsv").read_text().splitlines()
    images = sorted((changed / "images").rglob("*.png"))
    lines[5] = lines[5].partition("\t")[0] + "\tanother caption"
    shutil.copyfile(images[100], changed / "new.png")
    (changed / "renamed.png").write_bytes(images[60].read_bytes())
    lines[61] = "renamed.png\t" + lines[61].partition("\t")[2]
    images[80].write_bytes(png_bytes(np.zeros((32, 32, 3), dtype=np.uint8)))
    images[90].write_bytes(b"torn")
    del lines[11]
    (changed / "pairs.tsv").write_text("\n".join([*lines, "new.png\tan added pair"]) + "\n")
    done = compare(pairs(folder / "cyclip", source), pairs(changed, source), silent())
    assert [(one.kind, one.row_a, one.row_b) for one in done.differences] == [
        ("removed", 11, None),
        ("added", None, 256),
        ("caption", 5, 5),
        ("replaced", 81, 80),
        ("broken", 91, 90),
    ]
    assert done.n_same == 256 - 4


def test_a_table_that_cannot_be_read_is_not_compared(folder: Path, source: Source) -> None:
    (folder / "cyclip" / "pairs.csv").write_text("image,caption\na.png,one,two\n")
    with pytest.raises(BenchError, match="row 1: 3 fields, the header has 2"):
        compare(pairs(folder / "cyclip", source), pairs(folder / "open_clip", source), silent())


def run(*words: object) -> Any:
    return CliRunner().invoke(cli.app, [str(word) for word in words])


def test_exit_status_and_output_of_verify_and_diff(folder: Path, source: Source, stages: Stages) -> None:
    assert stages.root == source.folder.parents[1]
    done = run("verify", folder / "p", "--cache", stages.root)
    assert (done.exit_code, done.output.splitlines()[-1]) == (0, "whole: everything is as recorded")
    same = run("diff", folder / "p", folder / "cyclip", "--cache", stages.root)
    assert same.exit_code == 0
    assert "no differences" in same.output
    lines, _ = rows_of(folder)
    lines[0][2] = '=cmd("calc")\x1b[31m\u202e'
    rewrite(folder, lines)
    broken = run("verify", folder / "p", "--cache", stages.root)
    assert broken.exit_code == 1
    assert f"caption: {lines[0][0]}: " in broken.output
    table = run("diff", folder / "cyclip", folder / "p", "--cache", stages.root)
    assert table.exit_code == 1
    assert not {"\x1b", "\u202e"} & set(broken.output + table.output)
    text = run("diff", folder / "cyclip", folder / "p", "--format", "csv", "--cache", stages.root)
    (row,) = csv.DictReader(io.StringIO(text.output))
    assert (row["change"], row["row_a"], row["row_b"]) == ("caption", "1", "1")
    assert row["after"] == "'" + lines[0][2], "a spreadsheet must not run it"
    for words in (("verify", folder / "nowhere"), ("diff", folder / "p", folder / "nowhere"), ("diff", folder / "p", folder / "p", "--format", "html")):
        assert isinstance(run(*words, "--cache", stages.root).exception, BenchError)
