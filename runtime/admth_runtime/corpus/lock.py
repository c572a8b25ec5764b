"""One run at a time in a corpus's folder."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from admth_runtime.corpus.layout import LOCK_FILE
from admth_runtime.errors import OutputError

__all__ = ["locked"]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock while the block runs; the system lets it go when the process ends, however it ends.

    Raises:
        OutputError: another run holds it, or the folder may not be written to.
    """
    path = folder / LOCK_FILE
    try:
        file = path.open("a+")
    except OSError as error:
        raise OutputError(f"cannot write in {folder}: {error.strerror or error}; choose another --out") from error
    with file:
        try:
            _take(file)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise OutputError(
                f"{folder} is being written by {holder}: wait until it has ended, or choose another --out"
            ) from error
        # The file stays: between unlinking and a third process's open, two could hold "the" lock.
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _take(file: IO[str]) -> None:
    try:
        import fcntl
    except ImportError as error:
        raise OutputError("writing a corpus needs Linux or macOS: write one file, --out codes.parquet") from error
    fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
