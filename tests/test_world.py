"""The drawn world: rows are pure functions of seed, split and row."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from benchmark.data import world
from benchmark.data.mentions import mentions
from benchmark.data.pairs import Source
from benchmark.data.source import open_source
from benchmark.progress import silent
from benchmark.settings import DataSettings
from benchmark.stages import Stages


def test_a_row_is_the_same_each_time_it_is_drawn() -> None:
    for variant in ("plain", "outline", "combinations"):
        first, second = (world.drawn_row(0, "test", 5, 32, variant) for _ in range(2))
        np.testing.assert_array_equal(first.image, second.image)
        np.testing.assert_array_equal(first.mask, second.mask)


def test_another_seed_split_or_row_is_another_scene() -> None:
    places = [(seed, split, row) for seed in (0, 1) for split in world.SPLITS for row in (0, 1)]
    scenes = {(what.tint, what.centre) for what in (world.scene(*place) for place in places)}
    assert len(scenes) == len(places)


def test_the_scene_does_not_depend_on_the_side() -> None:
    assert world.drawn_row(0, "train", 0, 32).image.shape == (32, 32, 3)
    assert world.drawn_row(0, "train", 0, 48).image.shape == (48, 48, 3)
    assert world.scene(0, "train", 0) == world.scene(0, "train", 0)


def test_fewer_pairs_are_the_first_of_more(source: Source, tmp_path: Path) -> None:
    fewer = open_source(DataSettings(n_pairs=64, n_held_out=32, n_clean=32, n_test=100, n_probe=200), None, None, Stages(tmp_path), silent())
    for few, many in ((fewer.train, source.train), (fewer.held_out, source.held_out), (fewer.clean, source.clean)):
        assert few.ids == many.ids[: len(few)]
        assert few.captions == many.captions[: len(few)]
        np.testing.assert_array_equal(few.images, many.images[: len(few)])


def test_splits_share_no_image(source: Source) -> None:
    images = [image.tobytes() for split in (source.train, source.held_out, source.clean) for image in split.images]
    assert len(set(images)) == len(images) == 256 + 64 + 64


def test_withheld_combinations_stand_in_their_own_shift_set_alone() -> None:
    def held_back(split: str, combinations: bool) -> list[bool]:
        scenes = [world.scene(0, split, row, combinations) for row in range(400)]
        return [world.withheld(world.OBJECTS.index(what.object), tuple(world.COLOURS).index(what.colour)) for what in scenes]

    assert not any(held_back("train", False))
    assert not any(held_back("test", False))
    assert all(held_back("test", True))


def test_mask_and_background_fit_the_image() -> None:
    for row in range(20):
        drawing = world.drawn_row(0, "train", row, 32)
        assert drawing.image.dtype == drawing.mask.dtype == drawing.background.dtype == np.uint8
        assert drawing.mask.shape == (32, 32)
        assert drawing.background.shape == drawing.image.shape == (32, 32, 3)
        np.testing.assert_array_equal(drawing.image[drawing.mask == 0], drawing.background[drawing.mask == 0])
        assert 0.02 < (drawing.mask == 255).mean() < 0.8


def test_an_outline_covers_less_than_the_filled_shape() -> None:
    what = world.scene(0, "test", 3)
    assert world.draw(what, 32, outline=True).mask.sum() < world.draw(what, 32).mask.sum()


def test_every_class_occurs_about_equally_often() -> None:
    counts = Counter(world.scene(0, "train", row).object for row in range(2000))
    assert set(counts) == set(world.OBJECTS)
    assert max(counts.values()) < 2 * min(counts.values())


def test_a_caption_mentions_no_other_object_than_the_one_that_is_shown() -> None:
    for row in range(300):
        what = world.scene(0, "train", row)
        for name in world.OBJECTS:
            if name != what.object:
                assert not any(mentions(what.captions, (name, *world.SYNONYMS[name]))), (what.captions, name)


@pytest.mark.parametrize("word", [*world.OBJECTS, *world.COLOURS, *world.BACKGROUNDS])
def test_no_two_words_share_a_synonym(word: str) -> None:
    others = {other for known, synonyms in world.SYNONYMS.items() if known != word for other in (known, *synonyms)}
    assert not others & set(world.SYNONYMS.get(word, ()))
