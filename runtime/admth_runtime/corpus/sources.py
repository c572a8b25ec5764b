"""Where the images of a corpus come from: folders, list files, globs, tar shards and Parquet files."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from admth_runtime.corpus.parquet_images import ImageColumn
from admth_runtime.corpus.tar_members import COMPRESSED_SUFFIXES, tar_images
from admth_runtime.errors import InputError
from admth_runtime.files import sha256_of_file
from admth_runtime.preprocessing import IMAGE_SUFFIXES

__all__ = ["KINDS", "LIST_SUFFIXES", "Listed", "Source", "list_source", "recognise", "single_line"]

LIST_SUFFIXES = (".txt", ".lst", ".list")
KINDS = ("folder", "list", "glob", "tar", "parquet", "image")


class Listed(NamedTuple):
    """One image of a listing.

    Attributes:
        uri: what the image is called in the results.
        archive: the tar or Parquet file that holds it, or None for a file of its own.
        archive_bytes: size of that file, and
        archive_mtime_ns: when it was last changed: offsets into another version of it would be wrong.
        offset: where its bytes begin in a tar, or its row in a Parquet file.
        size: its bytes in a tar.
        problem: why it cannot be encoded, when that is known already.
    """

    uri: str
    archive: str | None = None
    archive_bytes: int | None = None
    archive_mtime_ns: int | None = None
    offset: int | None = None
    size: int | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Source:
    """One source, as it is remembered in ``corpus.json``.

    Attributes:
        kind: one of ``KINDS``.
        path: the path or pattern as it was given.
        place: the same, absolute.
        sha256: of a list file: the digest of what it says.
    """

    kind: str
    path: str
    place: str
    sha256: str | None = None


def recognise(path: str) -> Source:
    """Say what a source is, without listing it.

    A folder and a glob are what their names say; ``.txt``, ``.lst`` and ``.list`` are lists of paths, one a line;
    ``.tar`` and ``.parquet`` hold images; any other file is an image.

    Raises:
        InputError: there is nothing of that name, or it is a compressed tar.
    """
    place = os.path.abspath(path)  # noqa: PTH100  resolve() would follow links, which the next run may find changed
    if Path(path).is_dir():
        return Source("folder", path, place)
    if Path(path).exists():
        kind = _kind_of_file(path)
        return Source(kind, path, place, sha256_of_file(path) if kind == "list" else None)
    if glob.has_magic(path):
        return Source("glob", path, place)
    raise InputError(f"{single_line(path)}: no such file or folder")


def list_source(source: Source, *, column: str, recursive: bool) -> Iterator[Listed]:
    """Yield the images of a source, in an order that depends on names alone, or is the file's own.

    Args:
        source: what to list.
        column: the column of Parquet files that holds images.
        recursive: search folders within folders too. Links to folders are not followed.

    Raises:
        InputError: a folder, list, tar or Parquet file cannot be read.
    """
    if source.kind == "folder":
        yield from map(_image_file, _in_folder(source.path, recursive))
    elif source.kind == "list":
        for path in _in_list(Path(source.path)):
            yield from _list_file(path, column)
    elif source.kind == "glob":
        for path in sorted(glob.iglob(source.path, recursive=True)):  # noqa: PTH207  the pattern may be absolute
            if not Path(path).is_dir():
                yield from _list_file(path, column)
    else:
        yield from _list_file(source.path, column)


def single_line(text: str) -> str:
    """Escape what cannot be printed on one line of UTF-8."""
    text = text.encode(errors="backslashreplace").decode()
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def _kind_of_file(path: str) -> str:
    lower = path.lower()
    if lower.endswith(COMPRESSED_SUFFIXES):
        raise InputError(
            f"{single_line(path)} is a compressed tar, in which no worker can seek: unpack it to a .tar first, "
            "for example with  gunzip"
        )
    if lower.endswith(LIST_SUFFIXES):
        return "list"
    return "tar" if lower.endswith(".tar") else "parquet" if lower.endswith(".parquet") else "image"


def _list_file(path: str, column: str) -> Iterator[Listed]:
    kind = _kind_of_file(path)
    if kind == "tar":
        yield from _in_tar(path)
    elif kind == "parquet":
        yield from _in_parquet(path, column)
    else:
        yield _image_file(path)


def _image_file(path: str) -> Listed:
    try:
        path.encode()
    except UnicodeEncodeError:
        return Listed(single_line(path), problem="its name is not UTF-8: rename the file")
    return Listed(path)


def _in_folder(folder: str, recursive: bool) -> Iterator[str]:
    """Walk a folder: its images by name, then its folders by name. Only one folder's names are held at a time."""
    files, folders = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.name)
                elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES:  # noqa: PTH122  pathlib is 5x slower
                    files.append(entry.name)
    except OSError as error:
        raise InputError(f"{single_line(folder)}: the folder cannot be listed ({error.strerror})") from error
    files.sort()
    for name in files:
        yield os.path.join(folder, name)  # noqa: PTH118
    if recursive:
        for name in sorted(folders):
            yield from _in_folder(os.path.join(folder, name), recursive)  # noqa: PTH118


def _in_list(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
            for line in lines:
                if entry := line.rstrip("\r\n"):
                    yield entry
    except OSError as error:
        raise InputError(f"{path}: the list cannot be read ({error.strerror})") from error


def _in_tar(path: str) -> Iterator[Listed]:
    name, state = single_line(path), _state(path)
    for member, offset, size in tar_images(Path(path)):
        yield Listed(f"{name}!/{single_line(member)}", path, *state, offset, size)


def _in_parquet(path: str, column: str) -> Iterator[Listed]:
    name, state = single_line(path), _state(path)
    images = ImageColumn(Path(path), column)
    rows = images.rows
    images.close()
    for row in range(rows):
        yield Listed(f"{name}!/{row}", path, *state, row)


def _state(path: str) -> tuple[int, int]:
    try:
        found = Path(path).stat()
    except OSError as error:
        raise InputError(f"{single_line(path)}: cannot be read ({error.strerror})") from error
    return found.st_size, found.st_mtime_ns
