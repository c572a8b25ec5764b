"""The kinds of data set, and how ``kind:path`` on a command line becomes an open one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from admth_runtime.errors import InputError
from admth_training.data.dataset import ImageDataset
from admth_training.data.emoji import LABELLINGS, Labelling, open_emoji
from admth_training.data.fashion_mnist import open_fashion_mnist
from admth_training.data.folder import open_folder
from admth_training.data.image_list import open_image_list

__all__ = ["DATASETS", "DatasetKind", "SourceOptions", "open_dataset"]


@dataclass(frozen=True)
class SourceOptions:
    """What the command line says about paths inside a list.

    Attributes:
        root: the folder that relative paths start from.
        strip_prefix: a text that is cut from the start of each path.
    """

    root: Path | None = None
    strip_prefix: str | None = None


@dataclass(frozen=True)
class DatasetKind:
    """One kind of data set.

    Attributes:
        form: how its specification is written, for messages and help.
        takes_paths: whether ``root`` and ``strip_prefix`` mean something for it.
        open: opens it.
    """

    form: str
    takes_paths: bool
    open: Callable[[Path, SourceOptions], ImageDataset]


def _emoji(labelling: Labelling) -> DatasetKind:
    return DatasetKind(f"{LABELLINGS[labelling]}:DIR", False, lambda path, _: open_emoji(path, labelling))


DATASETS: dict[str, DatasetKind] = {
    "fashion-mnist": DatasetKind("fashion-mnist:DIR", False, lambda path, _: open_fashion_mnist(path)),
    "folder": DatasetKind("folder:DIR", False, lambda path, _: open_folder(path)),
    "list": DatasetKind(
        "list:FILE or list:DIR",
        True,
        lambda path, options: open_image_list(path, root=options.root, strip_prefix=options.strip_prefix),
    ),
    **{kind: _emoji(labelling) for labelling, kind in LABELLINGS.items()},
}
"""Every kind by the name that stands before the colon; a new kind is one more entry."""


def open_dataset(spec: str, *, root: str | Path | None = None, strip_prefix: str | None = None) -> ImageDataset:
    """Open a data set by its specification.

    Args:
        spec: ``kind:path``, such as ``fashion-mnist:data/fashion``, ``folder:pictures`` or ``list:train.txt``.
        root: for lists, the folder that relative paths start from; without it, the folder of the list.
        strip_prefix: for lists, a text to cut from the start of each path.

    Raises:
        InputError: the specification has no known kind or no path, or the arguments do not fit the kind.
        DataError: the data set is missing or broken.
    """
    name, colon, place = spec.partition(":")
    forms = ", ".join(kind.form for kind in DATASETS.values())
    if not colon:
        raise InputError(f"data {spec!r} names no kind: write kind:path, one of {forms}")
    if name not in DATASETS:
        raise InputError(f"data kind {name!r} is unknown: use one of {forms}")
    kind = DATASETS[name]
    if not place.strip():
        raise InputError(f"data {spec!r} names no path: write {kind.form}")
    if not kind.takes_paths and (root is not None or strip_prefix is not None):
        raise InputError(f"--root and --strip-prefix mean nothing for {spec!r}: they rewrite the paths of list: data")
    if root is not None and not Path(root).expanduser().is_dir():
        raise InputError(f"--root {str(root)!r} is not a folder")
    options = SourceOptions(Path(root).expanduser() if root is not None else None, strip_prefix)
    return kind.open(Path(place).expanduser(), options)
