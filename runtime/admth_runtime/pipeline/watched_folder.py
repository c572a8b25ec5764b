"""A folder that pictures arrive in.

It is polled. Notifications of the operating system (inotify and the like) do not cover network file systems, overflow,
and say that a file was closed, not that it is whole. Reading the folder works everywhere and misses nothing.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from admth_runtime.errors import InputError, PipelineError
from admth_runtime.pipeline.frames import Frame
from admth_runtime.preprocessing import IMAGE_SUFFIXES

__all__ = ["WatchedFolder"]

_Signature = tuple[int, int, int]  # size, time of change in nanoseconds, inode


@dataclass
class _Sighting:
    signature: _Signature
    since: float  # monotonic time at which the file was first seen like this
    given: bool


class WatchedFolder:
    """New image files of a folder, oldest first, each once it is whole.

    A file counts as whole when its size and its time of change have stayed the same for ``settle_s`` seconds, and it
    is not empty. Write pictures under another name, such as ``.0001.jpg`` or ``0001.jpg.part``, and rename them, and
    a slow writer is never met half-way either: names that begin with a dot, or end in none of ``suffixes``, are left
    alone. A file that is written again, or replaced, is given again. Remove files that are done with, or the folder
    takes ever longer to read.

    Args:
        folder: the folder.
        existing: give the files that are there at the start too.
        recursive: watch folders within the folder too; links to folders are not followed.
        poll_s: seconds between two looks at the folder; a folder that takes longer to read is read half of the time.
        settle_s: seconds for which a file must not change.
        idle_timeout_s: end after so many seconds without a new file; None goes on for ever.
        suffixes: endings of file names that count, lower case.

    Raises:
        InputError: the folder does not exist, or a number is out of range.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        existing: bool = True,
        recursive: bool = False,
        poll_s: float = 0.5,
        settle_s: float = 1.0,
        idle_timeout_s: float | None = None,
        suffixes: Collection[str] = IMAGE_SUFFIXES,
    ) -> None:
        self.folder = os.fspath(folder)
        if not Path(self.folder).is_dir():
            state = "is a file, not a folder" if Path(self.folder).exists() else "no such folder"
            raise InputError(f"{self.folder}: {state}: name the folder that pictures arrive in")
        if poll_s <= 0:
            raise InputError(f"poll_s {poll_s!r} is not a positive number of seconds")
        if settle_s < 0 or (idle_timeout_s is not None and idle_timeout_s <= 0):
            raise InputError(f"settle_s {settle_s!r} or idle_timeout_s {idle_timeout_s!r} is out of range")
        self._existing, self._recursive = existing, recursive
        self._poll_s, self._settle_s, self._idle_timeout_s = poll_s, settle_s, idle_timeout_s
        self._suffixes = frozenset(suffixes)

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        """Yield the names of files as they become whole.

        Raises:
            PipelineError: the folder is gone, or can no longer be read.
        """
        seen: dict[str, _Sighting] = {}
        first, idle_since = True, time.monotonic()
        while not stop.is_set():
            start = time.monotonic()
            found = self._scan()
            for path in self._whole(found, seen, start, skip=first and not self._existing):
                yield Frame(path, path, time.time())
                idle_since = time.monotonic()
            first, now = False, time.monotonic()
            waiting = any(not sighting.given and sighting.signature[0] > 0 for sighting in seen.values())
            if self._idle_timeout_s is not None and not waiting and now - idle_since >= self._idle_timeout_s:
                return
            stop.wait(max(self._poll_s, now - start))

    def _whole(
        self, found: dict[str, _Signature], seen: dict[str, _Sighting], now: float, *, skip: bool
    ) -> Iterator[str]:
        """Bring ``seen`` up to date and yield what has become whole; ``skip`` marks everything as given."""
        for path in [path for path in seen if path not in found]:  # or a folder that is emptied again and again leaks
            del seen[path]
        for path in sorted(found, key=lambda path: (found[path][1], path)):
            signature, sighting = found[path], seen.get(path)
            if sighting is None or sighting.signature != signature:
                seen[path] = sighting = _Sighting(signature, now, skip)
                if self._settle_s > 0:
                    continue
            if not sighting.given and now - sighting.since >= self._settle_s and signature[0] > 0:
                sighting.given = True
                yield path

    def _scan(self) -> dict[str, _Signature]:
        """Return the image files that are there now."""
        found: dict[str, _Signature] = {}
        folders = [self.folder]
        while folders:
            folder = folders.pop()
            try:
                with os.scandir(folder) as entries:
                    for entry in entries:
                        if entry.name.startswith("."):
                            continue
                        if self._recursive and entry.is_dir(follow_symlinks=False):
                            folders.append(entry.path)
                        elif self._counts(entry.name) and (signature := _signature(entry)):
                            found[entry.path] = signature
            except OSError as error:
                if folder == self.folder:
                    raise PipelineError(
                        f"the watched folder {self.folder} has vanished or cannot be read ({error.strerror}): "
                        "bring it back and start again"
                    ) from error
        return found

    def _counts(self, name: str) -> bool:
        return Path(name).suffix.lower() in self._suffixes


def _signature(entry: os.DirEntry[str]) -> _Signature | None:
    """Return what changes when a file does; None for what is no file, or no longer there."""
    try:
        if not entry.is_file():
            return None
        status = entry.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino
