"""The corpus's images for the page: opened by what the index calls them, and never outside their place."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Mapping
from html import escape
from io import BytesIO
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, BinaryIO, TypeVar

from PIL import Image, UnidentifiedImageError

from admth_runtime.errors import AdmthError, ImageError, InputError
from admth_runtime.preprocessing import to_rgb

if TYPE_CHECKING:
    from admth_runtime.corpus.parquet_images import ImageColumn

__all__ = ["CorpusFiles", "open_picture", "placeholder", "read_thumbnail", "thumbnail"]

Value = TypeVar("Value")

_MEMBER = "!/"  # between an archive and what is in it: a.tar!/0001.jpg, a.parquet!/17
_ARCHIVES_KEPT = 8
_CRISP = 64  # pictures up to this side are sent without loss


class CorpusFiles:
    """Opens images by the uri that the index has of them; safe to share between threads.

    The index says which images there are. A link could still lead such a name to another file, so an image is opened
    only where its real place is: in the folder that its uri names, or, with ``root``, anywhere below it.

    Args:
        root: the folder that relative uris start from, and that nothing outside is served of. By default they start
            from ``start``.
        start: the folder that relative uris start from without a ``root``; by default the current one.
        column: the column of Parquet files that holds images.

    Raises:
        InputError: ``root`` is no folder.
    """

    def __init__(
        self, root: str | Path | None = None, *, start: str | Path | None = None, column: str = "image"
    ) -> None:
        if root is not None and not Path(root).is_dir():
            raise InputError(f"--root {root} is not a folder: name the one that the images' paths start from")
        self._root = None if root is None else Path(root).resolve()
        self._start = self._root or Path(start or ".").absolute()
        self._column = column
        self._lock = threading.Lock()
        self._tars: OrderedDict[Path, Mapping[str, tuple[int, int]]] = OrderedDict()
        self._columns: OrderedDict[Path, ImageColumn] = OrderedDict()

    def open(self, uri: str) -> BinaryIO:
        """Open an image: a file of its own, or a member of a tar or Parquet file, as ``admth-run encode`` names them.

        Raises:
            ImageError: there is none, it may not be read, or it lies outside its place.
        """
        name, _, member = uri.partition(_MEMBER)
        if not member:
            return self._open_file(uri)
        try:
            if name.lower().endswith(".parquet"):
                return BytesIO(self._parquet_bytes(self._place(name), member, uri))
            return BytesIO(self._tar_bytes(self._place(name), member, uri))
        except ImageError:
            raise
        except AdmthError as error:
            raise ImageError(f"{uri}: {error}") from error

    def _open_file(self, uri: str) -> BinaryIO:
        place = self._place(uri)
        # The resolved name holds no link. If one is put there meanwhile, opening fails; a pipe would not block.
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        try:
            handle = os.open(place, flags)
        except OSError as error:
            raise ImageError(f"{uri}: {_reason(error)}") from error
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise ImageError(f"{uri}: is not a file")
        return os.fdopen(handle, "rb")

    def _place(self, uri: str) -> Path:
        """Return the real path of a file, checked to lie where it should."""
        if "\0" in uri:
            raise ImageError("the index names a file with a null byte")
        named = self._start / uri
        try:
            place = named.resolve(strict=True)
            allowed = self._root or named.parent.resolve(strict=True)
        except OSError as error:
            raise ImageError(f"{uri}: {_reason(error)}") from error
        except RuntimeError as error:  # Python before 3.13 on a loop of links
            raise ImageError(f"{uri}: is a loop of links") from error
        if not place.is_relative_to(allowed):
            mend = "" if self._root else " (--root FOLDER allows links within that folder)"
            raise ImageError(f"{uri}: a link to outside the corpus is not followed{mend}")
        return place

    def _tar_bytes(self, place: Path, member: str, uri: str) -> bytes:
        from admth_runtime.corpus.sources import single_line
        from admth_runtime.corpus.tar_members import tar_images

        with self._lock:
            members = self._tars.get(place)
            if members is None:
                members = {single_line(name): (offset, size) for name, offset, size in tar_images(place)}
                _keep(self._tars, place, members)
        if member not in members:
            raise ImageError(f"{uri}: the archive holds no such image any more")
        offset, size = members[member]
        with place.open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def _parquet_bytes(self, place: Path, row: str, uri: str) -> bytes:
        from admth_runtime.corpus.parquet_images import ImageColumn

        with self._lock:  # a column is read by one thread at a time
            column = self._columns.get(place)
            if column is None:
                column = ImageColumn(place, self._column)
                _keep(self._columns, place, column)
            content = column.read(int(row)) if row.isascii() and row.isdigit() and int(row) < column.rows else None
        if content is None:
            raise ImageError(f"{uri}: the file holds no such image any more")
        return content


def open_picture(file: BinaryIO, name: str, background: tuple[int, int, int]) -> Image.Image:
    """Decode an open image file in full: upright, in RGB, the pixels that :func:`admth_runtime.load_image` gives.

    Raises:
        ImageError: it is no image, truncated or too large; the message starts with ``name``.
    """
    try:
        with Image.open(file) as image:
            return to_rgb(image, background)
    except Exception as error:  # Pillow's decoders raise whatever their format's parser met first
        raise ImageError(f"{name}: {_picture_problem(error)}") from error


def thumbnail(picture: Image.Image, side: int) -> tuple[bytes, str]:
    """Return a small version of an RGB picture, at most ``side`` pixels wide and high, and its media type."""
    small = picture.copy()
    small.thumbnail((side, side))
    buffer = BytesIO()
    if max(small.size) <= _CRISP:
        small.save(buffer, "PNG")
        return buffer.getvalue(), "image/png"
    small.save(buffer, "JPEG", quality=85)
    return buffer.getvalue(), "image/jpeg"


def read_thumbnail(file: BinaryIO, name: str, side: int) -> tuple[bytes, str]:
    """Return a thumbnail of an open image file; a large JPEG is decoded at a fraction of its size.

    Raises:
        ImageError: it is no image, truncated or too large.
    """
    try:
        with Image.open(file) as image:
            image.draft("RGB", (2 * side, 2 * side))
            return thumbnail(to_rgb(image), side)
    except Exception as error:
        raise ImageError(f"{name}: {_picture_problem(error)}") from error


def placeholder(reason: str) -> bytes:
    """Return an SVG picture that says why there is no image; of ``name: reason`` it shows the reason."""
    lines = "".join(
        f'<text x="80" y="{96 + 13 * number}">{escape(line)}</text>'
        for number, line in enumerate(wrap(reason.rpartition(": ")[2], 26, max_lines=4, placeholder="..."))
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" width="160" height="160" viewBox="0 0 160 160">'
        f"<title>{escape(reason)}</title>"
        '<rect width="160" height="160" fill="#8a929a" fill-opacity=".14"/>'
        '<g fill="none" stroke="#8a929a" stroke-width="3"><rect x="56" y="36" width="48" height="38" rx="4"/>'
        '<path d="M52 80 108 30"/></g>'
        f'<g font-family="system-ui, sans-serif" font-size="10.5" fill="#8a929a" text-anchor="middle">{lines}</g></svg>'
    ).encode()


def _keep(kept: OrderedDict[Path, Value], place: Path, value: Value) -> None:
    kept[place] = value
    if len(kept) > _ARCHIVES_KEPT:
        kept.popitem(last=False)


def _picture_problem(error: Exception) -> str:
    if isinstance(error, ImageError):
        return str(error)
    if isinstance(error, Image.DecompressionBombError):
        return "is too large to decode (a possible decompression bomb)"
    if isinstance(error, UnidentifiedImageError):
        return "is not an image that Pillow can read"
    return f"cannot be decoded ({(str(error) or type(error).__name__).splitlines()[0][:200]})"


def _reason(error: OSError) -> str:
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return "the file is gone"
    if error.errno == errno.ELOOP:
        return "is a link, or a loop of links"
    return str(error.strerror or error)
