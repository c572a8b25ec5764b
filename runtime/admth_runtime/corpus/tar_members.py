"""The images in tar files of the WebDataset layout: where each member's bytes are, so that workers seek to them."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from admth_runtime.errors import InputError
from admth_runtime.preprocessing import IMAGE_SUFFIXES

__all__ = ["COMPRESSED_SUFFIXES", "tar_images"]

COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")

_BLOCK = tarfile.BLOCKSIZE


def tar_images(path: Path) -> Iterator[tuple[str, int, int]]:
    """Yield name, offset and size of every image in an uncompressed tar, in the file's order.

    Members that are no regular file, or have no image's ending, such as WebDataset's ``key.json``, are passed over.

    Raises:
        InputError: the file is missing, no tar, damaged, truncated or compressed.
    """
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined, unused-ignore]  # else it keeps every one
                if member.isreg() and not member.issparse() and _is_image(member.name):
                    yield member.name, member.offset_data, member.size
            _check_end(path, archive.offset)
    except tarfile.TarError as error:
        raise _damaged(path, error) from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error


def _is_image(name: str) -> bool:
    inner = PurePosixPath(name)
    # macOS's tar puts a "._a.jpg" of attributes beside every "a.jpg".
    return inner.suffix.lower() in IMAGE_SUFFIXES and not inner.name.startswith("._")


def _check_end(path: Path, offset: int) -> None:
    """Check that the archive ends with its end mark: tarfile takes any damaged header for the end."""
    with path.open("rb") as file:
        file.seek(offset)
        block = file.read(_BLOCK)
    if len(block) < _BLOCK:
        raise InputError(
            f"{path} is truncated: it ends after {path.stat().st_size:,} bytes without a tar's end mark; copy it again"
        )
    if any(block):
        raise InputError(f"{path} is damaged: there is no tar header at byte {offset:,}; copy it again")


def _damaged(path: Path, error: Exception) -> InputError:
    size = path.stat().st_size
    if size == 0:
        return InputError(f"{path} is empty, not a tar: copy it again")
    if "end of data" in str(error) or "truncated" in str(error):
        return InputError(f"{path} is truncated: it ends after {size:,} bytes in the middle of a member; copy it again")
    return InputError(f"{path} is no tar, or damaged or compressed ({error}): images are read from plain .tar files")
