"""The one form that every data set takes: labelled images that are loaded one at a time, by number."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from admth_runtime.errors import DataError, InputError
from admth_runtime.preprocessing import PreprocessingSpec, preprocess

if TYPE_CHECKING:
    from admth_training.splits import Splits

__all__ = ["ArraySource", "ImageDataset", "ImageSource", "PathSource", "one_hot"]


class ImageSource(Protocol):
    """Where the images of a data set are."""

    def __len__(self) -> int: ...

    def get(self, index: int) -> Path | NDArray[np.uint8]:
        """Return image ``index``: its path, or its pixels as uint8 ``[H, W, 3]``."""
        ...

    def path(self, index: int) -> Path | None:
        """Return the file of image ``index``, or None where it is one of many in a file."""
        ...

    def describe(self, index: int) -> str:
        """Return what a message calls image ``index``."""
        ...

    def key(self, index: int) -> str:
        """Return the name of image ``index`` inside the data set, the same wherever the data set lies."""
        ...

    def content(self, index: int) -> bytes:
        """Return the stored bytes of image ``index``; equal bytes mean equal images.

        Raises:
            OSError: the file cannot be read.
        """
        ...


@dataclass(frozen=True)
class PathSource:
    """Images in files of their own.

    Attributes:
        paths: where each file is.
        keys: what the data set calls each file, relative and with forward slashes.
    """

    paths: tuple[Path, ...]
    keys: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.paths) != len(self.keys):
            raise InputError(f"{len(self.paths)} paths have {len(self.keys)} keys: pass one key a path")

    def __len__(self) -> int:
        return len(self.paths)

    def get(self, index: int) -> Path:
        """See :meth:`ImageSource.get`."""
        return self.paths[index]

    def path(self, index: int) -> Path:
        """See :meth:`ImageSource.path`."""
        return self.paths[index]

    def describe(self, index: int) -> str:
        """See :meth:`ImageSource.describe`."""
        return str(self.paths[index])

    def key(self, index: int) -> str:
        """See :meth:`ImageSource.key`."""
        return self.keys[index]

    def content(self, index: int) -> bytes:
        """See :meth:`ImageSource.content`."""
        return self.paths[index].read_bytes()


@dataclass(frozen=True, eq=False)
class ArraySource:
    """Images in memory, such as those of an IDX file.

    Attributes:
        images: uint8 ``[n, H, W]``, gray, or ``[n, H, W, 3]``, RGB.
        parts: name and size of each file that the images came from, in order.
    """

    images: NDArray[np.uint8]
    parts: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        shape = self.images.shape
        if self.images.dtype != np.uint8 or len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] != 3):
            raise InputError(f"images of dtype {self.images.dtype} and shape {shape} are not uint8 [n, H, W] or RGB")
        if sum(size for _, size in self.parts) != len(self.images):
            raise InputError(f"the parts {self.parts} do not add up to {len(self.images)} images")

    def __len__(self) -> int:
        return len(self.images)

    def get(self, index: int) -> NDArray[np.uint8]:
        """See :meth:`ImageSource.get`; gray becomes three equal channels."""
        image = self.images[index]
        return image if image.ndim == 3 else np.repeat(image[:, :, None], 3, axis=2)

    def path(self, index: int) -> None:
        """See :meth:`ImageSource.path`."""

    def describe(self, index: int) -> str:
        """See :meth:`ImageSource.describe`."""
        within = int(index)
        for name, size in self.parts:
            if within < size:
                return f"{name}[{within}]"
            within -= size
        raise InputError(f"image {index} is beyond the {len(self)} images of the data set")

    def key(self, index: int) -> str:
        """See :meth:`ImageSource.key`."""
        return self.describe(index)

    def content(self, index: int) -> bytes:
        """See :meth:`ImageSource.content`."""
        return bytes(self.images[index].tobytes())


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """Labelled images.

    Attributes:
        name: short name without the place on disk, such as ``"fashion-mnist"``.
        labels: uint8 ``[n, classes]``, multi-hot; every image has at least one class.
        class_names: one name a column of ``labels``.
        sources: where the images are.
        official_splits: the splits that come with the data set, or None where they are to be drawn.
        strata: int64 ``[n]``, a group number an image; drawn splits keep the groups in proportion. None leaves the
            draw to the labels.
    """

    name: str
    labels: NDArray[np.uint8]
    class_names: tuple[str, ...]
    sources: ImageSource
    official_splits: Splits | None = None
    strata: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        if self.labels.ndim != 2 or self.labels.dtype != np.uint8 or self.labels.size == 0:
            raise DataError(
                f"labels of dtype {self.labels.dtype} and shape {self.labels.shape} are not uint8 [n, classes]"
            )
        if self.labels.max() > 1 or not bool(self.labels.any(axis=1).all()):
            raise DataError(f"labels of {self.name} are not multi-hot: use 0 and 1, with at least one 1 an image")
        if self.labels.shape[1] != len(self.class_names):
            raise DataError(f"{len(self.class_names)} class names were given for {self.labels.shape[1]} label columns")
        if len(self.sources) != len(self.labels):
            raise DataError(f"{self.name} has {len(self.sources)} images and labels for {len(self.labels)}")
        if self.official_splits is not None:
            self.official_splits.check(len(self.labels))
        if self.strata is not None and (self.strata.shape != (len(self.labels),) or self.strata.dtype != np.int64):
            raise DataError(
                f"strata of dtype {self.strata.dtype} and shape {self.strata.shape} are not int64 [{len(self.labels)}]"
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def single_label(self) -> bool:
        """Whether every image has exactly one class."""
        return bool((self.labels.sum(axis=1, dtype=np.int64) == 1).all())

    def load(self, index: int, spec: PreprocessingSpec) -> NDArray[np.uint8]:
        """Return the network's pixels of image ``index``.

        Returns:
            uint8 ``[spec.height, spec.width, 3]``, RGB.

        Raises:
            ImageError: the image cannot be read.
        """
        return preprocess(self.sources.get(index), spec)

    def describe(self, index: int) -> str:
        """Return what a message calls image ``index``: its path, or for example ``train-images[17]``."""
        return self.sources.describe(index)

    def listing_digest(self) -> str:
        """Return the SHA-256 of the listing, its names and labels in order, as 64 hexadecimal digits.

        It does not depend on where the data set lies, and equal digests mean that indices name the same images.
        """
        digest = hashlib.sha256()
        for name in self.class_names:
            digest.update(name.encode() + b"\0")
        for index in range(len(self)):
            digest.update(self.sources.key(index).encode() + b"\0")
        digest.update(np.packbits(self.labels, axis=1).tobytes())
        return digest.hexdigest()


def one_hot(classes: NDArray[np.integer], count: int) -> NDArray[np.uint8]:
    """Return uint8 ``[n, count]`` with a single 1 a row, from class numbers ``[n]``."""
    labels = np.zeros((len(classes), count), dtype=np.uint8)
    labels[np.arange(len(classes)), classes] = 1
    return labels
