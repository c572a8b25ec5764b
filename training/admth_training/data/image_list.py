"""Lists of images with multi-hot labels, as HashNet and most hashing code ships them: ``path 0 1 0 ...`` a line.

A folder of such lists, ``train.txt``, ``test.txt`` (the queries) and ``database.txt``, brings its splits with it.
Format: Cao et al., *HashNet: Deep Learning to Hash by Continuation*, ICCV 2017, https://github.com/thuml/HashNet.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from admth_runtime.errors import DataError
from admth_training.data.dataset import ImageDataset, PathSource
from admth_training.splits import Splits

__all__ = ["SPLIT_FILES", "open_image_list"]

SPLIT_FILES = {"query": "test.txt", "train": "train.txt", "database": "database.txt"}
"""The list file of each split in a folder of lists."""

_PROBED = 50


@dataclass(frozen=True)
class _Entry:
    """One line: the path as it is written, its labels as text of 0 and 1, and where it stands."""

    path: str
    labels: str
    place: str


def open_image_list(path: Path, *, root: Path | None = None, strip_prefix: str | None = None) -> ImageDataset:
    """Open one list file, or a folder with ``train.txt``, ``test.txt`` and ``database.txt``.

    An image that several lists of a folder name is one image of the data set.

    Args:
        path: the list file or the folder of lists.
        root: the folder that relative paths start from; without it, the folder of the list.
        strip_prefix: a text that is cut from the start of each path that has it, before ``root`` is put in front.

    Raises:
        DataError: a file is missing or empty, a line is malformed (with its number), or none of the images exists.
    """
    if path.is_dir():
        lists = {split: path / name for split, name in SPLIT_FILES.items()}
        if missing := [file.name for file in lists.values() if not file.is_file()]:
            raise DataError(
                f"{path} lacks {', '.join(missing)}: a folder of lists holds train.txt, test.txt, database.txt"
            )
    else:
        lists = {"all": path}
    entries = {split: _read_list(file) for split, file in lists.items()}
    merged = _merge([entry for part in entries.values() for entry in part])
    keys = _strip([entry.path for entry in merged.values()], strip_prefix, path)
    base = root if root is not None else (path if path.is_dir() else path.parent)
    paths = tuple(base / key for key in keys)
    _check_some_exist(paths, path)
    labels = _label_array([entry.labels for entry in merged.values()])
    return ImageDataset(
        name=f"list:{path.resolve().stem}",
        labels=labels,
        class_names=tuple(f"class {number}" for number in range(labels.shape[1])),
        sources=PathSource(paths, keys),
        official_splits=_splits(entries, merged) if path.is_dir() else None,
    )


def _read_list(file: Path) -> list[_Entry]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"{file}: no such file") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not UTF-8 text ({error.reason} at byte {error.start}): it is no image list"
        ) from error
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error
    lines = text.rstrip().split("\n")
    if not text.strip():
        raise DataError(f"{file} is empty: write one line an image, path 0 1 0 ...")
    entries: list[_Entry] = []
    places: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        entry = _parse_line(line, f"{file}, line {number}")
        if entries and len(entry.labels) != len(entries[0].labels):
            raise DataError(f"{entry.place}: {len(entry.labels)} labels, but line 1 has {len(entries[0].labels)}")
        if entry.path in places:
            raise DataError(f"{entry.place}: repeats the image of line {places[entry.path]}, {entry.path}: remove one")
        places[entry.path] = number
        entries.append(entry)
    return entries


def _parse_line(line: str, place: str) -> _Entry:
    """Split one line; a path with spaces in it ends at a tab."""
    head, tab, tail = line.strip().partition("\t")
    path, *labels = [head.strip(), *tail.split()] if tab else line.split() or [""]
    if not path:
        raise DataError(f"{place}: the line is empty: remove it, or write path 0 1 0 ...")
    if not labels:
        raise DataError(f"{place}: no labels follow the path {path}: write path 0 1 0 ...")
    for label in labels:
        if label not in ("0", "1"):
            raise DataError(
                f"{place}: label {label!r} is neither 0 nor 1: write a 0 or 1 for each class, "
                "and a tab after a path that holds spaces"
            )
    if "1" not in labels:
        raise DataError(f"{place}: all {len(labels)} labels are 0, so no image is similar to this one: remove the line")
    return _Entry(path, "".join(labels), place)


def _merge(entries: list[_Entry]) -> dict[str, _Entry]:
    """Join the lists of a folder by path, and hold them to the same classes."""
    merged: dict[str, _Entry] = {}
    first = entries[0]
    for entry in entries:
        if len(entry.labels) != len(first.labels):
            raise DataError(f"{entry.place}: {len(entry.labels)} labels, but {first.place} has {len(first.labels)}")
        known = merged.setdefault(entry.path, entry)
        if known.labels != entry.labels:
            raise DataError(f"{entry.place}: the labels of {entry.path} differ from those in {known.place}")
    return merged


def _strip(paths: list[str], prefix: str | None, place: Path) -> tuple[str, ...]:
    if not prefix:
        return tuple(paths)
    if not any(path.startswith(prefix) for path in paths):
        raise DataError(f"{place}: no path starts with --strip-prefix {prefix!r}; the first is {paths[0]}")
    # Without its leading slash what is left is relative, so that the root goes in front of it.
    return tuple(path[len(prefix) :].lstrip("/\\") if path.startswith(prefix) else path for path in paths)


def _check_some_exist(paths: tuple[Path, ...], place: Path) -> None:
    """Tell a wrong root at once, instead of after a pass over all images; single missing files are the loader's."""
    probes = paths[:: max(1, len(paths) // _PROBED)]
    if not any(os.path.lexists(path) for path in probes):
        raise DataError(
            f"{place}: none of {len(probes)} probed images exists, such as {probes[0]}: "
            "pass --root DIR, and --strip-prefix TEXT where the list holds another machine's paths"
        )


def _label_array(labels: list[str]) -> NDArray[np.uint8]:
    flat = np.frombuffer("".join(labels).encode("ascii"), dtype=np.uint8)
    return (flat - ord("0")).reshape(len(labels), -1)


def _splits(entries: dict[str, list[_Entry]], merged: dict[str, _Entry]) -> Splits:
    numbers = {path: number for number, path in enumerate(merged)}
    query, train, database = (
        np.asarray([numbers[entry.path] for entry in entries[split]], dtype=np.int64)
        for split in ("query", "train", "database")
    )
    return Splits(query=query, train=train, database=database)
