"""The one way in for image files: safe decoding, then the geometry that training and test share."""

import hashlib
import io
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from benchmark.errors import BenchError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
MAX_PIXELS = 50_000_000
MAX_ASPECT = 20.0
MIN_SIDE = 8
_BLOCK = 4096


def decode(path: Path, side: int, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """The image of a file as uint8 (side, side, 3).

    RGB without alpha, no EXIF rotation (as open_clip), shorter side resized to `side` (bicubic, antialiased), centre crop.

    Raises:
        BenchError: the file is missing, broken, truncated, too large or too thin; the sentence names the file.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as opened:
                width, height = opened.size
                if width * height > max_pixels:
                    raise BenchError(f"{path}: {width}x{height} pixels are more than {max_pixels}; shrink the image or leave it out")
                if min(width, height) < MIN_SIDE or max(width, height) > MAX_ASPECT * min(width, height):
                    raise BenchError(f"{path}: an image of {width}x{height} pixels leaves nothing to crop; leave it out")
                return square(opened.convert("RGB"), side)
    except FileNotFoundError:
        raise BenchError(f"no file at {path}") from None
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError, Image.DecompressionBombWarning, SyntaxError, ValueError) as error:
        raise BenchError(f"{path} is not a whole {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image: {error}") from None


def decode_many(files: Sequence[str], side: int) -> Iterator[NDArray[np.uint8]]:
    """The images of many files in order, decoded by worker processes; a block at a time, so that memory stays bounded."""
    with ProcessPoolExecutor() as workers:
        for begin in range(0, len(files), _BLOCK):
            yield from workers.map(partial(_decode_one, side), files[begin : begin + _BLOCK], chunksize=32)


def _decode_one(side: int, file: str) -> NDArray[np.uint8]:
    return decode(Path(file), side)


def square(image: Image.Image, side: int) -> NDArray[np.uint8]:
    """Resize the shorter side, crop the centre: open_clip's test geometry. An image of that size passes unchanged."""
    width, height = image.size
    if (width, height) != (side, side):
        if width <= height:
            width, height = side, int(side * height / width)
        else:
            width, height = int(side * width / height), side
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = round((width - side) / 2), round((height - side) / 2)
        image = image.crop((left, top, left + side, top + side))
    return np.asarray(image, dtype=np.uint8).copy()


def png_bytes(image: NDArray[np.uint8]) -> bytes:
    """The lossless file of a uint8 (S, S, 3) image."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def pixels_sha256(image: NDArray[np.uint8]) -> str:
    """SHA-256 of the pixels in C order, in hex."""
    return hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()


def psnr(before: NDArray[np.uint8], after: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio in dB; 99 for equal images."""
    error = float(np.mean((before.astype(np.float64) - after.astype(np.float64)) ** 2))
    return 99.0 if error == 0 else float(10 * np.log10(255.0**2 / error))
