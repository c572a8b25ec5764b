"""A folder of pictures with one folder a class: ``DIR/cat/1.jpg``, ``DIR/dog/2.png``."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from admth_runtime.errors import DataError
from admth_runtime.preprocessing import IMAGE_SUFFIXES
from admth_training.data.dataset import ImageDataset, PathSource, one_hot

__all__ = ["open_folder"]

# A folder of nothing but these is a ready-made split; as classes they would silently train a useless network.
_SPLIT_NAMES = frozenset({"train", "training", "test", "testing", "val", "valid", "validation", "query", "database"})


def open_folder(folder: Path) -> ImageDataset:
    """Open a folder whose folders are the classes, in sorted order; pictures may lie deeper inside a class.

    Names that start with a dot are passed over.

    Raises:
        DataError: the folder is missing, has fewer than two classes, or a class has no pictures.
    """
    if not folder.is_dir():
        state = "is a file" if folder.exists() else "does not exist"
        raise DataError(f"{folder} {state}: pass a folder with one folder of images a class")
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    names = tuple(entry.name for entry in classes)
    if len(classes) < 2:
        found = f"only the class {names[0]}" if names else "no folders of classes"
        raise DataError(f"{folder} holds {found}: put the images of each class into a folder of its own, two or more")
    if {name.lower() for name in names} <= _SPLIT_NAMES:
        raise DataError(
            f"{folder} holds the splits {', '.join(names)}, not classes: pass folder:{classes[0]}, "
            "or write list files and pass list:DIR"
        )
    paths: list[Path] = []
    numbers: list[int] = []
    for number, entry in enumerate(classes):
        pictures = _pictures(entry)
        if not pictures:
            raise DataError(f"{entry} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}): add some, or remove it")
        paths.extend(pictures)
        numbers.extend([number] * len(pictures))
    return ImageDataset(
        name=f"folder:{folder.resolve().name}",
        labels=one_hot(np.asarray(numbers, dtype=np.int64), len(classes)),
        class_names=names,
        sources=PathSource(tuple(paths), tuple(path.relative_to(folder).as_posix() for path in paths)),
    )


def _pictures(folder: Path) -> list[Path]:
    found: list[Path] = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found.extend(
            Path(place, name)
            for name in files
            if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES
        )
    return sorted(found, key=lambda path: path.as_posix())
