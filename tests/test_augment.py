import pytest
import torch
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as reference

from benchmark.settings import SCALES, AugmentSettings
from benchmark.train.augment import augment, blur, blur_kernel, crop_and_flip, crop_boxes, jitter, luma, turn_hue, visible_share

SIDE = 32


@pytest.fixture
def images():
    return torch.rand(6, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def one_by_one(images, transform):
    return torch.stack([transform(image, index) for index, image in enumerate(images)])


def test_crop_resize_and_flip_equal_torchvisions(images):
    boxes = crop_boxes(6, SIDE, 0.08, 1.0, torch.Generator().manual_seed(2))
    flips = torch.tensor([True, False] * 3)

    def transform(image, index):
        top, left, height, width = boxes[index].tolist()
        out = reference.resized_crop(image, top, left, height, width, [SIDE, SIDE], antialias=True)
        return reference.hflip(out) if flips[index] else out

    assert torch.allclose(crop_and_flip(images, boxes, flips), one_by_one(images, transform), atol=2e-5)


def test_the_whole_image_uncropped_comes_back_as_it_was(images):
    boxes = torch.tensor([[0, 0, SIDE, SIDE]] * 6)
    assert torch.allclose(crop_and_flip(images, boxes, torch.zeros(6, dtype=torch.bool)), images, atol=1e-5)


def test_crop_boxes_are_distributed_as_torchvisions():
    boxes = crop_boxes(4000, SIDE, 0.3, 1.0, torch.Generator().manual_seed(0)).float()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = torch.tensor([RandomResizedCrop.get_params(torch.empty(3, SIDE, SIDE), [0.3, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)]).float()
    assert torch.allclose(boxes.mean(0), theirs.mean(0), atol=0.45)
    assert torch.allclose(boxes.std(0), theirs.std(0), atol=0.45)
    assert (boxes[:, 0] + boxes[:, 2] <= SIDE).all() and (boxes[:, 1] + boxes[:, 3] <= SIDE).all()


@pytest.mark.parametrize(
    ("position", "adjust"),
    [(0, reference.adjust_brightness), (1, reference.adjust_contrast), (2, reference.adjust_saturation)],
    ids=["brightness", "contrast", "saturation"],
)
def test_each_colour_operation_equals_torchvisions(images, position, adjust):
    factors = [torch.ones(6) for _ in range(3)]
    factors[position] = torch.tensor([0.5, 0.7, 1.0, 1.2, 1.5, 0.0])
    ours = jitter(images, *factors, None)
    assert torch.allclose(ours, one_by_one(images, lambda image, index: adjust(image, float(factors[position][index]))), atol=1e-5)


def test_hue_equals_torchvisions(images):
    turns = torch.tensor([-0.5, -0.1, 0.0, 0.05, 0.1, 0.5])
    grey = torch.full_like(images[:1], 0.4)
    images = torch.cat([images[:5], grey])
    assert torch.allclose(turn_hue(images, turns), one_by_one(images, lambda image, index: reference.adjust_hue(image, float(turns[index]))), atol=1e-5)


def test_grey_equals_torchvisions(images):
    assert torch.allclose(luma(images), reference.rgb_to_grayscale(images), atol=1e-6)


@pytest.mark.parametrize("kernel", [3, 9])
def test_blur_equals_torchvisions(images, kernel):
    sigma = torch.tensor([0.1, 0.3, 0.5, 1.0, 1.5, 2.0])
    ours = blur(images, sigma, kernel)
    assert torch.allclose(ours, one_by_one(images, lambda image, index: reference.gaussian_blur(image, [kernel, kernel], [float(sigma[index])] * 2)), atol=1e-5)


@pytest.mark.parametrize(("side", "kernel"), [(224, 21), (64, 7), (32, 3), (16, 3), (60, 5), (112, 11), (384, 37)])
def test_the_blur_kernel_is_the_nearest_odd_share_of_the_published_one(side, kernel):
    assert blur_kernel(side) == kernel
    assert abs(kernel - 21 * side / 224) <= 1 or kernel == 3


@pytest.mark.parametrize("settings", [AugmentSettings(), SCALES["paper"].augment], ids=["small", "paper"])
def test_augmentation_is_a_function_of_its_generator_and_stays_in_range(images, settings):
    before = torch.get_rng_state()
    one, two, other = (augment(images, settings, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert one.min() >= 0 and one.max() <= 1 + 1e-6
    assert torch.equal(before, torch.get_rng_state())


def test_an_image_is_augmented_alike_whatever_its_neighbours_show(images):
    settings = SCALES["paper"].augment
    changed = images.clone()
    changed[1:] = 0.25
    one, two = (augment(batch, settings, torch.Generator().manual_seed(3)) for batch in (images, changed))
    assert torch.allclose(one[0], two[0], atol=1e-6)


@pytest.mark.parametrize(("crop_min", "place", "share"), [(0.08, 104, 0.84), (0.08, 208, 0.002), (0.9, 208, 0.15)])
def test_a_trigger_is_visible_as_often_as_published_crops_show_it(crop_min, place, share):
    """A 16-px patch in the centre or the corner of 224 px (docs/methods/roclip.md)."""
    found = visible_share((place, place, 16, 16), 224, AugmentSettings(crop_min=crop_min), torch.Generator().manual_seed(0))
    assert found == pytest.approx(share, abs=0.02)
