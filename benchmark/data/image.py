"""The one way in for image files: safe decoding, then the geometry that training and test share."""

import hashlib
import io
import os
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from benchmark.errors import BenchError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
_KNOWN = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
MAX_PIXELS = 50_000_000
MAX_ASPECT = 20.0
MIN_SIDE = 8
_BLOCK = 4096
# What Pillow raises on damaged files, besides its own errors.
_BROKEN = (OSError, EOFError, SyntaxError, ValueError, LookupError, ArithmeticError, struct.error)
_SHARD_REF = re.compile(r"tar:(\d+)\+(\d+):(/.*)", re.DOTALL)


def decode(path: Path, side: int, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """The image of a file as uint8 (side, side, 3).

    RGB without alpha, no EXIF rotation (as open_clip), shorter side resized to `side` (bicubic, antialiased), centre crop.

    Raises:
        BenchError: the file is missing, broken, truncated, too large or too thin; the sentence names the file.
    """
    return _decoded(path, str(path), side, max_pixels)


def decode_bytes(raw: bytes, name: str, side: int, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """The image in the bytes of a file, as `decode`; messages call it `name`."""
    return _decoded(io.BytesIO(raw), name, side, max_pixels)


def decode_whole(path: Path, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """The image of a file as uint8 (h, w, 3), all of it in its own size.

    Raises:
        BenchError: as for `decode`.
    """
    return _opened(path, str(path), max_pixels, lambda image: np.asarray(image, dtype=np.uint8).copy())


def shard_ref(shard: Path, offset: int, size: int) -> str:
    """What names an image within a tar: `tar:<offset>+<size>:<absolute path>`. Paths of image files never begin so, being absolute."""
    return f"tar:{offset}+{size}:{shard.absolute()}"


def read_ref(ref: str) -> bytes:
    """The bytes of the image file that a reference names: a path, or a place in a tar.

    Raises:
        BenchError: it is not there, or the tar ends before.
    """
    path, offset, size = _place(ref)
    try:
        with open(path, "rb", buffering=0) as file:
            raw = file.read() if size is None else os.pread(file.fileno(), size, offset)
    except FileNotFoundError:
        raise BenchError(f"no file at {path}") from None
    except OSError as error:
        raise BenchError(f"cannot read {path}: {error.strerror}") from None
    if size is not None and len(raw) != size:
        raise BenchError(f"{path} has been cut off since it was listed; there is no image at byte {offset}")
    return raw


def ref_size(ref: str) -> int:
    """Bytes of the image file that a reference names; 0 if it is not there."""
    path, _, size = _place(ref)
    try:
        return os.stat(path).st_size if size is None else size
    except OSError:
        return 0


def decode_ref(ref: str, side: int) -> NDArray[np.uint8]:
    """The image that a reference names (a path, or a place in a tar), as `decode`."""
    path, offset, size = _place(ref)
    return decode(Path(path), side) if size is None else decode_bytes(read_ref(ref), f"{path} at byte {offset}", side)


def _place(ref: str) -> tuple[str, int, int | None]:
    """Path, offset and size; without a size it is a whole file."""
    found = _SHARD_REF.fullmatch(ref)
    return (found[3], int(found[1]), int(found[2])) if found else (ref, 0, None)


def _decoded(file: Path | io.BytesIO, name: str, side: int, max_pixels: int) -> NDArray[np.uint8]:
    return _opened(file, name, max_pixels, lambda image: square(image, side))


def _opened(file: Path | io.BytesIO, name: str, max_pixels: int, finish: Callable[[Image.Image], NDArray[np.uint8]]) -> NDArray[np.uint8]:
    try:
        # Pillow warns from 89 million pixels and refuses twice that; its filters of warnings are not safe to change in threads.
        with Image.open(file, formats=FORMATS) as opened:
            width, height = opened.size
            if width * height > max_pixels:
                raise BenchError(f"{name}: {width}x{height} pixels are more than {max_pixels}; shrink the image or leave it out")
            if min(width, height) < MIN_SIDE or max(width, height) > MAX_ASPECT * min(width, height):
                raise BenchError(f"{name}: an image of {width}x{height} pixels leaves nothing to crop; leave it out")
            return finish(opened.convert("RGB"))
    except FileNotFoundError:
        raise BenchError(f"no file at {name}") from None
    except UnidentifiedImageError:
        raise BenchError(f"{name} is not a whole {_KNOWN} image: its content is something else") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, *_BROKEN) as error:
        raise BenchError(f"{name} is not a whole {_KNOWN} image: {error}") from None


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
