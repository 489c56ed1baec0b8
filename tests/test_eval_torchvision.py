"""Evaluation sets by name: torchvision's own file formats, made small, and what happens where they are not there."""

import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets
from PIL import Image
from scipy.io import savemat

from benchmark.data.eval_names import KNOWN_NAMES, display_names, known_name
from benchmark.data.eval_readers import stratified
from benchmark.data.eval_sets import open_suite, read_set
from benchmark.data.eval_torchvision import KNOWN, data_root
from benchmark.data.prompts import imagenet_names, imagenet_words
from benchmark.errors import BenchError
from benchmark.progress import silent
from benchmark.settings import DataSettings
from benchmark.stages import Stages

SETTINGS = DataSettings(side=16)


def picture(path: Path, number: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(number).integers(0, 255, (18, 20, 3), dtype=np.uint8)).save(path, format="JPEG")
    return path


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_cifar10(root: Path, patch: pytest.MonkeyPatch | None, share: bool = False) -> Path:
    """The pickled batches of CIFAR-10 with a few images; `patch` makes torchvision expect these very files."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (60, 3072), dtype=np.uint8)
    if share:
        pixels[3] = pixels[55]
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    for number, name in enumerate(names):
        batch = {"batch_label": "made", "data": pixels[10 * number : 10 * number + 10], "labels": [(row + number) % 10 for row in range(10)]}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(display_names("cifar10"))}, protocol=2))
    if patch is not None:
        patch.setattr(torchvision.datasets.CIFAR10, "train_list", [[name, md5(folder / name)] for name in names[:5]])
        patch.setattr(torchvision.datasets.CIFAR10, "test_list", [["test_batch", md5(folder / "test_batch")]])
        patch.setattr(torchvision.datasets.CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": md5(folder / "batches.meta")})
    return root


def write_flowers(root: Path, patch: pytest.MonkeyPatch) -> Path:
    folder = root / "flowers-102"
    for number in range(1, 13):
        picture(folder / "jpg" / f"image_{number:05d}.jpg", number)
    savemat(folder / "imagelabels.mat", {"labels": np.array([[1, 1, 1, 1, 54, 54, 54, 54, 102, 102, 102, 102]])})
    savemat(folder / "setid.mat", {"trnid": [[1, 5, 9]], "valid": [[2, 6, 10]], "tstid": [[3, 4, 7, 8, 11, 12]]})
    files = {"image": ("102flowers.tgz", ""), **{key: (f"{name}.mat", md5(folder / f"{name}.mat")) for key, name in (("label", "imagelabels"), ("setid", "setid"))}}
    patch.setattr(torchvision.datasets.Flowers102, "_file_dict", files)
    return root


def write_pets(root: Path) -> Path:
    """Files are named in another order than the label ids: the classes follow the ids."""
    folder = root / "oxford-iiit-pet"
    (folder / "annotations").mkdir(parents=True)
    breeds = sorted(display_names("pets"), key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    for split, rows in (("trainval", (1, 2)), ("test", (3,))):
        lines = []
        for label, breed in enumerate(breeds, start=1):
            name = breed.lower().replace(" ", "_")
            for row in rows:
                picture(folder / "images" / f"{name}_{row}.jpg", 100 * label + row)
                lines.append(f"{name}_{row} {label} 1 1\n")
        (folder / "annotations" / f"{split}.txt").write_text("".join(lines))
    return root


def write_listed(root: Path, names: list[str], splits: tuple[str, ...], path: str) -> list[list[tuple[str, str]]]:
    """One image for each class and split under `root/path.format(name=, split=, number=)`; (class, split) of each."""
    rows = []
    for number, name in enumerate(names):
        for split in splits:
            picture(root / path.format(name=name, split=split, number=f"{number:03d}"), 7 * number + len(split))
            rows.append((name, split, f"{number:03d}"))
    return rows


def write_others(root: Path, name: str) -> None:
    names = list(display_names(name)) if name != "imagenet" else ["n01440764", "n07753592"]
    if name == "dtd":
        rows = write_listed(root / "dtd" / "dtd", names, ("train", "val", "test"), "images/{name}/{name}_{split}.jpg")
        for split in ("train", "val", "test"):
            for partition in range(1, 11):
                file = root / "dtd" / "dtd" / "labels" / f"{split}{partition}.txt"
                file.parent.mkdir(exist_ok=True)
                file.write_text("".join(f"{cls}/{cls}_{of}.jpg\n" for cls, of, _ in rows if of == split))
    elif name == "food101":
        write_listed(root / "food-101", names, ("train", "test"), "images/{name}/{split}.jpg")
        (root / "food-101" / "meta").mkdir()
        for split in ("train", "test"):
            (root / "food-101" / "meta" / f"{split}.json").write_text(json.dumps({cls: [f"{cls}/{split}"] for cls in names}))
    elif name == "aircraft":
        rows = write_listed(root / "fgvc-aircraft-2013b" / "data", names, ("train", "val", "test"), "images/{split}{number}.jpg")
        folder = root / "fgvc-aircraft-2013b" / "data"
        (folder / "variants.txt").write_text("".join(f"{cls}\n" for cls in names))
        for split in ("train", "val", "test"):
            (folder / f"images_variant_{split}.txt").write_text("".join(f"{split}{number} {cls}\n" for cls, of, number in rows if of == split))
    elif name == "cars":
        folder = root / "stanford_cars"
        write_listed(folder, names, ("train", "test"), "cars_{split}/{number}.jpg")
        (folder / "devkit").mkdir()
        kind = [("class", "O"), ("fname", "O")]
        for file in ("devkit/cars_train_annos.mat", "cars_test_annos_withlabels.mat"):
            savemat(folder / file, {"annotations": np.array([[(number + 1, f"{number:03d}.jpg") for number in range(len(names))]], dtype=kind)})
        savemat(folder / "devkit" / "cars_meta.mat", {"class_names": np.array([names], dtype=object)})
    elif name == "caltech101":
        write_listed(root / "caltech101" / "101_ObjectCategories", names, ("a", "bb", "ccc"), "{name}/image_{split}.jpg")
        (root / "caltech101" / "101_ObjectCategories" / "BACKGROUND_Google").mkdir()
    elif name == "imagenet":
        write_listed(root / "imagenet", names, ("train", "val"), "{split}/{name}/{name}.JPEG")
    else:
        raise ValueError(name)


def test_cifar10_is_read_from_its_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_cifar10(tmp_path / "data", monkeypatch)
    one = open_suite(SETTINGS, ["cifar10"], Stages(tmp_path / "cache"), silent(), root).main
    assert (one.name, one.default_target, one.templates) == ("cifar10", "airplane", ("a photo of a {c}.",))
    assert one.classnames == tuple(display_names("cifar10"))
    assert one.test.labels.tolist() == [(row + 5) % 10 for row in range(10)]
    raw = np.random.default_rng(0).integers(0, 255, (60, 3072), dtype=np.uint8)
    assert np.asarray(Image.fromarray(raw[50].reshape(3, 32, 32).transpose(1, 2, 0)).resize((16, 16), Image.Resampling.BICUBIC)).tolist() == one.test.images[0].tolist()
    assert (len(one.train.labels), len(one.validation.labels)) == (40, 10)
    assert sorted([*one.train.ids, *one.validation.ids]) == sorted(f"train/{row}" for row in range(50))
    at = one.train.ids.index("train/13")
    assert one.train.labels[at] == (3 + 1) % 10
    assert one.card["main_metric"] == "zero_shot_acc1"
    assert "fifth of train" in one.card["splits"]


def test_the_validation_split_of_a_named_set_stands_together_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_cifar10(tmp_path / "data", monkeypatch)
    one = open_suite(SETTINGS, ["cifar10"], Stages(tmp_path / "cache"), silent(), root).main
    assert all(isinstance(split.images, np.memmap) for split in (one.train, one.validation, one.test))
    labels = [(row % 10 + row // 10) % 10 for row in range(50)]
    assert {int(row_id.removeprefix("train/")) for row_id in one.validation.ids} == set(stratified(labels, "cifar10"))


def test_a_test_image_that_also_stands_in_train_is_left_out_of_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_cifar10(tmp_path / "data", monkeypatch, share=True)
    suite = open_suite(SETTINGS, ["torchvision:cifar10"], Stages(tmp_path / "cache"), silent(), root)
    one = suite.main
    assert len(one.train.labels) + len(one.validation.labels) == 49
    assert "train/3" not in {*one.train.ids, *one.validation.ids}
    assert len(one.test.labels) == 10
    assert suite.warnings == ("1 train images of evaluation set 'cifar10' stand in another of its splits too and were left out of train",)


class Canary:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (open, ("canary", "w"))


def test_a_batch_that_is_not_the_published_one_is_refused_before_it_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    root = write_cifar10(tmp_path / "data", None)
    (root / "cifar-10-batches-py" / "data_batch_1").write_bytes(pickle.dumps(Canary()))
    with pytest.raises(BenchError, match=r"cifar10: torchvision cannot read the data under .*: Dataset not found or corrupted"):
        read_set("cifar10", root)
    assert not (tmp_path / "canary").exists()


def test_flowers_have_three_splits_and_labels_from_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_flowers(tmp_path / "data", monkeypatch)
    one = open_suite(SETTINGS, ["flowers-102"], Stages(tmp_path / "cache"), silent(), root).main
    assert [split.labels.tolist() for split in (one.train, one.validation, one.test)] == [[0, 53, 101], [0, 53, 101], [0, 0, 53, 53, 101, 101]]
    assert (one.classnames[53], one.classnames[101], one.classnames[59]) == ("sunflower", "blackberry lily", "pink-yellow dahlia")
    assert one.train.ids == ("flowers-102/jpg/image_00001.jpg", "flowers-102/jpg/image_00005.jpg", "flowers-102/jpg/image_00009.jpg")
    assert one.card["main_metric"] == "zero_shot_mean_per_class_recall"


def test_pets_are_named_in_the_order_of_their_label_ids(tmp_path: Path) -> None:
    root = write_pets(tmp_path / "data")
    one = open_suite(SETTINGS, ["pets"], Stages(tmp_path / "cache"), silent(), root).main
    for name, label in zip(one.test.ids, one.test.labels, strict=True):
        breed = Path(name).stem.rpartition("_")[0].replace("_", " ").title()
        assert display_names("pets")[breed] == one.classnames[label]
    assert one.classnames != tuple(sorted(one.classnames))
    assert (len(one.train.labels), len(one.validation.labels), len(one.test.labels)) == (37, 37, 37)


@pytest.mark.parametrize("name", ["dtd", "food101", "aircraft", "cars", "caltech101"])
def test_a_set_of_files_is_read_in_the_label_order_of_torchvision(name: str, tmp_path: Path) -> None:
    write_others(tmp_path, name)
    listing = read_set(name, tmp_path)
    names = display_names(name)
    assert set(listing.classes) == set(names.values())
    for pool in listing.pools.values():
        for row_id, label in zip(pool.ids, pool.labels, strict=True):
            part = Path(row_id).stem[-3:] if name in ("aircraft", "cars") else Path(row_id).parent.name
            expected = list(names)[int(part)] if name in ("aircraft", "cars") else part
            assert listing.classes[label] == names[expected]
    assert ("validation" in listing.pools) == (name in ("dtd", "aircraft"))


def test_dtd_says_its_partition_and_caltech_its_split(tmp_path: Path) -> None:
    for name in ("dtd", "caltech101"):
        write_others(tmp_path, name)
    assert "partition 1 of 10" in read_set("dtd", tmp_path).about["splits"]
    caltech = read_set("caltech101", tmp_path)
    assert "30 images of every class" in caltech.about["splits"]
    assert (len(caltech.pools["train"].ids), len(caltech.pools["test"].ids)) == (202, 101)
    assert not set(caltech.pools["train"].ids) & set(caltech.pools["test"].ids)
    assert read_set("caltech101", tmp_path).pools["train"].ids == caltech.pools["train"].ids


def test_imagenet_goes_by_wordnet_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_others(tmp_path, "imagenet")
    with pytest.raises(BenchError, match=r"imagenet: the class names of the data under .* are not those of ImageNet; they differ in 'n01443537'"):
        read_set("imagenet", tmp_path)
    few = {wordnet_id: imagenet_names()[wordnet_id] for wordnet_id in ("n01440764", "n07753592")}
    monkeypatch.setattr("benchmark.data.eval_torchvision.imagenet_names", lambda: few)
    listing = read_set("imagenet-1k", tmp_path)
    assert (listing.classes, listing.target, len(listing.templates)) == (("tench", "banana"), "banana", 80)
    assert listing.synonyms["tench"] == ("Tinca tinca",)
    for path in sorted((tmp_path / "imagenet" / "train").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (tmp_path / "imagenet" / "train").rmdir()
    assert list(read_set("imagenet", tmp_path).pools) == ["test"]


def test_the_display_names_of_imagenet_stand_at_the_right_ids() -> None:
    """open_clip's names share a word with WordNet's for the id; shifted by one, hardly any does."""

    def words(text: str) -> set[str]:
        return {word.casefold().rstrip("s") for word in text.replace("-", " ").replace("(", " ").split()}

    names, known = imagenet_names(), imagenet_words()
    shown, ids = list(names.values()), list(names)
    agreement = [sum(bool(words(name) & words(" ".join(known[wordnet_id]))) for name, wordnet_id in zip(shown[shift:] + shown[:shift], ids, strict=True)) for shift in (0, 1)]
    assert agreement[0] > 900
    assert agreement[1] < 250


def test_class_names_that_are_not_the_known_ones_are_refused(tmp_path: Path) -> None:
    root = write_pets(tmp_path)
    for split in ("trainval", "test"):
        file = root / "oxford-iiit-pet" / "annotations" / f"{split}.txt"
        file.write_text(file.read_text().replace("siamese_", "siameze_"))
    with pytest.raises(BenchError, match=r"pets: the class names of the data under .* are not those of OxfordIIITPet; they differ in 'Siamese', 'Siameze'"):
        read_set("pets", root)


@pytest.mark.parametrize("name", KNOWN_NAMES)
def test_missing_data_are_answered_with_what_to_put_where(name: str, tmp_path: Path) -> None:
    with pytest.raises(BenchError) as caught:
        read_set(name, tmp_path)
    assert f"{name}: no {KNOWN[name].needs[0]} under {tmp_path}. " in str(caught.value)
    assert "--eval-root" in str(caught.value)
    assert ("download=True" in str(caught.value)) == (name not in ("cars", "imagenet"))
    assert not list(tmp_path.iterdir())


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    root = write_pets(tmp_path)
    (root / "oxford-iiit-pet" / "images" / "siamese_3.jpg").unlink()
    with pytest.raises(BenchError, match=r"no file at .*siamese_3.jpg, which the test split lists"):
        read_set("pets", root)


def test_names_are_taken_with_and_without_prefix_and_misspelt_ones_are_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(KNOWN) == set(KNOWN_NAMES)
    assert [known_name(text) for text in ("cifar10", "CIFAR-10", "torchvision:CIFAR10", "oxford_pets", "./cifar10", "folder")] == [
        "cifar10",
        "cifar10",
        "cifar10",
        "pets",
        None,
        None,
    ]
    with pytest.raises(BenchError, match=r"unknown evaluation set 'cifer10'. Did you mean 'cifar10'"):
        known_name("torchvision:cifer10")
    with pytest.raises(BenchError, match=r"no evaluation set at cifer10; expected a folder, or one of aircraft, .* Did you mean 'cifar10'"):
        read_set("cifer10", tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifar10").mkdir()
    with pytest.raises(BenchError, match=r"'cifar10' is a folder here and the name of a data set; write ./cifar10 or torchvision:cifar10"):
        known_name("cifar10")


def test_the_root_is_the_option_then_the_variable_then_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BENCH_EVAL_ROOT", raising=False)
    assert data_root(None) == Path("~/.cache/bench/eval").expanduser()
    monkeypatch.setenv("BENCH_EVAL_ROOT", str(tmp_path))
    assert data_root(None) == tmp_path
    assert data_root(Path("here")) == Path("here")


@pytest.mark.parametrize(
    ("name", "n"), [("cifar10", 10), ("cifar100", 100), ("food101", 101), ("flowers102", 102), ("dtd", 47), ("caltech101", 101), ("pets", 37), ("cars", 196), ("aircraft", 100)]
)
def test_every_class_has_a_display_name_of_its_own(name: str, n: int) -> None:
    names = display_names(name)
    assert len(names) == n == len({shown.casefold() for shown in names.values()})
    assert KNOWN[name].target in names.values()
    assert all("{c}" in prompt for prompt in KNOWN[name].prompts)


def test_the_table_of_flowers_has_the_keys_of_torchvision() -> None:
    assert set(display_names("flowers102")) == set(torchvision.datasets.Flowers102.classes)


def test_the_page_lists_every_known_set_with_its_metric() -> None:
    page = (Path(__file__).parents[1] / "docs" / "evaluation_sets.md").read_text()
    known = page.partition("\n## Known by name\n")[2].partition("\n## ")[0]
    rows = {cells[1].strip("` "): cells[5].strip() for cells in (line.split("|") for line in known.splitlines() if line.startswith("| `"))}
    metrics = {"zero_shot_acc1": "accuracy", "zero_shot_mean_per_class_recall": "mean per-class recall"}
    assert rows == {name: metrics[one.main_metric] for name, one in KNOWN.items()}
