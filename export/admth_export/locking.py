"""One writer a file: two exports, or two builds, into one name do not mix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from admth_runtime.errors import OutputError, require

__all__ = ["export_lock"]


@contextmanager
def export_lock(target: Path, *, what: str = "export", extra: str = "export") -> Iterator[None]:
    """Hold the lock of a file that is being made; the system releases it when a process dies.

    Args:
        target: the file.
        what: what makes it, for the message: ``"export"`` or ``"build"``.
        extra: the extra that brings the package filelock here.

    Raises:
        OutputError: another process makes it, or the lock cannot be made.
        MissingExtraError: filelock is not installed.
    """
    filelock = require("filelock", extra=extra, purpose="keeping two writers from one file")
    path = target.with_name(f".{target.name}.lock")
    lock = filelock.FileLock(path, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise OutputError(
            f"{target} is being written by another {what}: wait for it, or choose another place with --out"
        ) from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"cannot write {target}: {reason}; choose a place you may write to with --out") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()
