"""Where frames come from: files, arrays, anything that can be iterated; cameras and folders have their own modules."""

from __future__ import annotations

import glob
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from admth_runtime.encoding import list_images
from admth_runtime.errors import InputError
from admth_runtime.pipeline.frames import Frame
from admth_runtime.runtime import ImageLike

__all__ = ["ArraySource", "FileSource", "Source", "as_source"]


@runtime_checkable
class Source(Protocol):
    """Gives frames, one after the other, to one pipeline."""

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        """Yield frames until there are no more, or until ``stop`` is set.

        It runs in a thread of its own. Wait with ``stop.wait(seconds)``, never with ``time.sleep``, so that a pipeline
        stops at once. What it raises ends the pipeline, after the frames before it have been delivered; a frame that
        cannot be had is yielded with its ``error`` instead.
        """


class FileSource:
    """Image files, in order, each once.

    Args:
        paths: files, folders, and patterns such as ``"pictures/**/*.jpg"``.
        recursive: search folders within folders too.

    Raises:
        InputError: a path does not exist, a pattern matches nothing, or there is no image.
    """

    def __init__(
        self, paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], *, recursive: bool = True
    ) -> None:
        given = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
        self._paths = list_images([found for path in given for found in _expanded(path)], recursive=recursive)

    def __len__(self) -> int:
        return len(self._paths)

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        """Yield the files' names; they are read in the decoding threads."""
        for path in self._paths:
            yield Frame(path, path, time.time())


class ArraySource:
    """Pictures of the program's own: any iterable of them, read as the pipeline needs them.

    Args:
        images: paths, Pillow images, uint8 ``[H, W, 3]`` arrays, or uint8 ``[n, H, W, 3]``. Frames of one's own
            making pass as they are. An array is read some time after it was yielded: do not write over it.
        name: what uris begin with: ``"array:0"``, ``"array:1"``, and so on. A path is its own uri.
    """

    def __init__(self, images: Iterable[ImageLike | Frame] | np.ndarray[Any, Any], *, name: str = "array") -> None:
        if isinstance(images, (bytes, bytearray, memoryview)) or not isinstance(images, Iterable):
            raise InputError(f"images of type {type(images).__name__} are not an iterable of pictures")
        if isinstance(images, np.ndarray) and images.ndim != 4:
            raise InputError(f"an array of shape {images.shape} is not [n, height, width, 3]: pass [image] for one")
        self._images, self._name = images, name

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        """Yield the pictures in order."""
        for number, image in enumerate(self._images):
            if isinstance(image, Frame):
                yield image
            else:
                yield Frame(image, uri_of(image) or f"{self._name}:{number}", time.time())


def as_source(source: Any) -> Source:
    """Return the source that an argument means: one already, a path or paths, an array, or an iterable.

    Raises:
        InputError: it means none.
    """
    if isinstance(source, Source):
        return source
    if isinstance(source, (str, os.PathLike)):
        return FileSource(source)
    if isinstance(source, (list, tuple)) and source and all(isinstance(path, (str, os.PathLike)) for path in source):
        return FileSource(source)
    if isinstance(source, Image.Image):
        return ArraySource([source])
    if isinstance(source, Iterable):
        return ArraySource(source)
    raise InputError(
        f"a source of type {type(source).__name__} is unknown: pass a path, paths, an iterable of images, or a source "
        "of admth_runtime.pipeline"
    )


def uri_of(image: Any) -> str | None:
    """Return the uri of a picture that has one: a path."""
    return os.fspath(image) if isinstance(image, (str, os.PathLike)) else None


def _expanded(path: str | os.PathLike[str]) -> list[str]:
    """Return a path as it is when it exists, and otherwise what it matches as a pattern, in sorted order."""
    text = os.fspath(path)
    if Path(text).exists() or not glob.has_magic(text):
        return [text]
    matches = sorted(glob.glob(text, recursive=True))  # noqa: PTH207 - the pattern may be absolute
    if not matches:
        raise InputError(f"{text}: no file matches this pattern")
    return matches
