"""Evaluation sets: drawn, or read from a folder with train/<class>/ and test/<class>/."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmark.data import world
from benchmark.data.eval_sets import Suite, open_suite
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
