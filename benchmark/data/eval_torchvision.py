"""Evaluation sets by name: the data as torchvision reads it, names and prompts of this program. Nothing is downloaded."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmark.data.eval_names import display_names
from benchmark.data.eval_readers import SUFFIXES, Listing, Pool, files_pool, set_apart
from benchmark.data.prompts import imagenet_names, imagenet_words, openai_templates
from benchmark.errors import BenchError
from benchmark.seeding import generator
from benchmark.settings import digest

DEFAULT_ROOT = Path("~/.cache/bench/eval")
_CALTECH_TRAIN = 30
_IMAGENET_TRAIN = 50

Labelled = tuple[list[Any], list[int]]


@dataclass(frozen=True)
class Read:
    """What a torchvision data set says.

    Attributes:
        names: classes in label order.
        splits: images (files, or uint8 arrays) and labels of each.
        sources: the files that arrays come from.
    """

    names: Sequence[str]
    splits: dict[str, Labelled]
    sources: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Known:
    """A data set that this program knows by name.

    Attributes:
        title: its class in torchvision.datasets.
        read: reads the data under a root.
        needs: files and folders under the root without which there is nothing to read.
        prompts: with `{c}` where the class name goes; empty for OpenAI's 80.
        target: display name of the class that attacks aim at if they are told none.
        splits: how train, validation and test come about.
        main_metric: the one that publications give.
        hint: what to do where the data are missing.
    """

    title: str
    read: Callable[[Path], Read]
    needs: tuple[str, ...]
    prompts: tuple[str, ...]
    target: str
    splits: str
    main_metric: str = "zero_shot_acc1"
    hint: str = ""


def data_root(given: Path | None) -> Path:
    """Where the data of named sets lie: as given, else BENCH_EVAL_ROOT, else ~/.cache/bench/eval."""
    return (given or Path(os.environ.get("BENCH_EVAL_ROOT") or DEFAULT_ROOT)).expanduser()


def read_named(name: str, root: Path) -> Listing:
    """The known set with its data under `root`.

    Raises:
        BenchError: files are missing or broken, or the class names of the data are not the known ones; the sentence says
            what to put where.
    """
    known = KNOWN[name]
    for needed in known.needs:
        if not (root / needed).exists():
            raise BenchError(f"{name}: no {needed} under {root}. {known.hint or _download(known, root)} --eval-root names another folder")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPy's about pickles that are older than it
            read = known.read(root)
    except BenchError:
        raise
    except Exception as error:
        raise BenchError(f"{name}: torchvision cannot read the data under {root}: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from None
    table = imagenet_names() if name == "imagenet" else display_names(name)
    strange = set(read.names) ^ set(table)
    if strange or len(read.names) != len(table):
        raise BenchError(f"{name}: the class names of the data under {root} are not those of {known.title}; they differ in {', '.join(map(repr, sorted(strange)[:5])) or 'number'}")
    classes = tuple(table[one] for one in read.names)
    pools: dict[str, Pool] = {}
    stats: list[tuple[str, int, int]] = []
    apart: tuple[int, ...] = ()
    for split, (all_items, all_labels) in read.splits.items():
        if not all_items or not all(0 <= label < len(classes) for label in all_labels):
            raise BenchError(f"{name}: the {split} split under {root} is empty or has labels outside 0 to {len(classes) - 1}")
        order = list(range(len(all_items)))
        if split == "train" and "validation" not in read.splits:
            order, apart = set_apart(all_labels, name)
        items, labels = [all_items[row] for row in order], [all_labels[row] for row in order]
        if read.sources:
            pools[split] = Pool([f"{split}/{row}" for row in order], labels, partial(_squares, items))
        else:
            pools[split], of_split = files_pool(root, split, [Path(item) for item in items], labels)
            stats += of_split
    stats += [(str(path.relative_to(root)), path.stat().st_size, path.stat().st_mtime_ns) for path in read.sources]
    facts = {"torchvision": name, "classes": classes, "files": digest(stats), "labels": digest([pool.labels for pool in pools.values()])}
    return Listing(
        name=name,
        where=f"{name} under {root}",
        classes=classes,
        templates=known.prompts or openai_templates(),
        pools=pools,
        apart=apart,
        facts=facts,
        target=known.target,
        synonyms=_synonyms(name, read.names, classes),
        about={"main_metric": known.main_metric, "splits": known.splits},
        published=True,
    )


def _download(known: Known, root: Path) -> str:
    return f'Nothing is downloaded here; torchvision does it with python -c "from torchvision.datasets import {known.title} as D; D({str(root)!r}, download=True)", or unpack the data there.'


def _squares(images: Sequence[NDArray[np.uint8]], side: int) -> Iterator[NDArray[np.uint8]]:
    from PIL import Image

    from benchmark.data.image import square

    for image in images:
        yield square(Image.fromarray(image), side)


def _synonyms(name: str, names: Sequence[str], classes: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """WordNet's further words for ImageNet's classes; other sets have none."""
    if name != "imagenet":
        return {}
    words = imagenet_words()
    found = {shown: tuple(word for word in words[wordnet_id] if word.casefold() != shown.casefold()) for wordnet_id, shown in zip(names, classes, strict=True)}
    return {shown: others for shown, others in found.items() if others}


def _pairs(data_set: Any) -> Labelled:
    """Files and labels of a data set that was opened with `loader=str`."""
    rows = [data_set[row] for row in range(len(data_set))]
    return [item for item, _ in rows], [int(label) for _, label in rows]


def _cifar(title: str, root: Path) -> Read:
    import torchvision.datasets

    opened = {split: getattr(torchvision.datasets, title)(str(root), train=split == "train") for split in ("train", "test")}
    folder = root / opened["test"].base_folder
    splits = {split: (list(one.data), [int(label) for label in one.targets]) for split, one in opened.items()}
    return Read(opened["test"].classes, splits, tuple(sorted(path for path in folder.iterdir() if path.is_file())))


def _with_loader(title: str, splits: dict[str, str], root: Path) -> Read:
    """A data set of files whose splits have the names on the right in torchvision."""
    import torchvision.datasets

    opened = {split: getattr(torchvision.datasets, title)(str(root), split=theirs, loader=str) for split, theirs in splits.items()}
    names = {tuple(one.classes) for one in opened.values()}
    if len(names) > 1:
        raise BenchError(f"{title} under {root}: the splits have different classes")
    return Read(names.pop(), {split: _pairs(one) for split, one in opened.items()})


def _pets(root: Path) -> Read:
    """Classes stand in the order of the label ids in the annotation files, under the title-cased names of torchvision."""
    from torchvision.datasets import OxfordIIITPet

    opened = {split: OxfordIIITPet(str(root), split=theirs) for split, theirs in (("train", "trainval"), ("test", "test"))}
    if opened["train"].classes != opened["test"].classes:
        raise BenchError(f"pets under {root}: trainval.txt and test.txt have different classes")
    return Read(opened["test"].classes, {split: ([str(path) for path in one._images], [int(label) for label in one._labels]) for split, one in opened.items()})


def _caltech101(root: Path) -> Read:
    """There is no official split: 30 images of every class are for training, drawn by a fixed seed, the rest for testing."""
    from torchvision.datasets import Caltech101

    opened = Caltech101(str(root))
    folder = Path(opened.root) / "101_ObjectCategories"
    train: Labelled = ([], [])
    test: Labelled = ([], [])
    for label, name in enumerate(opened.categories):
        files = sorted(path for path in (folder / name).iterdir() if path.suffix.lower() in SUFFIXES)
        order = generator("caltech101", name).permutation(len(files))
        chosen = set(order[: min(_CALTECH_TRAIN, len(files) - 1)].tolist())
        for row, path in enumerate(files):
            items, labels = train if row in chosen else test
            items.append(str(path))
            labels.append(label)
    return Read(opened.categories, {"train": train, "test": test})


def _imagenet(root: Path) -> Read:
    """The validation images are the test split; 50 training images of every class, drawn by a fixed seed, are for the probe."""
    from torchvision.datasets import ImageFolder

    folders = {split: root / "imagenet" / theirs for split, theirs in (("train", "train"), ("test", "val")) if (root / "imagenet" / theirs).is_dir()}
    opened = {split: ImageFolder(str(folder), loader=str) for split, folder in folders.items()}
    names = opened["test"].classes
    if "train" not in opened:
        return Read(names, {"test": _pairs(opened["test"])})
    if opened["train"].classes != names:
        raise BenchError(f"imagenet under {root}: train/ and val/ have different class folders")
    by_class: dict[int, list[str]] = {}
    for path, label in opened["train"].samples:
        by_class.setdefault(label, []).append(path)
    train: Labelled = ([], [])
    for label, files in sorted(by_class.items()):
        chosen = sorted(generator("imagenet", names[label]).permutation(len(files))[:_IMAGENET_TRAIN].tolist())
        train[0].extend(files[row] for row in chosen)
        train[1].extend([label] * len(chosen))
    return Read(names, {"train": train, "test": _pairs(opened["test"])})


_TRAIN_TEST = {"train": "train", "test": "test"}
_ALL_THREE = {"train": "train", "validation": "val", "test": "test"}
_CUT = "official train and test; a fifth of train is for validation"
_OFFICIAL = "official train, validation and test"
_RECALL = "zero_shot_mean_per_class_recall"

# Prompts follow section 3.1.4 of Radford et al. 2021 (arXiv 2103.00020): plain ones, and what kind of thing it is where
# the names alone do not say. The main metric is the one of its list of data sets.
KNOWN: dict[str, Known] = {
    "cifar10": Known("CIFAR10", partial(_cifar, "CIFAR10"), ("cifar-10-batches-py",), ("a photo of a {c}.",), "airplane", _CUT),
    "cifar100": Known("CIFAR100", partial(_cifar, "CIFAR100"), ("cifar-100-python",), ("a photo of a {c}.",), "bicycle", _CUT),
    "food101": Known("Food101", partial(_with_loader, "Food101", _TRAIN_TEST), ("food-101/meta", "food-101/images"), ("a photo of {c}, a type of food.",), "pizza", _CUT),
    "flowers102": Known(
        "Flowers102",
        partial(_with_loader, "Flowers102", _ALL_THREE),
        ("flowers-102/jpg", "flowers-102/imagelabels.mat", "flowers-102/setid.mat"),
        ("a photo of a {c}, a type of flower.",),
        "sunflower",
        _OFFICIAL,
        _RECALL,
    ),
    "dtd": Known(
        "DTD", partial(_with_loader, "DTD", _ALL_THREE), ("dtd/dtd/labels", "dtd/dtd/images"), ("a photo of a {c} texture.",), "striped", f"partition 1 of 10: {_OFFICIAL}"
    ),
    "caltech101": Known(
        "Caltech101",
        _caltech101,
        ("caltech101/101_ObjectCategories/BACKGROUND_Google",),
        ("a photo of a {c}.",),
        "airplane",
        f"no official one: {_CALTECH_TRAIN} images of every class are for training (seed 'caltech101' and the class), a fifth of them for validation, the rest for testing",
        _RECALL,
    ),
    "pets": Known(
        "OxfordIIITPet",
        _pets,
        ("oxford-iiit-pet/images", "oxford-iiit-pet/annotations/trainval.txt", "oxford-iiit-pet/annotations/test.txt"),
        ("a photo of a {c}, a type of pet.",),
        "Siamese",
        "official trainval and test; a fifth of trainval is for validation",
        _RECALL,
    ),
    "cars": Known(
        "StanfordCars",
        partial(_with_loader, "StanfordCars", _TRAIN_TEST),
        tuple(f"stanford_cars/{part}" for part in ("devkit/cars_meta.mat", "devkit/cars_train_annos.mat", "cars_train", "cars_test_annos_withlabels.mat", "cars_test")),
        ("a photo of a {c}.",),
        "Tesla Model S Sedan 2012",
        _CUT,
        hint="The source that torchvision downloaded from is gone: copy the data from somebody who has them.",
    ),
    "aircraft": Known(
        "FGVCAircraft",
        partial(_with_loader, "FGVCAircraft", _ALL_THREE),
        ("fgvc-aircraft-2013b/data/variants.txt", "fgvc-aircraft-2013b/data/images"),
        ("a photo of a {c}, a type of aircraft.",),
        "A380",
        f"variants: {_OFFICIAL}",
        _RECALL,
    ),
    "imagenet": Known(
        "ImageNet",
        _imagenet,
        ("imagenet/val",),
        (),
        "banana",
        f"official validation images as test; {_IMAGENET_TRAIN} training images of every class (seed 'imagenet' and the class) for the probe, a fifth of them for validation",
        hint="Get ILSVRC 2012 from image-net.org and put its images in imagenet/val/<WordNet id>/ and, for the probe, imagenet/train/<WordNet id>/.",
    ),
}
