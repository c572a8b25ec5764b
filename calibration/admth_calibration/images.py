"""Images to calibrate on: files of a folder or a list, those of Fashion-MNIST, or emoji, without labels."""

from __future__ import annotations

import gzip
import hashlib
import json
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from admth_runtime.encoding import list_images
from admth_runtime.errors import DataError, ImageError, InputError
from admth_runtime.preprocessing import PreprocessingSpec, preprocess

__all__ = ["CalibrationImages", "PixelBatches", "open_images"]

_FORMS = "folder:DIR, list:FILE, fashion-mnist:DIR, emoji:DIR"
_EMOJI = ("emoji", "emoji-category", "emoji-subcategory")
_IDX_HEADER = struct.pack(">HBB", 0, 8, 3)  # two zero bytes, uint8, three dimensions
_IDX_LABELS = struct.pack(">HBB", 0, 8, 1)
_MOST_BROKEN = 0.01


@dataclass(frozen=True, eq=False)
class CalibrationImages:
    """Images that are opened one at a time.

    Attributes:
        name: short name without the place on disk.
        sources: a path, or gray pixels uint8 ``[H, W]``, for each image.
        labels: the labels of each image, or None where the data has none.
    """

    name: str
    sources: Sequence[Path] | NDArray[np.uint8]
    labels: Sequence[frozenset[str]] | None = None

    def __len__(self) -> int:
        return len(self.sources)

    def load(self, index: int, spec: PreprocessingSpec) -> NDArray[np.uint8]:
        """Return the network's pixels, uint8 ``[H, W, 3]``.

        Raises:
            ImageError: the image cannot be read.
        """
        source = self.sources[index]
        if isinstance(source, np.ndarray):
            return preprocess(np.repeat(source[:, :, None], 3, axis=2), spec)
        return preprocess(source, spec)


@dataclass(eq=False)
class PixelBatches:
    """Chosen images as batches of pixels; one batch is held at a time.

    Attributes:
        images: where they are from.
        indices: which, in order.
        spec: how they become pixels.
        batch_size: images a batch.
        broken: messages of those that could not be read and were left out.
        done: how many were read.
        read: which were, in order.
    """

    images: CalibrationImages
    indices: NDArray[np.int64]
    spec: PreprocessingSpec
    batch_size: int = 16
    broken: list[str] = field(default_factory=list)
    done: int = 0
    read: list[int] = field(default_factory=list)
    _digest: object = field(default_factory=hashlib.sha256)

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        batch: list[NDArray[np.uint8]] = []
        for index in self.indices:
            try:
                pixels = self.images.load(int(index), self.spec)
            except ImageError as error:
                self.broken.append(str(error))
                if len(self.broken) > max(3, _MOST_BROKEN * len(self.indices)):
                    raise DataError(
                        f"{len(self.broken)} images of {self.images.name} cannot be read, the first: {self.broken[0]}: "
                        "mend or remove them"
                    ) from error
                continue
            self._digest.update(pixels.tobytes())  # type: ignore[attr-defined]
            batch.append(pixels)
            self.read.append(int(index))
            if len(batch) == self.batch_size:
                yield self._batch(batch)
                batch = []
        if batch:
            yield self._batch(batch)

    @property
    def digest(self) -> str:
        """SHA-256 of the pixels read so far, in order, as 64 hexadecimal digits."""
        digest: str = self._digest.hexdigest()  # type: ignore[attr-defined]
        return digest

    def _batch(self, batch: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
        self.done += len(batch)
        return np.stack(batch)


def open_images(spec: str, *, root: Path | None = None, strip_prefix: str | None = None) -> CalibrationImages:
    """Open images by the specification that the other commands take; labels are not read.

    Args:
        spec: ``folder:DIR`` takes every picture below the folder, ``list:FILE`` the first word of each line (or what
            stands before a tab), ``fashion-mnist:DIR`` the training images, ``emoji:DIR`` all emoji but variants in
            other skin tones.
        root: for a list, the folder that relative paths start from; None is the list's own.
        strip_prefix: for a list, a text that is cut from the start of each path.

    Raises:
        InputError: the specification has no known kind or no path.
        DataError: the data is missing or broken.
    """
    kind, colon, place = spec.partition(":")
    if not colon or kind not in ("folder", "list", "fashion-mnist", *_EMOJI) or not place.strip():
        raise InputError(f"data {spec!r} names no images: write kind:path, one of {_FORMS}")
    if kind != "list" and (root is not None or strip_prefix is not None):
        raise InputError(f"--root and --strip-prefix mean nothing for {spec!r}: they rewrite the paths of list: data")
    path = Path(place).expanduser()
    if kind == "folder":
        if not path.is_dir():
            raise DataError(f"{path} {'is a file' if path.exists() else 'does not exist'}: pass a folder of images")
        files = [Path(name) for name in list_images([path])]
        return CalibrationImages(f"folder:{path.resolve().name}", files, _classes(path, files))
    if kind == "list":
        return CalibrationImages(f"list:{path.resolve().stem}", *_listed(path, root, strip_prefix))
    if kind in _EMOJI:
        return CalibrationImages("emoji", _emoji(path))
    images = _training_images(path)
    return CalibrationImages("fashion-mnist", images, _training_labels(path, len(images)))


def _classes(folder: Path, files: list[Path]) -> list[frozenset[str]] | None:
    """Return the class of each file, the folder right below the data's own; None where files stand in it."""
    parts = [file.relative_to(folder).parts for file in files]
    return [frozenset(names[:1]) for names in parts] if all(len(names) > 1 for names in parts) else None


def _listed(path: Path, root: Path | None, strip_prefix: str | None) -> tuple[list[Path], list[frozenset[str]] | None]:
    file = path / "train.txt" if path.is_dir() else path
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read ({getattr(error, 'strerror', None) or error}): pass a list") from error
    base = root if root is not None else file.parent
    found: list[Path] = []
    labels: list[frozenset[str]] = []
    for line in lines:
        words = line.split("\t")[:1] if "\t" in line else line.split()[:1]
        name = words[0].strip() if words else ""
        if strip_prefix and name.startswith(strip_prefix):
            name = name[len(strip_prefix) :].lstrip("/\\")
        if name:
            found.append(base / name)
            rest = line.split("\t", 1)[1].split() if "\t" in line else line.split()[1:]
            labels.append(frozenset(str(place) for place, word in enumerate(rest) if word == "1"))
    if not found:
        raise DataError(f"{file} is empty: write the path of an image on each line")
    return found, labels if any(labels) else None


def _emoji(folder: Path) -> list[Path]:
    """Return the pictures that the unpacked npm package emoji-datasource-google lists, obsolete ones left out."""
    mend = "unpack the npm package emoji-datasource-google and pass its folder"
    root = next((place for place in (folder, folder / "package") if (place / "emoji.json").is_file()), None)
    if root is None:
        raise DataError(f"{folder} holds no emoji.json: {mend}")
    places = [place for place in root.glob("img/*/64") if place.is_dir()]
    if len(places) != 1:
        raise DataError(f"{root} holds {len(places)} folders img/VENDOR/64, not one: {mend}")
    try:
        entries = json.loads((root / "emoji.json").read_text(encoding="utf-8"))
        names = [
            entry["image"]
            for entry in entries
            if "obsoleted_by" not in entry and entry.get(f"has_img_{places[0].parent.name}", True)
        ]
        return [places[0] / Path(name).name for name in names]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{root / 'emoji.json'} is truncated or no list of emoji ({error}): {mend}") from error


def _training_images(folder: Path) -> NDArray[np.uint8]:
    file, content = _idx(folder, "train-images-idx3-ubyte")
    if len(content) < 16 or content[:4] != _IDX_HEADER:
        raise DataError(f"{file} is no IDX file of images: download it again")
    count, height, width = struct.unpack(">3I", content[4:16])
    if len(content) != 16 + count * height * width or not count * height * width:
        raise DataError(f"{file} does not hold the {count:,} images of its header: download it again")
    return np.frombuffer(content, dtype=np.uint8, offset=16).reshape(count, height, width)


def _training_labels(folder: Path, count: int) -> list[frozenset[str]] | None:
    """Return the class of each training image; None where its file is missing, since only mAP needs it."""
    name = "train-labels-idx1-ubyte"
    if not any((folder / file).is_file() for file in (name, f"{name}.gz")):
        return None
    file, content = _idx(folder, name)
    if len(content) != 8 + count or content[:4] != _IDX_LABELS:
        raise DataError(f"{file} does not hold one label for each of the {count:,} images: download it again")
    return [frozenset((str(label),)) for label in content[8:]]


def _idx(folder: Path, name: str) -> tuple[Path, bytes]:
    """Return the file of this name, compressed or not, and its content."""
    file = next((place for place in (folder / name, folder / f"{name}.gz") if place.is_file()), None)
    if file is None:
        raise DataError(
            f"{folder} holds neither {name} nor {name}.gz: download Fashion-MNIST there, or pass its folder"
        )
    try:
        return file, gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file} is truncated or corrupt ({error}): download it again") from error
