"""Which images are looked at: those that give the ranges, and others to compare on.

A network's margins are wider on images that it was trained on, and training images are what most users have at hand:
on them INT8 seems to flip a fifth of the bits that it flips on new ones (99.85 % of the bits equal, on a network
of the demo, against 99.14 % on its test images). So the images to compare on are blended with a tenth of another image
each, which the network has not seen: 99.00 %, a little on the safe side. ``--check-data`` gives real ones instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from admth_calibration.images import CalibrationImages, PixelBatches
from admth_calibration.options import LEAST_IMAGES, CalibrationOptions
from admth_runtime.console import progress
from admth_runtime.errors import DataError
from admth_runtime.preprocessing import PreprocessingSpec

__all__ = ["Sample", "draw"]

_LEAST_LEVELS = 8  # of 256: fewer different pixel values than this are no pictures


@dataclass(frozen=True, eq=False)
class Sample:
    """The images of a calibration.

    Attributes:
        images: where the ranges come from.
        chosen: which of them, in order.
        compared: where the images to compare on come from.
        checked: which of those.
        spec: how images become pixels.
        facts: what the manifest says of them, filled by the first pass: ``data``, ``images``, ``data_sha256``...
    """

    images: CalibrationImages
    chosen: NDArray[np.int64]
    compared: CalibrationImages
    checked: NDArray[np.int64]
    spec: PreprocessingSpec
    facts: dict[str, object]

    def batches(self, description: str) -> Iterator[NDArray[np.uint8]]:
        """Yield the pixels of the calibration's images, uint8 ``[n, H, W, 3]`` a batch, with progress.

        Raises:
            DataError: too many are unreadable, or they show nothing.
        """
        source = PixelBatches(self.images, self.chosen, self.spec)
        levels: set[int] = set()
        yield from _shown(source, description, levels)
        if source.done < LEAST_IMAGES - len(source.broken):
            raise DataError(f"only {source.done} images of {self.images.name} are readable: add images")
        if len(levels) < _LEAST_LEVELS:
            raise DataError(
                f"the {source.done} images of {self.images.name} have {len(levels)} different pixel values in all, so "
                "their ranges say nothing: pass images of the kind that the model will see"
            )
        self.facts.update(
            {
                "data": self.images.name,
                "images": source.done,
                "broken": len(source.broken),
                "data_sha256": source.digest,
            }
        )

    def block(self, count: int) -> NDArray[np.uint8]:
        """Return the pixels of the first images, uint8 ``[count, H, W, 3]``."""
        return np.concatenate(list(PixelBatches(self.images, self.chosen[:count], self.spec)))

    def check_pixels(self) -> NDArray[np.uint8]:
        """Return the pixels of the images to compare on, uint8 ``[n, H, W, 3]``, blended where they are ``images``."""
        return self.check_images()[0]

    def check_images(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Return :meth:`check_pixels` and which of ``compared`` they are, without those that cannot be read.

        Raises:
            DataError: too many are unreadable.
        """
        source = PixelBatches(self.compared, self.checked, self.spec)
        batches = list(_shown(source, "reading", set()))
        if not batches:
            reason = f", the first: {source.broken[0]}" if source.broken else ""
            raise DataError(f"no image of {self.compared.name} to compare on can be read{reason}: pass other images")
        pixels = np.concatenate(batches)
        return _blended(pixels) if self.blended else pixels, np.array(source.read, dtype=np.int64)

    @property
    def blended(self) -> bool:
        """Whether the images to compare on are of the calibration's own data, and so may have been trained on."""
        return self.images is self.compared

    @property
    def seen(self) -> bool:
        """Whether the images to compare on are among those that give the ranges."""
        return self.images is self.compared and bool(np.isin(self.checked, self.chosen).all())


def draw(
    images: CalibrationImages,
    options: CalibrationOptions,
    spec: PreprocessingSpec,
    compared: CalibrationImages | None = None,
) -> Sample:
    """Draw the images of the calibration, and others to compare on; the same ones where there are no others.

    Args:
        images: where the ranges come from.
        options: how many, and the seed.
        spec: how images become pixels.
        compared: other data to compare on; None takes other images of the same.

    Raises:
        DataError: there are fewer than 128 images.
    """
    count = len(images)
    if count < LEAST_IMAGES:
        raise DataError(
            f"{images.name} holds {count} images and a calibration takes {LEAST_IMAGES} or more: add images"
        )
    rng = np.random.default_rng(options.seed)
    order = rng.permutation(count)
    taken = min(options.images, max(LEAST_IMAGES, count * 3 // 4))
    chosen, others = order[:taken], order[taken : taken + options.check_images]
    if compared is not None:
        checked = rng.permutation(len(compared))[: options.check_images]
        return Sample(images, chosen, compared, checked, spec, {})
    return Sample(images, chosen, images, others if len(others) else chosen[: options.check_images], spec, {})


def _blended(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Blend every image with a tenth of the next one."""
    mixed = pixels.astype(np.uint16) * 9 + np.roll(pixels, 1, axis=0)
    return ((mixed + 5) // 10).astype(np.uint8)


def _shown(batches: PixelBatches, description: str, levels: set[int]) -> Iterator[NDArray[np.uint8]]:
    with progress(description, len(batches.indices), unit="images") as advance:
        for pixels in batches:
            if len(levels) < _LEAST_LEVELS:
                levels.update(np.unique(pixels).tolist())
            yield pixels
            advance(len(pixels))
