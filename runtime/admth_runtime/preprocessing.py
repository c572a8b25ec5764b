"""The one implementation of image preprocessing: file or picture in, uint8 pixels out.

Training, calibration, the parity gate and serving all call :func:`preprocess`, so the pixels are the same to the bit.
The order is: full decode, first frame, EXIF orientation, transparency over a background colour, RGB, then one
antialiased Pillow resize of the crop box. Normalisation is not here: it is inside the deployed graph.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from admth_runtime.decoding import decode
from admth_runtime.errors import ImageError, InputError, ManifestError
from admth_runtime.files import sha256_of_bytes

__all__ = ["IMAGE_SUFFIXES", "MAX_PIXELS", "PreprocessingSpec", "load_image", "preprocess", "resize", "to_rgb"]

MAX_PIXELS = 89_478_485
"""Images with more pixels are refused as possible decompression bombs: Pillow's own warning level, 256 MiB of RGB."""

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
"""File endings taken as images when a folder is listed; a file that is named explicitly may have any ending."""

_INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
}
_FITS = ("crop", "stretch")
_TURNED = range(2, 9)  # EXIF orientations other than upright


@dataclass(frozen=True)
class PreprocessingSpec:
    """What turns any image into the network's uint8 input; part of every manifest.

    Attributes:
        height: rows of the network's input, in pixels.
        width: columns of the network's input, in pixels.
        fit: ``"crop"`` takes the largest centred box of the input's aspect ratio; ``"stretch"`` takes the whole image.
        crop_fraction: with ``"crop"``, the side of that box that is kept, in (0, 1]; 0.875 is ImageNet's 224 of 256.
        interpolation: Pillow's antialiased filter: ``"bilinear"``, ``"bicubic"``, ``"lanczos"`` or ``"box"``.
        background: RGB colour under transparent pixels, 0 to 255 each.
    """

    height: int
    width: int
    fit: str = "crop"
    crop_fraction: float = 1.0
    interpolation: str = "bilinear"
    background: tuple[int, int, int] = (255, 255, 255)

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 4096:
                raise InputError(f"preprocessing {name} {value!r} is not an integer from 1 to 4096")
        if self.fit not in _FITS:
            raise InputError(f"preprocessing fit {self.fit!r} is unknown: use one of {', '.join(_FITS)}")
        if not isinstance(self.interpolation, str) or self.interpolation not in _INTERPOLATIONS:
            known = ", ".join(_INTERPOLATIONS)
            raise InputError(f"preprocessing interpolation {self.interpolation!r} is unknown: use one of {known}")
        fraction = self.crop_fraction
        if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0.0 < fraction <= 1.0:
            raise InputError(f"preprocessing crop_fraction {fraction!r} is not in (0, 1]")
        colour = self.background
        if len(colour) != 3 or any(isinstance(c, bool) or not isinstance(c, int) or not 0 <= c <= 255 for c in colour):
            raise InputError(f"preprocessing background {colour!r} is not three integers from 0 to 255")

    @property
    def shape(self) -> tuple[int, int, int]:
        """The network's input for one image: (height, width, 3)."""
        return (self.height, self.width, 3)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, the inverse of :meth:`from_dict`."""
        return {**asdict(self), "background": list(self.background)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> PreprocessingSpec:
        """Read the JSON form.

        Raises:
            ManifestError: a field is missing, unknown or out of range. Unknown fields are refused because pixels
                that ignore them would be other pixels.
        """
        names = set(cls.__dataclass_fields__)
        if unknown := sorted(set(fields) - names):
            raise ManifestError(f"preprocessing fields {unknown} are unknown to this version: pip install -U admth")
        if missing := sorted({"height", "width"} - set(fields)):
            raise ManifestError(f"preprocessing lacks the fields {missing}: export the model again")
        values = dict(fields)
        if "background" in values:
            background = values["background"]
            values["background"] = tuple(background) if isinstance(background, (list, tuple)) else (background,)
        try:
            return cls(**values)
        except InputError as error:
            raise ManifestError(str(error)) from error

    def digest(self) -> str:
        """Return the SHA-256 of the canonical JSON form, as 64 hexadecimal digits: equal digests, equal pixels."""
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return sha256_of_bytes(canonical.encode())


def preprocess(image: str | Path | Image.Image | NDArray[np.uint8], spec: PreprocessingSpec) -> NDArray[np.uint8]:
    """Turn one image into the network's pixels.

    Args:
        image: a path, a Pillow image, or uint8 ``[H, W, 3]`` in RGB order. An array that already has the input's
            size passes through untouched, whatever ``fit`` and ``crop_fraction`` say.
        spec: the manifest's preprocessing.

    Returns:
        uint8 ``[spec.height, spec.width, 3]``, C-contiguous, RGB.

    Raises:
        ImageError: the image is unreadable, truncated, too large, or of a mode that has no RGB meaning.
        InputError: an array of another dtype, rank or channel count.
    """
    if isinstance(image, np.ndarray):
        array = check_image_array(image)
        if array.shape == spec.shape:
            return np.ascontiguousarray(array)
        picture = Image.fromarray(np.ascontiguousarray(array))
    elif isinstance(image, Image.Image):
        picture = _decoded(image, spec.background)
    elif isinstance(image, (str, Path)):
        picture = load_image(image, spec.background)
    else:
        raise InputError(
            f"an image of type {type(image).__name__} is unknown: pass a path, a PIL image or a uint8 array"
        )
    return resize(picture, spec)


def resize(picture: Image.Image, spec: PreprocessingSpec) -> NDArray[np.uint8]:
    """Crop and resize an upright RGB picture, such as :func:`load_image` returns, to the network's pixels.

    Returns:
        uint8 ``[spec.height, spec.width, 3]``, C-contiguous, RGB.
    """
    if picture.size != (spec.width, spec.height) or spec.crop_fraction < 1.0:
        size = (spec.width, spec.height)
        picture = picture.resize(size, _INTERPOLATIONS[spec.interpolation], box=_crop_box(picture.size, spec))
    return np.asarray(picture, dtype=np.uint8)


def load_image(path: str | Path, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """Decode an image file in full and return it upright, in RGB.

    Raises:
        ImageError: the file is missing, empty, truncated, no image, or more than ``MAX_PIXELS`` pixels large.
    """
    source = Path(path)
    try:
        with Image.open(source) as image:
            return to_rgb(image, background)
    except ImageError as error:
        raise ImageError(f"{source}: {error}") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{source}: {_too_large()}") from error
    except FileNotFoundError as error:
        raise ImageError(f"{source}: no such file") from error
    except IsADirectoryError as error:
        raise ImageError(f"{source}: is a folder, not an image") from error
    except UnidentifiedImageError as error:
        state = (
            "is empty" if source.is_file() and source.stat().st_size == 0 else "is not an image that Pillow can read"
        )
        raise ImageError(f"{source}: {state}") from error
    # Pillow's decoders raise whatever their format's parser met first; every one of them means an unusable file.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ImageError(f"{source}: cannot be decoded ({reason})") from error


def to_rgb(image: Image.Image, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """Decode a Pillow image fully and return its first frame upright, in RGB: the image itself where it is that.

    A JPEG file is decoded by simplejpeg where that is installed and gives Pillow's pixels; see
    :mod:`admth_runtime.decoding`. Sixteen-bit grayscale keeps its high byte, as Pillow itself does for sixteen-bit RGB.
    CMYK and the other colour modes go through Pillow's conversion, without an ICC profile.

    Raises:
        ImageError: more than ``MAX_PIXELS`` pixels, an empty picture, or a mode without an RGB meaning (``F``, and
            ``I`` beyond sixteen bits).
        OSError: the file behind the image is truncated.
    """
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(_too_large(image.size))
    if width == 0 or height == 0:
        raise ImageError(f"the picture is empty ({width}x{height} pixels)")
    if image.tell() != 0:  # n_frames would decode an animation to its end
        image.seek(0)
    upright = _turned(decode(image), image)
    if upright.mode in ("I", "F") or upright.mode.startswith("I;16"):
        upright = _from_high_depth(upright)
    if upright.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in upright.info:
        layer = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", layer.size, (*background, 255)), layer)
    return upright if upright.mode == "RGB" else upright.convert("RGB")


def check_image_array(array: NDArray[Any]) -> NDArray[np.uint8]:
    """Return an array that is uint8 ``[H, W, 3]``.

    Raises:
        InputError: with the mend for the usual mistakes: float pixels, channels first, gray, alpha.
    """
    if array.dtype != np.uint8:
        hint = "scale to 0..255 and cast with .astype(np.uint8)" if array.dtype.kind in "fc" else "cast to np.uint8"
        raise InputError(f"an image array of dtype {array.dtype} is not uint8: {hint}")
    if array.ndim == 2:
        raise InputError(f"an image array of shape {array.shape} is gray: repeat it, np.stack([image] * 3, axis=-1)")
    if array.ndim != 3:
        raise InputError(f"an image array of shape {array.shape} is not [height, width, 3]")
    if 0 in array.shape:
        raise InputError(f"an image array of shape {array.shape} is empty")
    if array.shape[2] != 3:
        if array.shape[0] == 3:
            mend = "is channels first: use image.transpose(1, 2, 0)"
        elif array.shape[2] == 4:
            mend = "has an alpha channel: pass a PIL image, or image[..., :3]"
        else:
            mend = "does not end in 3 channels (RGB)"
        raise InputError(f"an image array of shape {array.shape} {mend}")
    return array


def _decoded(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Decode a Pillow image that may not have read its file yet."""
    try:
        return to_rgb(image, background)
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageError(f"the picture cannot be decoded ({error})") from error


def _turned(decoded: Image.Image, source: Image.Image) -> Image.Image:
    """Turn a decoded picture as its source's EXIF says; a result that was turned does not say so again."""
    # Asked after decoding: a PNG may say it behind its pixels.
    orientation = source.getexif().get(ExifTags.Base.Orientation, 1)
    if orientation not in _TURNED:
        return decoded
    if decoded is not source:  # pixels alone, which say nothing of how they lie
        decoded.getexif()[ExifTags.Base.Orientation] = orientation
    return ImageOps.exif_transpose(decoded)


def _crop_box(size: tuple[int, int], spec: PreprocessingSpec) -> tuple[float, float, float, float]:
    """Return the box of the source, in source pixels, that the resize reads.

    Cropping before the resize, in one Pillow call, keeps a 1x20000 picture from becoming a gigapixel one.
    """
    width, height = size
    if spec.fit == "stretch":
        return (0.0, 0.0, float(width), float(height))
    scale = min(width / spec.width, height / spec.height) * spec.crop_fraction
    box_width, box_height = min(spec.width * scale, width), min(spec.height * scale, height)
    left, top = (width - box_width) / 2, (height - box_height) / 2
    return (left, top, left + box_width, top + box_height)


def _from_high_depth(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ImageError("a floating-point picture (mode F) has no fixed range: convert it to 8 bits first")
    values = np.asarray(image)
    if int(values.min()) < 0 or int(values.max()) > 65535:
        raise ImageError("a 32-bit integer picture has values outside 0..65535: convert it to 8 bits first")
    return Image.fromarray((values.astype(np.uint16) >> 8).astype(np.uint8))


def _too_large(size: tuple[int, int] | None = None) -> str:
    found = f"{size[0]}x{size[1]} pixels" if size else "the picture"
    return f"{found} exceed the limit of {MAX_PIXELS:,} pixels (a possible decompression bomb): shrink the file first"
