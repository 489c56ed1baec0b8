"""Edits on a manifest: ids, order, stored images, packing."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmark.contract import Append, Replace, Why
from benchmark.data.attack_lab import AttackLab
from benchmark.data.eval_sets import Suite
from benchmark.data.image import decode
from benchmark.data.manifest import make_ids
from benchmark.data.pack import pack
from benchmark.data.pairs import Source
from benchmark.data.poison import Poisoned, SealedRecord, apply, open_record, poison
from benchmark.data.tokens import Tokenizer
from benchmark.errors import BenchError
from benchmark.progress import silent
from benchmark.registry import configure, find
from benchmark.seeding import generator
from benchmark.stages import Stages

Poison = Callable[..., tuple[Poisoned, SealedRecord]]


class Letters:
    """A tokenizer that the tests can read."""

    sot_token_id, eot_token_id = 1, 2

    def encode(self, text: str) -> list[int]:
        return [3 + ord(letter) % 1000 for letter in text]


LETTERS = Tokenizer("letters", 24, Letters())


def picture(seed: int, side: int = 32) -> Any:
    return generator("picture", seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def test_stored_images_decode_to_the_exact_array(source: Source, tmp_path: Path) -> None:
    ids, refs, captions, rows = apply(source.train, [Replace(3, image=picture(0)), Append(picture(1), "new")], tmp_path, 0, {})
    np.testing.assert_array_equal(decode(tmp_path / refs[ids.index(source.train.ids[3])], 32), picture(0))
    appended = next(row["id"] for row in rows if row["edit"] == "append")
    np.testing.assert_array_equal(decode(tmp_path / refs[ids.index(appended)], 32), picture(1))
    assert captions[ids.index(appended)] == "new"


def test_ids_stay_and_appended_rows_are_woven_in(source: Source, tmp_path: Path) -> None:
    ids, refs, captions, rows = apply(source.train, [Append(picture(row), f"new {row}") for row in range(40)], tmp_path, 0, {})
    new = [row["id"] for row in rows]
    assert [row_id for row_id in ids if row_id not in new] == source.train.ids
    places = [ids.index(row_id) for row_id in new]
    assert min(places) < 60
    assert max(places) > 236
    assert len({place // 74 for place in places}) == 4
    assert new == make_ids([refs[place] for place in places], [captions[place] for place in places])


def test_a_replaced_row_keeps_its_id_and_place(source: Source, tmp_path: Path) -> None:
    ids, refs, captions, rows = apply(source.train, [Replace(9, caption="other", why=Why(caption_source="x"))], tmp_path, 0, {})
    assert ids == source.train.ids
    assert refs == source.train.refs
    assert [row for row, caption in enumerate(captions) if caption != source.train.captions[row]] == [9]
    assert (rows[0]["caption_before"], rows[0]["caption_after"], rows[0]["caption_source_id"]) == (source.train.captions[9], "other", "x")


@pytest.mark.parametrize(
    ("edits", "sentence"),
    [
        ([Replace(5, caption="a"), Replace(5, caption="b")], "the attack edits row 5 twice"),
        ([Replace(256, caption="a")], "the attack edits row 256 of 256"),
        ([Replace(-1, caption="a")], "the attack edits row -1 of 256"),
        ([Append(picture(0, side=16), "a")], r"an edit's image must be uint8 (32, 32, 3), got uint8 (16, 16, 3)"),
        ([Append(picture(0).astype(np.float32), "a")], r"an edit's image must be uint8 (32, 32, 3), got float32 (32, 32, 3)"),
    ],
)
def test_edits_that_make_no_sense_are_refused(source: Source, tmp_path: Path, edits: list[Any], sentence: str) -> None:
    with pytest.raises(BenchError) as caught:
        apply(source.train, edits, tmp_path, 0, {})
    assert sentence in str(caught.value)


def test_the_pack_holds_the_pairs_and_nothing_about_poison(poison_with: Poison, source: Source, tmp_path: Path) -> None:
    poisoned, record = poison_with("backdoor", {"count": 9})
    packed = pack(poisoned, source, LETTERS, "fixed", Stages(tmp_path), silent())
    touched = {source.train.ids.index(row_id) for row_id in record.rows["id"]}
    assert {row for row in range(256) if (packed.images[row] != source.train.images[row]).any()} == touched
    assert {row for row in range(256) if packed.captions[row] != source.train.captions[row]} == touched
    stage = next((tmp_path / "pack").glob("*/pack.json")).parent
    assert sorted(path.name for path in stage.iterdir()) == ["captions.json", "done.json", "images.u8", "pack.json", "tokens.u16"]


def test_a_sham_row_packs_to_the_original_bytes(poison_with: Poison, source: Source, tmp_path: Path) -> None:
    poisoned, record = poison_with("backdoor", {"count": 9}, sham=True)
    packed = pack(poisoned, source, LETTERS, "fixed", Stages(tmp_path), silent())
    assert record.n_poison == 9
    np.testing.assert_array_equal(packed.images, source.train.images)


def test_an_end_token_is_kept_where_a_caption_is_cut() -> None:
    tokens, n_long = LETTERS.encode(["abc", "x" * 50])
    assert n_long == 1
    assert tokens.shape == (2, 24)
    assert tokens[0, 4] == 2 and tokens[0, 5:].max() == 0
    assert tokens[1, -1] == 2
    assert LETTERS.encode(["x" * 50], "official")[0][0, -1] != 2
    assert LETTERS.encode(["abc"])[0].shape == (1, 5)


def test_the_record_is_plain_json_and_says_what_was_done(poison_with: Poison) -> None:
    poisoned, record = poison_with("backdoor", {"count": 9})
    header = json.loads((poisoned.record / "record.json").read_text())
    assert header["warning"] == "contains poisoned training data"
    assert header["n_rows_before"] == header["n_rows"] == 256
    assert set(record.rows["trigger"]) == set(header["triggers"])
    assert (record.rows["psnr"] < 40).all()


def test_held_out_images_that_training_shows_are_not_used(source: Source, suite: Suite, tmp_path: Path) -> None:
    hashes = (source.folder / "pixels.txt").read_text().split()
    hashes[256 + 3] = hashes[0]
    hashes[256 + 9] = hashes[256 + 8]
    (tmp_path / "pixels.txt").write_text("\n".join(hashes))
    lab = AttackLab(dataclasses.replace(source, folder=tmp_path), suite, "targeted", 0)
    assert set(range(64)) - set(lab.unseen) == {3, 9}


def test_streams_are_named_by_what_they_decide(source: Source, suite: Suite) -> None:
    lab = AttackLab(source, suite, "targeted", 0)
    assert lab.rng("a", 1).random() == lab.rng("a", 1).random()
    assert len({lab.rng(purpose, key).random() for purpose in "ab" for key in (1, 2)}) == 4


def also_measured(suite: Suite, images: dict[int, np.ndarray[Any, Any]]) -> Suite:
    """The suite with these images in place of some test images of its main set."""
    shown = np.array(suite.main.test.images)
    for row, image in images.items():
        shown[row] = image
    main = dataclasses.replace(suite.main, test=dataclasses.replace(suite.main.test, images=shown, pool="mine"))
    return dataclasses.replace(suite, sets={**suite.sets, main.name: main}, content="mine" + str(sorted(images)))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("targeted", {"n_targets": 3, "captions_per_target": 2}),
        ("backdoor", {"count": 9}),
        ("backdoor", {"count": 9, "edits": "append"}),
        ("noisy_alignment", {"count": 5}),
        ("dual_key", {"count": 3, "negatives": 1}),
    ],
)
def test_an_image_that_is_measured_is_not_poisoned(poison_with: Poison, source: Source, suite: Suite, tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    _, record = poison_with(name, options)
    taken = record.rows["source_id"].iloc[1].split("+")[0]
    pairs = source.train if taken in source.train.ids else source.held_out
    plugin = find("attack", name)
    attack = configure(plugin, {}, options)
    measured = also_measured(suite, {4: pairs.image(pairs.ids.index(taken))})
    with pytest.raises(BenchError, match=rf"image {taken}.*, which the attack takes, is test image {measured.main.test.ids[4]} of objects"):
        poison(plugin, attack, 0, source, measured, False, Stages(tmp_path))
    free = next(row_id for row_id in source.train.ids if row_id not in set(record.rows["source_id"]))
    untouched = open_record(poison(plugin, attack, 0, source, also_measured(suite, {5: source.train.image(source.train.ids.index(free))}), False, Stages(tmp_path)).record)
    assert untouched.header["poisoned_manifest_sha256"] == record.header["poisoned_manifest_sha256"]
    assert not any("show test images" in line for line in record.header["warnings"])
    assert f"1 of the 384 pairs show test images ({free} is {suite.main.test.ids[5]} of objects)" in untouched.header["warnings"][0]


def test_a_test_image_that_is_the_goal_may_be_trained_on_if_the_attack_says_so(poison_with: Poison, suite: Suite) -> None:
    _, record = poison_with("mm_poison", {"variant": "I", "image_from": "test"})
    assert record.header["warnings"] == [f"mm_poison: test image {record.kept['image_id']} is trained on, because it is the goal of the attack"]
    assert record.kept["image_id"] in suite.main.test.ids
