"""Fashion-MNIST: 28x28 gray pictures of ten kinds of clothing, or any cut of it in the same four IDX files.

Xiao, Rasul and Vollgraf, *Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms*, 2017,
https://github.com/zalandoresearch/fashion-mnist (MIT licence).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from admth_runtime.errors import DataError
from admth_training.data.dataset import ArraySource, ImageDataset, one_hot
from admth_training.data.idx import read_idx
from admth_training.splits import Splits

__all__ = ["CLASS_NAMES", "IMAGES_FILE", "LABELS_FILE", "open_fashion_mnist", "read_part"]

CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
IMAGES_FILE = "{part}-images-idx3-ubyte"
LABELS_FILE = "{part}-labels-idx1-ubyte"


def open_fashion_mnist(folder: Path) -> ImageDataset:
    """Open ``train-*`` and ``t10k-*`` IDX files, each plain or with ``.gz``.

    The official splits are those of retrieval papers: the test images are the queries, and the training images are
    both the training set and the database.

    Raises:
        DataError: a file is missing, broken, or disagrees with another.
    """
    if not folder.is_dir():
        state = "is a file" if folder.exists() else "does not exist"
        raise DataError(f"{folder} {state}: pass the folder that holds {IMAGES_FILE.format(part='train')}.gz")
    train_images, train_labels = read_part(folder, "train")
    test_images, test_labels = read_part(folder, "t10k")
    if train_images.shape[1:] != test_images.shape[1:]:
        raise DataError(
            f"{folder}: training images of {train_images.shape[1:]} and test images of {test_images.shape[1:]} pixels "
            "differ: the files come from different data sets"
        )
    train = np.arange(len(train_images), dtype=np.int64)
    query = np.arange(len(test_images), dtype=np.int64) + len(train_images)
    return ImageDataset(
        name="fashion-mnist",
        labels=one_hot(np.concatenate([train_labels, test_labels]), len(CLASS_NAMES)),
        class_names=CLASS_NAMES,
        sources=ArraySource(
            np.concatenate([train_images, test_images]),
            (("train-images", len(train_images)), ("t10k-images", len(test_images))),
        ),
        official_splits=Splits(query=query, train=train, database=train),
    )


def read_part(folder: Path, part: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Read the images uint8 ``[n, H, W]`` and the class numbers uint8 ``[n]`` of ``"train"`` or ``"t10k"``.

    Raises:
        DataError: a file is missing or broken, or the two disagree.
    """
    images_path = _find(folder, IMAGES_FILE.format(part=part))
    labels_path = _find(folder, LABELS_FILE.format(part=part))
    images, labels = read_idx(images_path, dimensions=3), read_idx(labels_path, dimensions=1)
    if len(images) != len(labels):
        raise DataError(f"{images_path} has {len(images):,} images and {labels_path.name} has {len(labels):,} labels")
    if images.size == 0:
        raise DataError(f"{images_path} holds no images (its header says {list(images.shape)})")
    if labels.max() >= len(CLASS_NAMES):
        first = int(np.argmax(labels >= len(CLASS_NAMES)))
        raise DataError(f"{labels_path}: label {first} is {labels[first]}, beyond the classes 0 to 9 of Fashion-MNIST")
    return images, labels


def _find(folder: Path, name: str) -> Path:
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    raise DataError(f"{folder} holds neither {name} nor {name}.gz: download Fashion-MNIST there, or pass its folder")
