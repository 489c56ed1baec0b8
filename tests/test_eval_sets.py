"""Evaluation sets: drawn, or read from folders in three layouts."""

import io
import re
import shutil
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmark.data import world
from benchmark.data.eval_sets import Suite, open_suite
from benchmark.data.image import decode_bytes, png_bytes
from benchmark.data.source import open_source
from benchmark.errors import BenchError
from benchmark.progress import silent
from benchmark.settings import DataSettings
from benchmark.stages import Stages

SETTINGS = DataSettings(side=16)


def test_the_drawn_sets_are_labelled_by_what_they_show(suite: Suite) -> None:
    assert list(suite.sets) == ["objects", "colours", "backgrounds", "outlines", "combinations"]
    for row in range(20):
        what = world.scene(0, "test", row)
        shown = (("objects", what.object), ("colours", what.colour), ("backgrounds", what.background), ("outlines", what.object))
        assert all(suite.get(name).classnames[suite.get(name).test.labels[row]] == tag for name, tag in shown)
    np.testing.assert_array_equal(suite.main.test.images[7], world.drawn_row(0, "test", 7, 32).image)


def test_every_drawn_set_has_a_target_prompts_and_disjoint_splits(suite: Suite) -> None:
    for one in suite.sets.values():
        assert one.default_target in one.classnames
        assert all("{c}" in template for template in one.templates)
        splits = [{image.tobytes() for image in split.images} for split in (one.train, one.validation, one.test)]
        assert sum(map(len, splits)) == len(set.union(*splits))
        assert len(one.train.labels) == 150 and len(one.validation.labels) == 50
    assert len({one.card["ids"] for one in suite.sets.values()}) == 3


def test_the_suite_is_the_same_from_another_cache(suite: Suite, settings: DataSettings, tmp_path: Path) -> None:
    assert open_suite(settings, None, Stages(tmp_path), silent()).content == suite.content


def write_set(folder: Path, n: int = 5, classes: tuple[str, ...] = ("big_dog", "cat")) -> Path:
    for number, split in enumerate(("train", "test")):
        for index, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for row in range(n):
                image = np.random.default_rng(1000 * number + 100 * index + row).integers(0, 255, (18, 20, 3), dtype=np.uint8)
                Image.fromarray(image).save(folder / split / name / f"{row}.png")
    return folder


def test_a_folder_becomes_a_set(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "pets")
    suite = open_suite(SETTINGS, folder, Stages(tmp_path / "cache"), silent())
    assert list(suite.sets) == ["pets"]
    assert suite.main.classnames == ("big dog", "cat")
    assert (len(suite.main.train.labels), len(suite.main.validation.labels), len(suite.main.test.labels)) == (8, 2, 10)
    assert sorted(suite.main.validation.labels.tolist()) == [0, 1]
    assert suite.main.test.ids[0] == "test/big_dog/0.png"
    assert "declares no default target" in suite.warnings[0]


def test_names_prompts_and_target_come_from_files_beside_the_images(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "pets", classes=("n01", "n02"))
    (folder / "classnames.txt").write_text("n01\tgreat dane\nn02\tsiamese_cat\n")
    (folder / "templates.txt").write_text("one {c}\n\n")
    (folder / "default_target.txt").write_text("siamese cat\n")
    one = open_suite(SETTINGS, folder, Stages(tmp_path / "cache"), silent()).main
    assert (one.classnames, one.templates, one.default_target) == (("great dane", "siamese cat"), ("one {c}",), "siamese cat")


def refusal(folder: Path, cache: Path) -> str:
    with pytest.raises(BenchError) as caught:
        open_suite(SETTINGS, folder, Stages(cache), silent())
    return str(caught.value)


def test_folders_that_are_no_set_are_answered_with_what_is_missing(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert "no evaluation set at" in refusal(tmp_path / "none", cache)
    folder = write_set(tmp_path / "pets")
    (folder / "templates.txt").write_text("a photo of a dog\n")
    assert "'a photo of a dog' has no {c} where the class name goes" in refusal(folder, cache)
    (folder / "templates.txt").write_bytes(b"\xff {c}\n")
    assert "templates.txt is not UTF-8" in refusal(folder, cache)
    (folder / "templates.txt").unlink()
    (folder / "classnames.txt").write_text("cat\tcat\n")
    assert "has no line for 'big_dog'; expected folder<TAB>display name" in refusal(folder, cache)
    (folder / "classnames.txt").unlink()
    (folder / "test" / "cat" / "0.png").write_bytes((folder / "train" / "cat" / "0.png").read_bytes())
    assert "1 test images also stand in train/, such as 0.png" in refusal(folder, cache)
    (folder / "test" / "cat" / "0.png").write_bytes(b"broken")
    assert "0.png is not a whole" in refusal(folder, cache)
    (folder / "train" / "cat").rename(folder / "train" / "kitten")
    assert "classes differ between train/ and test/: cat, kitten" in refusal(folder, cache)
    assert "one class alone" in refusal(write_set(tmp_path / "one", classes=("cat",)), cache)


def test_a_class_name_that_stands_twice_cannot_be_a_target(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "pets")
    (folder / "classnames.txt").write_text("cat\tcrane\nbig_dog\tcrane\n")
    one = open_suite(SETTINGS, folder, Stages(tmp_path / "cache"), silent()).main
    with pytest.raises(BenchError, match="class name 'crane' stands twice in pets"):
        one.index("crane")


def test_poison_follows_pairs_that_were_moved_to_another_folder(tmp_path: Path) -> None:
    from benchmark.data.poison import poison
    from benchmark.registry import configure, find

    stages = Stages(tmp_path / "cache")
    suite = open_suite(SETTINGS, write_set(tmp_path / "pets"), stages, silent())
    pairs = tmp_path / "here"
    (pairs / "images").mkdir(parents=True)
    rows = []
    for row in range(130):
        Image.fromarray(np.random.default_rng(row).integers(0, 255, (18, 20, 3), dtype=np.uint8)).save(pairs / "images" / f"{row}.png")
        rows.append(f"images/{row}.png\tnumber {row}\n")
    (pairs / "pairs.tsv").write_text("image\tcaption\n" + "".join(rows))
    plugin = find("attack", "none")
    for name in ("here", "there"):
        if name == "there":
            pairs.rename(tmp_path / "there")
        source = open_source(SETTINGS, tmp_path / name / "pairs.tsv", None, stages, silent())
        poisoned = poison(plugin, configure(plugin, {}, {}), 0, source, suite, False, stages)
        assert all(Path(ref).is_file() for ref in poisoned.rows()[1])


def png(number: int) -> bytes:
    return png_bytes(np.random.default_rng(number).integers(0, 255, (18, 20, 3), dtype=np.uint8))


def add_member(tar: tarfile.TarFile, name: str, raw: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(raw)
    tar.addfile(member, io.BytesIO(raw))


def write_tars(folder: Path, splits: tuple[str, ...] = ("train", "test"), per_tar: int = 6) -> Path:
    """Two tars a split, as clip_benchmark writes them; labels 0, 1, 2, 0, ..."""
    for number, split in enumerate(splits):
        (folder / split).mkdir(parents=True)
        (folder / split / "nshards.txt").write_text("2")
        for shard in range(2):
            with tarfile.open(folder / split / f"{shard}.tar", "w") as tar:
                for row in range(shard * per_tar, (shard + 1) * per_tar):
                    add_member(tar, f"s{row:07d}.png", png(1000 * number + row))
                    add_member(tar, f"s{row:07d}.cls", str(row % 3).encode())
    (folder / "classnames.txt").write_text("big_dog\ncat\nhen\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n{c} on paper\n")
    return folder


def test_a_clip_benchmark_folder_becomes_a_set(tmp_path: Path) -> None:
    folder = write_tars(tmp_path / "wds_pets")
    suite = open_suite(SETTINGS, [str(folder)], Stages(tmp_path / "cache"), silent())
    one = suite.main
    assert (one.name, one.classnames, one.templates) == ("wds_pets", ("big dog", "cat", "hen"), ("a photo of a {c}.", "{c} on paper"))
    assert one.test.labels.tolist() == [0, 1, 2] * 4
    assert (one.test.ids[0], one.test.ids[11]) == ("test/0/s0000000", "test/1/s0000011")
    assert (len(one.train.labels), len(one.validation.labels)) == (9, 3)
    assert one.test.images[7].tolist() == decode_bytes(png(1007), "it", 16).tolist()
    (folder / "default_target.txt").write_text("hen\n")
    assert open_suite(SETTINGS, folder, Stages(tmp_path / "cache"), silent()).main.default_target == "hen"


def test_a_validation_split_that_a_set_brings_is_used(tmp_path: Path) -> None:
    folder = write_tars(tmp_path / "pets", ("train", "val", "test"))
    one = open_suite(SETTINGS, folder, Stages(tmp_path / "cache"), silent()).main
    assert (len(one.train.labels), len(one.validation.labels), one.validation.ids[0]) == (12, 12, "val/0/s0000000")


def test_what_is_missing_in_a_clip_benchmark_folder_is_named(tmp_path: Path) -> None:
    cache = tmp_path / "cache"

    def broken(name: str, change: Callable[[Path], object]) -> str:
        folder = write_tars(tmp_path / name)
        change(folder)
        return refusal(folder, cache)

    assert "has no classnames.txt" in broken("a", lambda folder: (folder / "classnames.txt").unlink())
    assert "has no zeroshot_classification_templates.txt" in broken("b", lambda folder: (folder / "zeroshot_classification_templates.txt").unlink())
    assert "has no nshards.txt" in broken("c", lambda folder: (folder / "test" / "nshards.txt").unlink())
    assert "1.tar; nshards.txt says that there are 2 tars" in broken("d", lambda folder: (folder / "test" / "1.tar").unlink())
    assert "expected a number of tars, got 'two'" in broken("e", lambda folder: (folder / "test" / "nshards.txt").write_text("two"))
    assert "is a retrieval set" in broken("f", lambda folder: (folder / "dataset_type.txt").write_text("retrieval\n"))
    assert "expected a label from 0 to 1, got '2'" in broken("g", lambda folder: (folder / "classnames.txt").write_text("dog\ncat\n"))
    assert "1.tar is not a whole tar" in broken("h", lambda folder: (folder / "train" / "1.tar").write_bytes(b"no tar"))

    def without_label(folder: Path) -> None:
        with tarfile.open(folder / "test" / "0.tar", "a") as tar:
            add_member(tar, "s9.png", png(1))

    assert "'s9' has no label (.cls)" in broken("i", without_label)

    def cut(folder: Path) -> None:
        with tarfile.open(folder / "test" / "1.tar", "a") as tar:
            add_member(tar, "s8.png", png(1)[:200])
            add_member(tar, "s8.cls", b"0")

    assert "1.tar:s8.png is not a whole JPEG" in broken("j", cut)

    def shorten(folder: Path, n: int, damage: bytes = b"") -> None:
        tar = folder / "test" / "1.tar"
        with tarfile.open(tar) as whole:
            fourth = whole.getmembers()[6].offset
        tar.write_bytes(tar.read_bytes()[: fourth + n] + damage)

    for name, n, damage in (("k", 0, b""), ("l", 100, b""), ("m", 0, b"\xff" * 2048)):
        assert "1.tar is not a whole tar" in broken(name, partial(shorten, n=n, damage=damage))


CLASSES = '{"classes": ["big_dog", "cat"],\n "templates": [lambda c: f"a photo of a {c}.", lambda x: f\'{x} on paper\']}\n'


def write_family(folder: Path, column: str = "image", splits: tuple[str, ...] = ("train", "test"), classes: str = CLASSES) -> Path:
    """Folders as CyCLIP and its successors read them."""
    for number, split in enumerate(splits):
        part = folder / split
        (part / "images").mkdir(parents=True)
        rows = [f"{column},label"]
        for row in range(10):
            (part / "images" / f"{row}.png").write_bytes(png(1000 * number + row))
            rows.append(f"images/{row}.png,{row % 2}")
        (part / "labels.csv").write_text("\n".join(rows) + "\n")
        (part / "classes.py").write_text(classes)
    return folder


@pytest.mark.parametrize("column", ["image", "path"])
def test_a_folder_with_labels_csv_and_classes_py_becomes_a_set(column: str, tmp_path: Path) -> None:
    folder = write_family(tmp_path / "pets", column)
    one = open_suite(SETTINGS, [str(folder)], Stages(tmp_path / "cache"), silent()).main
    assert (one.classnames, one.templates) == (("big dog", "cat"), ("a photo of a {c}.", "{c} on paper"))
    assert (len(one.train.labels), len(one.validation.labels), one.test.labels.tolist()) == (8, 2, [0, 1] * 5)
    alone = open_suite(SETTINGS, [str(folder / "test")], Stages(tmp_path / "cache"), silent())
    assert (alone.main.name, alone.main.no_probe is None, len(alone.main.train.labels)) == ("pets", False, 0)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('__import__("pathlib").Path("canary").write_text("")', "expected a dictionary"),
        ('{"classes": [open("canary", "w").name], "templates": [lambda c: f"{c}"]}', "line 1 column 14: expected a string"),
        ('{"classes": ["a"], "templates": [lambda c: f"{open(\'canary\', \'w\')} {c}"]}', "expected a template like"),
        ('{"classes": ["a"], "templates": [lambda c, d=open("canary", "w"): f"{c}"]}', "expected a template like"),
        ('{"classes": ["a"], "templates": [lambda c: f"{c!r}"]}', "expected a template like"),
        ('{"classes": ["a"], "templates": [lambda c: f"{c:>9}"]}', "expected a template like"),
        ('{"classes": ["a"], "templates": [lambda c: f"no name"]}', "expected a template like"),
        ('{"classes": ["a"], "templates": [str]}', "expected a template like"),
        ('{**{}, "classes": ["a"], "templates": [lambda c: f"{c}"]}', "expected a dictionary"),
        ('{"classes": ["a"]}', "has no 'templates'"),
        ('{"classes": [], "templates": []}', "must not be empty"),
        ('import os\nopen("canary", "w")', "is not one dictionary of classes and templates"),
        ("(" * 5000, "is not one dictionary of classes and templates"),
    ],
)
def test_a_hostile_classes_py_is_refused_and_does_not_run(text: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_family(tmp_path / "pets", classes=text)
    found = refusal(folder, tmp_path / "cache")
    assert sentence in found
    assert "classes.py" in found
    assert not (tmp_path / "canary").exists()


def test_what_is_wrong_with_labels_csv_is_named_with_its_row(tmp_path: Path) -> None:
    cache, folder = tmp_path / "cache", write_family(tmp_path / "pets")
    table = folder / "test" / "labels.csv"
    for text, sentence in (
        ("file,label\na,0\n", "expected the columns image (or path) and label, got file, label"),
        ("image,label\nimages/0.png,2\n", "row 1: expected a label from 0 to 1, got '2'"),
        ("image,label\nimages/0.png,0\nimages/99.png,1\n", "row 2: no file at images/99.png"),
        ("image,label\n../train/images/0.png,0\n", "row 1: '../train/images/0.png' leaves"),
        (f"image,label\n{folder}/test/images/0.png,0\n", "paths are relative to labels.csv"),
        ("image,label\nimages/0.png\n", "row 1: 1 fields, the header has 2"),
        ("image,label\n", "has no rows"),
    ):
        table.write_text(text)
        assert sentence in refusal(folder, cache)
    for part in ("train", "test"):
        (folder / part / "classes.py").unlink()
    assert "has labels.csv and no classes.py" in refusal(folder, cache)


def test_images_shared_by_train_and_test_are_refused_in_every_layout(tmp_path: Path) -> None:
    family = write_family(tmp_path / "family")
    (family / "train" / "images" / "4.png").write_bytes((family / "test" / "images" / "7.png").read_bytes())
    assert "1 test images also stand in train/, such as 7.png" in refusal(family, tmp_path / "cache")
    tars = write_tars(tmp_path / "tars")
    (tars / "train" / "0.tar").write_bytes((tars / "test" / "0.tar").read_bytes())
    assert "6 test images also stand in train/" in refusal(tars, tmp_path / "cache")


def test_a_set_without_a_train_split_says_so(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "pets")
    shutil.rmtree(folder / "train")
    suite = open_suite(SETTINGS, folder, Stages(tmp_path / "cache"), silent())
    assert suite.main.train.images.shape == (0, 16, 16, 3)
    assert suite.main.no_probe == "evaluation set 'pets' has no train split, and its test images are not used for training"
    assert any("has no train split, so no linear probe is trained on it" in line for line in suite.warnings)
    (folder / "test").rename(folder / "valid")
    assert "has no test/" in refusal(folder, tmp_path / "cache")


def test_wordnet_ids_without_names_are_refused(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "pets", classes=("n01440764", "n01443537"))
    assert "'n01440764' is a WordNet id and no name; classnames.txt must say what each means" in refusal(folder, tmp_path / "cache")


def test_several_sets_make_one_suite_and_the_first_is_the_main_one(tmp_path: Path) -> None:
    stages = Stages(tmp_path / "cache")
    one, two = write_set(tmp_path / "one"), write_set(tmp_path / "two", classes=("hen", "fox"))
    suite = open_suite(SETTINGS, [str(one), str(two)], stages, silent())
    assert (list(suite.sets), suite.main.name) == (["one", "two"], "one")
    assert [line for line in suite.warnings if "default target" in line] == list(open_suite(SETTINGS, one, stages, silent()).warnings)
    contents = [open_suite(SETTINGS, wanted, stages, silent()).content for wanted in ([one, two], [two, one], [one], [two])]
    assert len(set(contents)) == 4 and contents[0] == suite.content
    assert all(path.is_relative_to(suite.folder) for path in (tmp_path / "cache").rglob("suite.json"))
    with pytest.raises(BenchError, match="two evaluation sets are named 'one'"):
        open_suite(SETTINGS, [one, write_set(tmp_path / "other" / "one")], stages, silent())


def test_images_of_the_same_file_names_in_two_sets_are_not_confused(tmp_path: Path) -> None:
    one, two = write_set(tmp_path / "one"), write_set(tmp_path / "two")
    for path in two.rglob("*.png"):
        Image.fromarray(np.asarray(Image.open(path))[::-1]).save(path)
    sets = open_suite(SETTINGS, [one, two], Stages(tmp_path / "cache"), silent()).sets
    assert sets["one"].test.ids == sets["two"].test.ids
    assert sets["one"].test.name != sets["two"].test.name
    assert sets["one"].train.name != sets["two"].train.name


def test_prompts_can_be_chosen_and_change_no_image(tmp_path: Path) -> None:
    stages, folder = Stages(tmp_path / "cache"), write_set(tmp_path / "pets")
    own = open_suite(SETTINGS, [folder], stages, silent())
    file = tmp_path / "prompts.txt"
    file.write_text("one {}\n\ntwo {c}\n")
    other = open_suite(SETTINGS, [folder], stages, silent(), templates=str(file))
    assert other.main.templates == ("one {c}", "two {c}")
    assert (other.content != own.content, other.main.card["templates"] != own.main.card["templates"], other.main.test.name) == (True, True, own.main.test.name)
    openai = open_suite(SETTINGS, [folder], stages, silent(), templates="openai").main.templates
    assert (len(openai), openai[0]) == (80, "a bad photo of a {c}.")
    for text, sentence in (("nothing", "'nothing' has no {c}"), ("\n", "holds no template")):
        file.write_text(text)
        with pytest.raises(BenchError, match=re.escape(sentence)):
            open_suite(SETTINGS, [folder], stages, silent(), templates=str(file))
    with pytest.raises(BenchError, match="no file of templates at 'opnai'; --templates takes set, openai, or a file"):
        open_suite(SETTINGS, [folder], stages, silent(), templates="opnai")


def test_a_run_measures_on_every_set_and_says_where_there_is_no_probe(tmp_path: Path) -> None:
    import benchmark
    from benchmark.report.records import load
    from benchmark.report.tables import long_table, per_run

    pairs = tmp_path / "pairs"
    pairs.mkdir()
    rows = ["image\tcaption\n"]
    for row in range(256):
        drawn = world.drawn_row(0, "train", row, 32)
        (pairs / f"{row}.png").write_bytes(png_bytes(drawn.image))
        rows.append(f"{row}.png\t{world.scene(0, 'train', row).captions[0]}\n")
    (pairs / "pairs.tsv").write_text("".join(rows))
    for split, first, n in (("train", 0, 60), ("test", 100, 40)):
        for row in range(first, first + n):
            name = world.scene(0, "test", row).colour
            (tmp_path / "colours" / split / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "colours" / split / name / f"{row}.png").write_bytes(png_bytes(world.drawn_row(0, "test", row, 32).image))
    shutil.copytree(tmp_path / "colours" / "test", tmp_path / "unseen" / "test")
    record = benchmark.run(
        "backdoor",
        "clip",
        scale="smoke",
        sets=("attack.rate=0.05", "attack.target_class=red", "train.epochs=1", "augment.synonyms=none"),
        results=tmp_path / "results",
        data=pairs / "pairs.tsv",
        eval=(tmp_path / "unseen", tmp_path / "colours"),
    )
    found = {(entry["name"], entry["of"]): entry for entry in record["metrics"]}
    assert found["zero_shot_acc1", "unseen"]["value"] == found["zero_shot_acc1", "colours"]["value"]
    assert found["linear_probe_acc1", "colours"]["n"] == 40
    assert (found["linear_probe_acc1", "unseen"]["value"], found["linear_probe_asr", "backdoor"]["value"]) == (None, None)
    assert record["not_run"]["linear_probe_acc1/unseen"] == "evaluation set 'unseen' has no train split, and its test images are not used for training"
    assert {entry["card"] for entry in record["metrics"] if entry["card"]} <= set(record["cards"])
    (run,) = load(tmp_path / "results")
    assert per_run(run, "linear_probe_acc1") is None
    table = long_table([run])
    (line,) = table[(table.metric == "linear_probe_acc1") & (table.of == "unseen")].to_dict("records")
    assert (line["status"], line["reason"]) == ("not run", record["not_run"]["linear_probe_acc1/unseen"])
