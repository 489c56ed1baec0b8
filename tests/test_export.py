"""Exports: other trainers' layouts read back as what went in, the first line says what it is, and nothing gives a row away."""

import csv
import json
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import TINY
from PIL import Image
from typer.testing import CliRunner

from benchmark import cli
from benchmark.data.export import CARD, Exported, export, flattened, layout
from benchmark.data.image import decode_ref, png_bytes
from benchmark.data.manifest import read_manifest
from benchmark.data.opened import open_pairs
from benchmark.data.pairs import Source
from benchmark.data.poison import Poisoned, SealedRecord, poison
from benchmark.data.poison_folder import manifest_rows, open_folder, write_folder
from benchmark.data.reading import Findings, Reading
from benchmark.data.shards import find_shards, read_shards
from benchmark.data.source import open_source
from benchmark.errors import BenchError
from benchmark.progress import silent
from benchmark.registry import configure, find
from benchmark.settings import SCHEMA
from benchmark.stages import Stages

Poison = Callable[..., tuple[Poisoned, SealedRecord]]
REQUEST: dict[str, Any] = {"schema": SCHEMA, "attack": "backdoor", "data": None, "data_settings": TINY.model_dump(mode="json")}
HOSTILE = [
    "a tab\tinside",
    "two\nlines, and a comma",
    "carriage\rreturn",
    "windows\r\nends",
    '=cmd("calc")',
    '"',
    '"quoted" at the start',
    'ends with a quote"',
    "it's, a comma",
    "NA",
    "null",
    "",
    " spaces around ",
    "007",
    "1e5",
    "Ünïcödé 漢字 🐟",
    "right\u202eleft zero\u200bwidth",
    "line\u2028separator\x0b\x85",
    "<b>&amp;</b> | `code`",
    "long " * 400,
]
ATTACK = f'''
from benchmark.contract import Append, Attack, Replace


class Hostile(Attack):
    """Writes captions that readers trip over."""

    def poison(self, pairs, lab):
        captions = {HOSTILE!r}
        lab.budget(count=len(captions), append=True)
        for row, caption in enumerate(captions):
            if row % 2:
                yield Replace(3 * row, caption=caption, image=255 - pairs.image(3 * row))
            else:
                yield Append(pairs.image(row)[::-1].copy(), caption)
'''


@pytest.fixture
def hostile(poison_with: Poison, tmp_path: Path) -> tuple[Poisoned, SealedRecord]:
    (tmp_path / "hostile.py").write_text(ATTACK)
    return poison_with(str(tmp_path / "hostile.py"), {})


def exported(made: Poisoned, source: Source, out: Path, to: str = "open_clip", **more: Any) -> Exported:
    return export(made, source, REQUEST, layout(to, **more), out, silent())


def pixels(made: Poisoned, source: Source) -> list[Any]:
    known = {ref: row for row, ref in enumerate(source.train.refs)}
    return [source.train.image(known[ref]) if ref in known else decode_ref(str(made.manifest / ref), 32) for ref in made.rows()[1]]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(("to", "table"), [("open_clip", "pairs.tsv"), ("cyclip", "pairs.csv")])
def test_a_table_reads_back_with_the_same_captions_and_pixels(hostile: Any, source: Source, tmp_path: Path, to: str, table: str) -> None:
    made, record = hostile
    done = exported(made, source, tmp_path / "out", to, with_ids=True)
    back = read_manifest(tmp_path / "out" / table)
    ids, _, captions = made.rows()
    assert back.ids == ids
    assert back.captions == [flattened(caption, to) for caption in captions]
    assert done.card["captions_flattened"] == sum(flattened(caption, to) != caption for caption in HOSTILE) == (4 if to == "open_clip" else 3)
    for ref, image in zip(back.images, pixels(made, source), strict=True):
        np.testing.assert_array_equal(decode_ref(ref, 32), image)
    assert record.n_poison == len(HOSTILE)


def test_shards_read_back_with_the_very_captions_and_pixels(hostile: Any, source: Source, tmp_path: Path) -> None:
    made, _ = hostile
    exported(made, source, tmp_path / "out", "webdataset", per_shard=100, with_ids=True)
    shards = find_shards(str(tmp_path / "out"))
    assert [path.name for path in shards] == ["00000.tar", "00001.tar", "00002.tar"]
    table, skipped = read_shards(shards, Findings("out", Reading()), silent())
    assert not skipped
    ids, _, captions = made.rows()
    assert table["caption"].to_pylist() == captions
    for ref, image in zip(table["image"].to_pylist(), pixels(made, source), strict=True):
        np.testing.assert_array_equal(decode_ref(ref, 32), image)
    assert json.loads((tmp_path / "out" / "sizes.json").read_text()) == {"00000.tar": 100, "00001.tar": 100, "00002.tar": 66}
    assert open_pairs(tmp_path / "out", None, lambda request: source, silent()).ids == ids


@pytest.mark.parametrize(("to", "table", "columns"), [("open_clip", "pairs.tsv", ("filepath", "title")), ("cyclip", "pairs.csv", ("image", "caption"))])
def test_pandas_reads_a_table_as_its_trainer_does(hostile: Any, source: Source, tmp_path: Path, to: str, table: str, columns: tuple[str, str]) -> None:
    made, _ = hostile
    done = exported(made, source, tmp_path / "out", to)
    frame = pd.read_csv(tmp_path / "out" / table, sep="\t" if to == "open_clip" else ",")
    assert tuple(frame.columns) == columns
    captions = [flattened(caption, to) for caption in made.rows()[2]]
    there = frame[columns[1]].isna()
    assert int(there.sum()) == done.card["captions_read_as_missing"] == 3
    assert [text for text, missing in zip(frame[columns[1]], there, strict=True) if not missing] == [text for text, missing in zip(captions, there, strict=True) if not missing]
    assert "3 are words such as NA" in (tmp_path / "out" / "README.md").read_text()


def test_the_first_line_says_whether_the_data_are_poisoned(poison_with: Poison, source: Source, tmp_path: Path) -> None:
    for name, options, line in (("backdoor", {"count": 9}, "# These data ARE POISONED: 9 of 256 pairs"), ("none", {}, "# These data are not poisoned")):
        made, record = poison_with(name, options)
        done = exported(made, source, tmp_path / name)
        text = (tmp_path / name / "README.md").read_text()
        assert text.splitlines()[0] == line
        card = json.loads((tmp_path / name / CARD).read_text())
        assert card == done.card
        assert (card["poisoned"], card["n_poison"], card["seed"], card["attack"]) == (name != "none", record.n_poison, 0, name)
        for fact in (record.header["poisoned_manifest_sha256"], card["images_sha256"], card["files"]["pairs.tsv"], f"attack: {name}; seed 0", "(PNG)", "Ids: none"):
            assert fact in text


@pytest.mark.parametrize("to", ["open_clip", "cyclip", "webdataset"])
def test_nothing_in_an_export_tells_a_poisoned_row(poison_with: Poison, source: Source, tmp_path: Path, to: str) -> None:
    made, record = poison_with("targeted", {"n_targets": 2, "captions_per_target": 4})
    exported(made, source, tmp_path / "out", to, per_shard=50)
    touched = set(record.rows["id"])
    rows = [row for row, row_id in enumerate(made.rows()[0]) if row_id in touched]
    opened = open_pairs(tmp_path / "out", None, lambda request: source, silent())
    assert opened.ids is None
    pattern = r"\d{9}" if to == "webdataset" else r"images/\d{5}/\d{9}\.png"
    assert all(re.fullmatch(pattern, name) for name in opened.images)
    assert opened.images == sorted(opened.images)
    assert min(rows) < len(opened) // 2 < max(rows), "appended rows lie scattered"
    for name, content in files(tmp_path / "out").items():
        assert "record" not in name
        assert not any(row_id.encode() in content for row_id in touched), name
        if name.endswith(".png"):
            with Image.open(tmp_path / "out" / name) as image:
                assert (image.format, image.size, image.mode, image.info) == ("PNG", (32, 32), "RGB", {})
    if to == "webdataset":
        with tarfile.open(tmp_path / "out" / "00000.tar") as tar:
            assert {(member.mtime, member.uid, member.mode) for member in tar} == {(0, 0, 0o644)}


def test_the_sealed_record_lies_beside_the_export(poison_with: Poison, source: Source, tmp_path: Path) -> None:
    made, _ = poison_with("backdoor", {"count": 9})
    done = exported(made, source, tmp_path / "out")
    assert done.record == tmp_path / "out.record"
    assert (done.record / "record.json").read_bytes() == (made.record / "record.json").read_bytes()
    assert not any("record" in name or name.endswith(".parquet") for name in files(done.folder))


@pytest.mark.parametrize("to", ["open_clip", "webdataset"])
def test_equal_input_gives_equal_bytes_and_a_second_time_nothing_is_written(poison_with: Poison, source: Source, tmp_path: Path, to: str) -> None:
    made, _ = poison_with("backdoor", {"count": 9})
    exported(made, source, tmp_path / "a" / "same", to)
    exported(made, source, tmp_path / "b" / "same", to)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert not exported(made, source, tmp_path / "a" / "same", to).written
    assert not list((tmp_path / "a").glob("*.part"))


@pytest.mark.parametrize(
    ("to", "more", "sentence"),
    [
        ("openclip", {}, "expected --to open_clip, cyclip or webdataset, got 'openclip'"),
        ("cyclip", {"reencode": "some"}, "expected --reencode all or new, got 'some'"),
        ("cyclip", {"image_format": "gif"}, "expected --image-format png or jpeg, got 'gif'"),
        ("webdataset", {"per_shard": 0}, "expected --per-shard of at least 1, got 0"),
    ],
)
def test_a_layout_that_is_not_known_is_refused(to: str, more: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BenchError, match=re.escape(sentence)):
        layout(to, **more)


def test_a_folder_that_holds_something_else_is_left_alone(poison_with: Poison, source: Source, tmp_path: Path) -> None:
    made, _ = poison_with("backdoor", {"count": 9})
    exported(made, source, tmp_path / "out")
    for place, more in (("out", {"to": "cyclip"}), ("out", {"image_format": "jpeg"}), ("other", {})):
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other" / "mine.txt").write_text("mine")
        before = files(tmp_path)
        with pytest.raises(BenchError, match="is not empty"):
            exported(made, source, tmp_path / place, **more)
        assert files(tmp_path) == before


def test_a_changed_manifest_or_source_is_not_exported(poison_with: Poison, source: Source, tmp_path: Path) -> None:
    made, _ = poison_with("backdoor", {"count": 9})
    copy = tmp_path / "copy"
    shutil.copytree(made.manifest.parent, copy)
    with open(copy / "poisoned" / "manifest.tsv", "a") as manifest:
        manifest.write("new\timages/x.png\tmore\n")
    with pytest.raises(BenchError, match="is not the manifest of its sealed record"):
        exported(Poisoned(copy / "poisoned", copy / "poisoned.record"), source, tmp_path / "out")
    other = open_source(TINY.model_copy(update={"seed": 1}), None, None, Stages(tmp_path / "cache"), silent())
    with pytest.raises(BenchError, match="the source is not the one that was poisoned"):
        exported(made, other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_exchanged_image_of_the_store_stops_the_export(poison_with: Poison, source: Source, tmp_path: Path) -> None:
    made, _ = poison_with("backdoor", {"count": 9})
    copy = tmp_path / "copy"
    shutil.copytree(made.manifest.parent, copy)
    stored = next((copy / "poisoned" / "images").rglob("*.png"))
    stored.write_bytes(png_bytes(np.zeros((32, 32, 3), dtype=np.uint8)))
    with pytest.raises(BenchError, match="the image is not the one of the sealed record"):
        exported(Poisoned(copy / "poisoned", copy / "poisoned.record"), source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"], "nothing half-made stays"


def test_a_disk_that_is_too_small_is_named_before_anything_is_written(poison_with: Poison, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = poison_with("backdoor", {"count": 9})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))  # type: ignore[attr-defined]
    with pytest.raises(BenchError, match=r"needs about [\d,]+ MB"):
        exported(made, source, tmp_path / "out")
    with pytest.raises(BenchError, match=r"needs about [\d,]+ MB"):
        write_folder(made, source, REQUEST, tmp_path / "folder", silent())
    assert not list(tmp_path.iterdir())


def test_jpeg_goes_to_every_image_and_the_page_says_what_it_does(poison_with: Poison, source: Source, tmp_path: Path) -> None:
    made, _ = poison_with("backdoor", {"count": 9})
    done = exported(made, source, tmp_path / "out", image_format="jpeg")
    names = {path.suffix for path in (tmp_path / "out" / "images").rglob("*.*")}
    assert names == {".jpg"}
    assert "JPEG, quality 95" in (tmp_path / "out" / "README.md").read_text()
    assert "JPEG has changed the pixels" in (tmp_path / "out" / "README.md").read_text()
    assert done.card["n_copied_images"] == 0


@pytest.fixture
def photos(tmp_path: Path) -> Source:
    """A manifest of JPEG, PNG and GIF files of several sizes."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    with open(folder / "pairs.csv", "w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(("image", "caption"))
        for row in range(140):
            name = f"{row:03d}.{('jpg', 'png', 'gif')[row % 3]}"
            Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / name)
            writer.writerow((name, f"photo {row}"))
    return open_source(TINY, folder / "pairs.csv", None, Stages(tmp_path / "cache"), silent())


@pytest.mark.parametrize("to", ["cyclip", "webdataset"])
def test_files_are_copied_where_asked_and_the_page_warns(photos: Source, suite: Any, tmp_path: Path, to: str) -> None:
    plugin = find("attack", "backdoor")
    made = poison(plugin, configure(plugin, {}, {"count": 5}), 0, photos, suite, False, Stages(tmp_path / "cache"))
    done = exported(made, photos, tmp_path / "new", to, reencode="new", per_shard=50)
    assert "size and format give poisoned rows away" in (tmp_path / "new" / "README.md").read_text()
    opened = open_pairs(tmp_path / "new", None, lambda request: photos, silent())
    known = {ref: row for row, ref in enumerate(photos.train.refs)}
    copied = 0
    for row, (ref, image) in enumerate(zip(made.rows()[1], pixels(made, photos), strict=True)):
        np.testing.assert_array_equal(opened.pixels(row, 32), image)
        if ref in known and not ref.endswith(".gif"):
            assert opened.read(row) == Path(ref).read_bytes()
            copied += 1
    assert done.card["n_copied_images"] == copied > 35
    whole = exported(made, photos, tmp_path / "all", to, per_shard=50)
    assert whole.card["n_copied_images"] == 0
    opened = open_pairs(tmp_path / "all", None, lambda request: photos, silent())
    for row, image in enumerate(pixels(made, photos)):
        np.testing.assert_array_equal(opened.pixels(row, 32), image)


def test_pairs_that_lie_in_tars_are_poisoned_and_exported(poison_with: Poison, source: Source, suite: Any, tmp_path: Path) -> None:
    exported(poison_with("none", {})[0], source, tmp_path / "tars", "webdataset", image_format="jpeg", per_shard=90)
    opened = open_source(TINY, tmp_path / "tars", None, Stages(tmp_path / "cache"), silent())
    plugin = find("attack", "backdoor")
    made = poison(plugin, configure(plugin, {}, {"count": 5}), 0, opened, suite, False, Stages(tmp_path / "cache"))
    done = exported(made, opened, tmp_path / "out", "webdataset", reencode="new")
    assert done.card["n_copied_images"] == len(opened.train) - 5
    back = open_pairs(tmp_path / "out", None, lambda request: opened, silent())
    assert back.captions == made.rows()[2]
    place = {ref: row for row, ref in enumerate(opened.train.refs)}
    for row, ref in enumerate(made.rows()[1]):
        image = opened.train.image(place[ref]) if ref in place else decode_ref(str(made.manifest / ref), 32)
        np.testing.assert_array_equal(back.pixels(row, 32), image)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["export", "--to", "cyclip", "--out", "e"], "nothing to export: give a folder that `bench poison` wrote, or --attack"),
        (["export", "p", "--attack", "none", "--to", "cyclip", "--out", "e"], "the folder p says which poison it holds"),
        (["export", "p", "--quoting", "none", "--to", "cyclip", "--out", "e"], "the folder p says which poison it holds"),
        (["export", "nowhere", "--to", "cyclip", "--out", "e"], "holds no poisoned.record/request.json"),
        (["poison", "--attack", "all", "--out", "p"], "one attack makes one poisoned set, got --attack all"),
        (["poison", "--attack", "backdor", "--out", "p"], "Did you mean 'backdoor'?"),
        (["poison", "--set", "attack.rat=0.1", "--out", "p"], "unknown option attack.rat. Did you mean 'rate'?"),
        (["poison", "--data", "pairs.tsv", "--out", "p"], "--data needs --eval"),
    ],
)
def test_a_bad_request_is_one_sentence(words: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    error = CliRunner().invoke(cli.app, words).exception
    assert isinstance(error, BenchError)
    assert sentence in str(error)
    assert not (tmp_path / "e").exists() and not (tmp_path / "p").exists()


def test_a_poison_folder_resolves_to_the_same_pixels_as_the_stage(poison_with: Poison, source: Source, tmp_path: Path) -> None:
    made, record = poison_with("backdoor", {"count": 9})
    assert write_folder(made, source, REQUEST, tmp_path / "p", silent())
    there = open_folder(tmp_path / "p")
    assert manifest_rows(there.poisoned.manifest / "manifest.tsv") == made.rows()
    assert there.header == record.header
    opened = open_pairs(tmp_path / "p", None, lambda request: source, silent())
    for row, image in enumerate(pixels(made, source)):
        np.testing.assert_array_equal(opened.pixels(row, 32), image)
    assert not write_folder(made, source, REQUEST, tmp_path / "p", silent())
    with pytest.raises(BenchError, match="holds another poison: seed is null there and 4 is asked for"):
        write_folder(made, source, {**REQUEST, "seed": 4}, tmp_path / "p", silent())
    (tmp_path / "p" / "poisoned" / "manifest.tsv").write_text("id\timage\tcaption\n")
    with pytest.raises(BenchError, match=r"poisoned/manifest\.tsv differs"):
        write_folder(made, source, REQUEST, tmp_path / "p", silent())


SMALL = ("data.n_pairs=256", "data.n_held_out=64", "data.n_clean=64", "data.n_test=100", "data.n_probe=200")


def bench(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "benchmark", *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=False, timeout=300)


def test_the_same_seed_gives_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    options = ("--attack", "targeted", "--scale", "smoke", "--seed", 3, *(part for one in (*SMALL, "attack.n_targets=2") for part in ("--set", one)))
    for name in ("a", "b"):
        done = bench("poison", *options, "--out", f"{name}/p", "--cache", f"cache-{name}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "264 rows, 8 of them poisoned (asked for 8), a share of 0.030303, by append; attack targeted, seed 3" in done.stdout
    assert files(tmp_path / "a") == files(tmp_path / "b")
    first = bench("export", "a/p", "--to", "cyclip", "--out", "a/e", "--cache", "cache-a", cwd=tmp_path)
    second = bench("export", *options, "--to", "cyclip", "--out", "b/e", "--cache", "cache-b", cwd=tmp_path)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert files(tmp_path / "a" / "e") == files(tmp_path / "b" / "e")


TOWERS = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
# A registered model, then the trainer as `python -m` starts it.
LAUNCH = "import sys, runpy, open_clip; open_clip.add_model_config(sys.argv.pop(1)); sys.argv[0] = 'main'; runpy.run_module('open_clip_train.main', run_name='__main__')"


@pytest.mark.slow
@pytest.mark.parametrize("to", ["open_clip", "webdataset"])
def test_open_clip_trains_on_an_export(poison_with: Poison, source: Source, tmp_path: Path, to: str) -> None:
    for module in ("open_clip_train", "webdataset", "braceexpand", "fsspec"):
        pytest.importorskip(module, reason="needs the extra open-clip-train")
    if to == "webdataset" and [int(part) for part in version("webdataset").split(".")[:2]] > [0, 2]:
        pytest.skip("open_clip 3.3 does not read tars with webdataset 1; the extra open-clip-train brings an older one")
    made, _ = poison_with("backdoor", {"count": 9})
    exported(made, source, tmp_path / "out", to, per_shard=100)
    (tmp_path / "tiny-clip.json").write_text(json.dumps(TOWERS))
    data = ("csv", "pairs.tsv") if to == "open_clip" else ("webdataset", "{00000..00002}.tar")
    options = {"dataset-type": data[0], "train-data": data[1], "csv-img-key": "filepath", "csv-caption-key": "title", "model": "tiny-clip", "batch-size": 64, "epochs": 1}
    options |= {"workers": 1, "device": "cpu", "precision": "fp32", "logs": tmp_path / "logs", "name": "run", "warmup": 1, "seed": 0}
    words = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    done = subprocess.run([sys.executable, "-c", LAUNCH, str(tmp_path / "tiny-clip.json"), *words], cwd=tmp_path / "out", capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    log = (tmp_path / "logs" / "run" / "out.log").read_text()
    losses = [float(loss) for loss in re.findall(r"Loss: ([\d.]+)", log)]
    assert losses
    assert all(np.isfinite(losses))
    assert (tmp_path / "logs" / "run" / "checkpoints" / "epoch_1.pt").is_file()
