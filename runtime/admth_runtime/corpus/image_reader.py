"""Reading the images of a listing: the bytes of each, then pixels; what is wrong with an image, and with a source."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from types import TracebackType

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from admth_runtime.corpus.parquet_images import ImageColumn
from admth_runtime.corpus.plan import CorpusPlan
from admth_runtime.corpus.sources import Listed, Source
from admth_runtime.errors import ImageError, InputError
from admth_runtime.preprocessing import MAX_PIXELS, PreprocessingSpec, resize, to_rgb

__all__ = ["ImageReader", "pixels_of", "unopened"]

_UNOPENED = "cannot be opened"


def unopened(reason: str) -> bool:
    """Tell whether a reason is that a file could not be opened, which may be the fault of its disk or network."""
    return reason.startswith(_UNOPENED)


class ImageReader:
    """Reads the bytes of images, for several threads at once; archives stay open until it is closed.

    Args:
        plan: the corpus: its working folder, its sources, its Parquet column.
    """

    def __init__(self, plan: CorpusPlan) -> None:
        self._base = Path(plan.working_folder)
        self._column = plan.column
        self._folders = [source for source in plan.sources if source.kind == "folder"]
        self._lock = Lock()
        self._tars: dict[str, int] = {}
        self._parquet: tuple[str, ImageColumn] | None = None

    def __enter__(self) -> ImageReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def read(self, image: Listed) -> bytes:
        """Return the bytes of an image.

        Raises:
            ImageError: the image is missing or unreadable; the message is the reason alone.
            InputError: its archive is missing or was changed, or the folder that the image was in has vanished.
        """
        if image.problem is not None:
            raise ImageError(image.problem)
        if image.archive is None:
            return self._read_file(image.uri)
        if image.size is None:
            return self._read_row(image)
        data = os.pread(self._tar(image), image.size, image.offset or 0)
        if len(data) < image.size:
            raise InputError(f"{image.archive} has become shorter: {_START_ANEW}")
        return data

    def close(self) -> None:
        """Close the archives."""
        with self._lock:
            for handle in self._tars.values():
                os.close(handle)
            self._tars.clear()
            if self._parquet is not None:
                self._parquet[1].close()
                self._parquet = None

    def _read_file(self, uri: str) -> bytes:
        try:
            with open(self._base / uri, "rb", buffering=0) as file:  # noqa: PTH123  unbuffered: one read
                return file.readall()
        except IsADirectoryError as error:
            raise ImageError("is a folder, not an image") from error
        except OSError as error:
            _check_folders(self._folders)
            if isinstance(error, FileNotFoundError):
                raise ImageError(f"{_UNOPENED}: no such file") from error
            raise ImageError(f"{_UNOPENED}: {error.strerror or error}") from error

    def _read_row(self, image: Listed) -> bytes:
        assert image.archive is not None
        assert image.offset is not None
        with self._lock:  # Parquet readers are not safe to share
            if self._parquet is None or self._parquet[0] != image.archive:
                path = self._checked(image)
                if self._parquet is not None:
                    self._parquet[1].close()
                self._parquet = (image.archive, ImageColumn(path, self._column))
            data = self._parquet[1].read(image.offset)
        if data is None:
            raise ImageError(f"its row holds no image: the column {self._column!r} is null there")
        return data

    def _tar(self, image: Listed) -> int:
        assert image.archive is not None
        with self._lock:
            if (handle := self._tars.get(image.archive)) is None:
                path = self._checked(image)
                handle = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
                self._tars[image.archive] = handle
            return handle

    def _checked(self, image: Listed) -> Path:
        """Return the path of an archive, the very file that was listed."""
        assert image.archive is not None
        path = self._base / image.archive
        try:
            found = path.stat()
        except OSError as error:
            raise InputError(
                f"{image.archive} cannot be opened ({error.strerror}): put it back and run the same command again"
            ) from error
        if (found.st_size, found.st_mtime_ns) != (image.archive_bytes, image.archive_mtime_ns):
            raise InputError(f"{image.archive} was changed since it was listed: {_START_ANEW}")
        return path


_START_ANEW = "put the old file back, or encode the corpus again with --restart"


def pixels_of(data: bytes, spec: PreprocessingSpec) -> NDArray[np.uint8]:
    """Decode the bytes of an image and turn them into the network's pixels, uint8 ``[height, width, 3]``.

    Raises:
        ImageError: they are empty, no image, truncated, or too large; the message is the reason alone.
    """
    if not data:
        raise ImageError("is empty")
    try:
        with Image.open(io.BytesIO(data)) as image:
            return resize(to_rgb(image, spec.background), spec)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"exceeds the limit of {MAX_PIXELS:,} pixels (a possible decompression bomb)") from error
    except UnidentifiedImageError as error:
        raise ImageError("is not an image that Pillow can read") from error
    # Pillow's decoders raise whatever their format's parser met first; every one of them means an unusable file.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ImageError(f"cannot be decoded ({reason})") from error


def _check_folders(folders: Sequence[Source]) -> None:
    """Check, once a file is missing, that its folder is not: a disk that was unmounted is no unreadable image."""
    for source in folders:
        try:
            with os.scandir(source.place) as entries:
                vanished = next(entries, None) is None
        except OSError:
            vanished = True
        if vanished:
            raise InputError(
                f"the source {source.path} has vanished ({source.place} is missing or empty): bring it back and run "
                "the same command again to go on"
            )
