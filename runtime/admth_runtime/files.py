"""Writing files so that an interrupted or failed run leaves no half-written artefact, and digests of files."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from admth_runtime.errors import OutputError

__all__ = [
    "atomic_path",
    "check_target",
    "make_folder",
    "sha256_of_bytes",
    "sha256_of_file",
    "write_bytes",
    "write_json",
    "write_text",
]


@contextmanager
def atomic_path(target: str | Path) -> Iterator[Path]:
    """Give a temporary path beside ``target`` that takes its name when the block ends without an error.

    The temporary file keeps the target's suffix, since writers such as NumPy and Matplotlib look at it. On any
    exception, Ctrl-C included, it is removed and whatever was at ``target`` stays.

    Raises:
        OutputError: the folder does not exist, is read-only, or the disk is full.
    """
    target = Path(target)
    check_target(target)
    import tempfile  # here and below: a runtime that only encodes starts faster and smaller without them

    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.stem}.", suffix=f".tmp{target.suffix}", dir=target.parent)
        os.close(handle)
    except OSError as error:
        raise _output_error(target, error) from error
    temporary = Path(name)
    try:
        try:
            yield temporary
            _publish(temporary, target)
        except OSError as error:
            raise _output_error(target, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def check_target(target: str | Path) -> None:
    """Check that a file can be written at ``target``, to learn it before the work and not after.

    Raises:
        OutputError: its folder does not exist or may not be written to, or something that is no file has the name.
    """
    target = Path(target)
    if target.is_dir():
        raise OutputError(f"cannot write {target}: it is a folder; name a file in it")
    if target.exists() and not target.is_file():  # a rename would replace a device such as /dev/null by a file
        raise OutputError(f"cannot write {target}: it is a device or a pipe; name a file")
    if target.parent.is_dir() and not os.access(target.parent, os.W_OK | os.X_OK):
        raise _output_error(target, OSError(errno.EACCES, os.strerror(errno.EACCES)))
    if not target.parent.exists():
        raise _output_error(target, OSError(errno.ENOENT, os.strerror(errno.ENOENT)))


def write_bytes(target: str | Path, content: bytes) -> None:
    """Write a file by rename.

    Raises:
        OutputError: it cannot be written; whatever was there stays.
    """
    with atomic_path(target) as temporary:
        temporary.write_bytes(content)


def write_text(target: str | Path, text: str) -> None:
    """Write UTF-8 text by rename; see :func:`write_bytes`."""
    write_bytes(target, text.encode())


def write_json(target: str | Path, value: Any) -> None:
    """Write indented JSON by rename; NaN and infinity are refused, since other readers refuse them."""
    write_text(target, json.dumps(value, indent=2, allow_nan=False) + "\n")


def make_folder(path: str | Path) -> Path:
    """Create a folder and its parents, or accept the one that is there.

    Raises:
        OutputError: a file has that name, or the parent is read-only.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot create the folder {folder}: {_reason(error)}") from error
    return folder


def sha256_of_file(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hexadecimal digits, reading it in blocks."""
    import hashlib

    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_of_bytes(content: bytes) -> str:
    """Return the SHA-256 of bytes as 64 hexadecimal digits."""
    import hashlib

    return hashlib.sha256(content).hexdigest()


def _publish(temporary: Path, target: Path) -> None:
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    # mkstemp makes files private; give the artefact the mode that a plain open() would have given it.
    umask = os.umask(0)
    os.umask(umask)
    temporary.chmod(0o666 & ~umask)
    temporary.replace(target)


def _output_error(target: Path, error: OSError) -> OutputError:
    return OutputError(f"cannot write {target}: {_reason(error)}")


def _reason(error: OSError) -> str:
    mends = {
        "ENOSPC": "the disk is full; free space or choose another place with --out",
        "EDQUOT": "the disk quota is used up; free space or choose another place with --out",
        "EACCES": "permission denied; choose a place you may write to with --out",
        "EROFS": "the file system is read-only; choose another place with --out",
        "ENOENT": "its folder does not exist; create it first",
        "ENOTDIR": "a part of the path is a file, not a folder; choose another place with --out",
        "EEXIST": "a file of that name is in the way; choose another place with --out",
        "EFBIG": "the file grows beyond the allowed size; raise the limit or choose another place with --out",
    }
    return mends.get(errno.errorcode.get(error.errno or 0, ""), error.strerror or str(error))
