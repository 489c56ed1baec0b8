"""DPA over pre-training (docs/methods/dpa.md): the parts, and what each model depends on."""

import json

import numpy as np
import pytest
import torch

from benchmark.testing import World
from benchmark.train.lab import PairsView
from defenses.clip import Clip
from defenses.dpa import DPA, content_hash, partition


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


def view(n=30, seed=0):
    rng = np.random.default_rng(seed)
    return PairsView(rng.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8), tuple(f"caption {index}" for index in range(n)))


def parted(pairs, by, parts=3):
    names = [content_hash(pairs, row, by) for row in range(len(pairs))]
    order = [content_hash(pairs, row, "row") for row in range(len(pairs))]
    return [[(pairs.images[row].tobytes(), pairs.captions[row]) for row in part] for part in partition(names, order, parts)]


@pytest.mark.parametrize("by", ["image", "row"])
def test_the_order_of_rows_does_not_matter(by):
    pairs = view()
    order = np.random.default_rng(1).permutation(30)
    shuffled = PairsView(pairs.images[order], tuple(pairs.captions[row] for row in order))
    assert parted(pairs, by) == parted(shuffled, by)
    assert sorted(row for part in parted(pairs, by) for row in part) == sorted((pairs.images[row].tobytes(), pairs.captions[row]) for row in range(30))


@pytest.mark.parametrize("by", ["image", "row"])
def test_one_more_row_changes_one_part(by):
    pairs, more = view(), view(1, seed=9)
    grown = PairsView(np.concatenate([more.images, pairs.images]), (*more.captions, *pairs.captions))
    changed = [before != after for before, after in zip(parted(pairs, by), parted(grown, by), strict=True)]
    assert sum(changed) == 1


def test_captions_of_one_image_stay_together_by_image_and_duplicates_by_row():
    pairs = view()
    images = np.concatenate([pairs.images, np.repeat(pairs.images[:1], 20, axis=0)])
    many = PairsView(images, (*pairs.captions, *(f"another {index}" for index in range(20))))
    of = {image: {index for index, part in enumerate(parted(many, "image")) if any(one == image for one, _ in part)} for image in {image.tobytes() for image in images}}
    assert all(len(parts) == 1 for parts in of.values())
    by_row = parted(many, "row")
    assert sum(any(one == images[0].tobytes() for one, _ in part) for part in by_row) > 1
    twice = PairsView(np.repeat(pairs.images[:1], 2, axis=0), ("same", "same"))
    assert sorted(map(len, parted(twice, "row"))) == [0, 0, 2]


def test_a_model_depends_on_its_part_alone_and_on_nothing_else(world, tmp_path):
    lab = world.lab(DPA(), "dpa")
    models = DPA(parts=2).defend(lab)
    names = [content_hash(lab.pairs, row, "image") for row in range(192)]
    order = [content_hash(lab.pairs, row, "row") for row in range(192)]
    first = partition(names, order, 2)[0]
    alone = world.lab(DPA(), "elsewhere").train(Clip(), rows=first, batch_size=32).model
    assert models[0].weights_sha256() == alone.weights_sha256() != models[1].weights_sha256()


def test_an_empty_part_has_the_untrained_model_and_a_small_one_a_small_batch(world):
    lab = world.lab(DPA(), "small")
    defense = DPA(parts=3)
    untrained = defense._train(lab, [])
    assert untrained.weights_sha256() == defense._train(lab, [4]).weights_sha256() == lab.untrained().weights_sha256()
    assert not untrained.net.training and not lab.trainings
    few = defense._train(lab, [1, 5, 9])
    assert json.loads((lab.trainings[-1] / "cost.json").read_text())["pairs_trained"] == 3 * 3
    assert few.weights_sha256() != untrained.weights_sha256() and bool(torch.isfinite(few.encode_texts(["a boat"])).all())
