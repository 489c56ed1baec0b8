"""Image files: safe decoding, and the geometry that training and test share."""

import contextlib
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import open_clip
import pytest
from PIL import Image

from benchmark.data.image import decode, decode_many, png_bytes, psnr, square
from benchmark.errors import BenchError

RNG = np.random.default_rng(0)


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 255, (height, width, 3), dtype=np.uint8))


def jpeg() -> bytes:
    buffer = io.BytesIO()
    picture(64, 64).save(buffer, format="JPEG")
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b""))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (jpeg()[:-400], "is not a whole JPEG, PNG, WEBP or GIF image"),
        (b"", "is not a whole JPEG, PNG, WEBP or GIF image"),
        (b"<html>not found</html>", "is not a whole JPEG, PNG, WEBP or GIF image"),
        (png_header(9_000, 9_000), "9000x9000 pixels are more than 50000000"),
        (png_header(20_000, 20_000), "is not a whole JPEG, PNG, WEBP or GIF image: Image size (400000000 pixels) exceeds limit"),
        (png_bytes(np.zeros((8, 800, 3), dtype=np.uint8)), "an image of 800x8 pixels leaves nothing to crop"),
        (png_bytes(np.zeros((1, 1, 3), dtype=np.uint8)), "an image of 1x1 pixels leaves nothing to crop"),
    ],
)
def test_a_bad_image_is_named_and_refused(tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / "bad.jpg"
    path.write_bytes(content)
    with pytest.raises(BenchError) as caught:
        decode(path, 32)
    assert sentence in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="no file at"):
        decode(tmp_path / "none.png", 32)


def test_damaged_bytes_never_give_anything_but_an_image_or_a_refusal(tmp_path: Path) -> None:
    path = tmp_path / "fuzzed"
    gif = io.BytesIO()
    picture(32, 32).save(gif, format="GIF")
    webp = io.BytesIO()
    picture(32, 32).save(webp, format="WEBP")
    for content in (jpeg(), png_bytes(np.asarray(picture(32, 32))), gif.getvalue(), webp.getvalue()):
        for _ in range(60):
            damaged = bytearray(content)
            for place in RNG.integers(0, min(len(damaged), 200), 4):
                damaged[place] = RNG.integers(256)
            path.write_bytes(damaged)
            with contextlib.suppress(BenchError):
                assert decode(path, 16).shape == (16, 16, 3)


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "P", "CMYK", "I;16"])
def test_every_colour_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "image"
    if mode == "I;16":
        Image.fromarray(np.full((40, 40), 300, dtype=np.uint16)).save(path, format="PNG")
    else:
        picture(40, 40).convert(mode).save(path, format="JPEG" if mode == "CMYK" else "PNG")
    image = decode(path, 32)
    assert image.shape == (32, 32, 3)
    assert image.dtype == np.uint8


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (640, 480), (100, 37), (20, 24)])
def test_the_geometry_is_that_of_open_clip(size: tuple[int, int]) -> None:
    image = picture(*size)
    theirs = open_clip.image_transform(32, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))(image)
    np.testing.assert_array_equal(square(image, 32), (theirs.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))


def test_a_stored_image_decodes_to_the_exact_array(tmp_path: Path) -> None:
    image = np.asarray(picture(32, 32))
    (tmp_path / "x.png").write_bytes(png_bytes(image))
    np.testing.assert_array_equal(decode(tmp_path / "x.png", 32), image)


def test_many_files_come_back_in_order(tmp_path: Path) -> None:
    for value in range(5):
        (tmp_path / f"{value}.png").write_bytes(png_bytes(np.full((16, 16, 3), value, dtype=np.uint8)))
    assert [int(image[0, 0, 0]) for image in decode_many([str(tmp_path / f"{value}.png") for value in range(5)], 16)] == [0, 1, 2, 3, 4]


def test_psnr_of_one_grey_level_is_48_decibels() -> None:
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    assert psnr(image, image) == 99.0
    assert psnr(image, image + np.uint8(1)) == pytest.approx(48.13, abs=0.01)
