"""Images decoded at once or when asked for: the same pixels, the same weights."""

import numpy as np
import pytest
import torch

from benchmark.contract import Defense
from benchmark.data.image import png_bytes
from benchmark.data.images import EncodedImages, PickedImages, Veiled, in_blocks, open_images, pick, resident, write_encoded
from benchmark.progress import silent
from benchmark.settings import AugmentSettings, ModelSettings, TrainSettings
from benchmark.train.loop import Budget, TrainingData, train
from benchmark.train.model import build
from benchmark.train.pixels import Pixels
from benchmark.train.views import TextViews

N = 40


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (N, 32, 32, 3), dtype=np.uint8)


@pytest.fixture
def encoded(pixels, tmp_path):
    assert write_encoded(tmp_path, (png_bytes(image) for image in pixels)) == N
    return EncodedImages(tmp_path, 32)


@pytest.mark.parametrize("rows", [3, -1, slice(2, 9), slice(None), slice(0, 0), np.array([5, 5, 0]), np.array([], dtype=np.int64)], ids=str)
def test_encoded_images_are_indexed_like_an_array(pixels, encoded, rows):
    assert encoded.shape == pixels.shape
    np.testing.assert_array_equal(encoded[rows], pixels[rows])
    picked = PickedImages(encoded, np.arange(N))
    np.testing.assert_array_equal(picked[rows], pixels[rows])


def test_picked_images_come_from_two_places_in_an_order_of_their_own(pixels, encoded):
    over = pixels[:3] // 2
    images = PickedImages(encoded, np.array([7, -1, 0, -3, 7]), over)
    expected = np.stack([pixels[7], over[0], pixels[0], over[2], pixels[7]])
    np.testing.assert_array_equal(images[:], expected)
    np.testing.assert_array_equal(np.asarray(images), expected)
    np.testing.assert_array_equal(images[3], over[2])
    np.testing.assert_array_equal(pick(images, np.array([4, 1]))[:], expected[[4, 1]])
    np.testing.assert_array_equal(np.concatenate(list(in_blocks(images, 2))), expected)


def test_behind_a_veil_there_are_pixels_and_nothing_else(pixels, encoded):
    images = PickedImages(encoded, np.array([7, -1, 0]), pixels[:1] // 2)
    veiled = Veiled(images)
    np.testing.assert_array_equal(veiled[:], images[:])
    np.testing.assert_array_equal(np.asarray(veiled), images[:])
    np.testing.assert_array_equal(pick(veiled, np.array([1, 1]))[:], images[np.array([1, 1])])
    assert len(veiled) == 3
    assert veiled.shape == (3, 32, 32, 3)
    assert not resident(veiled)
    assert {name for name in dir(veiled) if not name.startswith("_")} == {"resident", "shape"}


def test_the_form_on_disk_is_found(pixels, encoded, tmp_path):
    assert not resident(open_images(encoded.folder, N, 32))
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "images.u8").write_bytes(pixels.tobytes())
    images = open_images(plain, N, 32)
    assert resident(images)
    assert not resident(PickedImages(encoded, np.arange(N), pixels))
    np.testing.assert_array_equal(images, pixels)


def test_a_feed_yields_every_batch_in_order_whether_images_are_decoded_or_not(pixels, encoded):
    batches = list(torch.randperm(N, generator=torch.Generator().manual_seed(0)).view(-1, 4))
    for images in (pixels, encoded):
        fed = list(Pixels(images, torch.device("cpu")).feed(batches))
        assert len(fed) == len(batches)
        for rows, (seen, shown) in zip(batches, fed, strict=True):
            assert torch.equal(rows, seen)
            np.testing.assert_array_equal(shown.numpy(), pixels[rows.numpy()])


def test_a_broken_image_ends_the_feed_with_its_name(pixels, tmp_path):
    write_encoded(tmp_path, [png_bytes(pixels[0]), b"no image", *(png_bytes(image) for image in pixels[2:8])])
    with pytest.raises(Exception, match="image 1 of"):
        list(Pixels(EncodedImages(tmp_path, 32), torch.device("cpu")).feed(list(torch.arange(8).view(-1, 2))))


def test_training_on_bytes_gives_the_weights_of_training_on_pixels(pixels, encoded, tmp_path):
    hashes = set()
    for name, images in (("pixels", pixels), ("bytes", encoded)):
        model = build(ModelSettings(), 32, 0, torch.device("cpu"))
        captions = [f"a photo of number {row}" for row in range(N)]
        texts = TextViews(captions, Defense(), None, model.tokenizer, "fixed", 0)
        data = TrainingData(images, model.tokenizer.encode(captions)[0], texts)
        folder = tmp_path / name
        folder.mkdir()
        train(model, Defense(), data, Budget(TrainSettings(epochs=2, batch_size=8), AugmentSettings(), True, 0), folder, silent())
        hashes.add(model.weights_sha256())
    assert len(hashes) == 1
