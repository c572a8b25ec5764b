"""Decoding a picture's pixels: Pillow's, through simplejpeg where that gives the very same ones sooner.

Pillow reads every file's header and decides what the file is. Only the pixels of a plain JPEG may come from simplejpeg,
which decodes in one call without the interpreter's lock. Both use libjpeg-turbo with the accurate integer transform and
smooth upsampling, so their pixels are equal; but each brings a copy of its own, of its own version. So the first JPEG
of a process starts a comparison of small pictures of every kind that is taken, and one pixel that differs turns
simplejpeg off. Whatever is odd is left to Pillow: CMYK, unusual sampling, arithmetic coding, very large pictures, and
every file that simplejpeg so much as warns about.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
import PIL
from PIL import Image

__all__ = ["decode", "jpeg_decoder", "pixels_agree"]

_FORMATS = ("JPEG", "MPO")  # an MPO file begins with an ordinary JPEG, its first picture
_LAYERS = {"L": 1, "RGB": 3}
_LARGEST = 1 << 22  # pixels; beyond it the copy into Pillow's memory costs more than simplejpeg saves

# JPEG's start of frame: baseline, extended and progressive, each with Huffman codes. libjpeg may lack the others.
_FRAMES = frozenset({0xC0, 0xC1, 0xC2})
_NO_FRAMES = frozenset({0xC4, 0xC8, 0xCC})  # markers amid those of frames that start none

_log = logging.getLogger("admth_runtime")


def decode(image: Image.Image) -> Image.Image:
    """Return a picture with all its pixels decoded: the image itself, or a new one of the same mode and pixels.

    Args:
        image: any Pillow image, at the frame that is wanted; its file is still open if it was not decoded yet.

    Raises:
        OSError: the file is truncated or broken; decoders of some formats raise other errors.
    """
    if image.format in _FORMATS and (decoded := _by_simplejpeg(image)) is not None:
        return decoded
    image.load()
    return image


def jpeg_decoder() -> str:
    """Name what decodes JPEG files in this process, with its version."""
    if (module := _simplejpeg()) is not None:
        return f"simplejpeg {module.__version__}"
    from PIL import features

    library = "libjpeg-turbo" if features.check_feature("libjpeg_turbo") else "libjpeg"
    version = features.version_feature("libjpeg_turbo") or features.version_codec("jpg")
    return f"Pillow {PIL.__version__} ({library} {version})"


def pixels_agree(module: Any) -> bool:
    """Whether simplejpeg decodes small pictures of every kind that it is given to the pixels that Pillow gives.

    Args:
        module: ``simplejpeg``, or what stands for it.
    """
    for data in _samples():
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            try:
                pixels = module.decode_jpeg(data, "GRAY" if image.mode == "L" else "RGB", strict=True)
            except (ValueError, TypeError, AttributeError):
                return False
            if not np.array_equal(np.asarray(image), pixels[..., 0] if image.mode == "L" else pixels):
                return False
    return True


def _by_simplejpeg(image: Any) -> Image.Image | None:
    """Decode a JPEG file that Pillow has opened and not decoded; None where that is Pillow's to do."""
    width, height = image.size
    if (
        not image.tile  # decoded already
        or image.fp is None
        or image.tell() != 0
        or getattr(image, "layers", 0) != _LAYERS.get(image.mode)
        or width * height > _LARGEST
        or (module := _simplejpeg()) is None
    ):
        return None
    image.fp.seek(0)
    data = image.fp.read()
    if _frame_marker(data) not in _FRAMES:
        return None
    gray = image.mode == "L"
    try:
        # Four bytes a pixel are how Pillow keeps RGB, so that taking them over is one plain copy.
        pixels = module.decode_jpeg(data, "GRAY" if gray else "RGBX", fastdct=False, fastupsample=False, strict=True)
    except ValueError:  # it warns, or refuses: what becomes of such a file is Pillow's to say
        return None
    if pixels.shape[:2] != (height, width):  # a draft, which is decoded at a smaller scale
        return None
    return Image.frombytes(image.mode, image.size, pixels, "raw", "L" if gray else "RGBX")


@cache
def _simplejpeg() -> Any:
    """Import simplejpeg and compare it with Pillow, once a process; None where it is absent or differs."""
    try:
        module: Any = import_module("simplejpeg")
    except ImportError:
        return None
    try:
        if pixels_agree(module):
            return module
    except OSError:  # a Pillow without JPEG
        return None
    _log.warning(
        "simplejpeg %s decodes other pixels than Pillow %s, so Pillow decodes", module.__version__, PIL.__version__
    )
    return None


def _samples() -> Iterator[bytes]:
    """Yield small JPEGs: steep edges, sides that end within a block, every sampling, baseline and progressive."""
    y, x = np.mgrid[0:27, 0:45].astype(np.uint32)
    planes = [(x * 7 + y * 3) % 256, (x * y * 5) % 256, ((x // 4 + y // 6) % 2) * 230]
    picture = Image.fromarray(np.dstack(planes).astype(np.uint8))
    for subsampling in ("4:4:4", "4:2:2", "4:2:0"):
        for progressive in (False, True):
            yield _encoded(picture, subsampling=subsampling, progressive=progressive)
    yield _encoded(picture.convert("L"))


def _encoded(picture: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85, **options)
    return file.getvalue()


def _frame_marker(data: bytes) -> int | None:
    """Return the second byte of a JPEG's start of frame, or None where none is found before the pixels."""
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # a fill byte
            place += 1
        elif 0xC0 <= marker <= 0xCF and marker not in _NO_FRAMES:
            return marker
        else:
            place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return None
