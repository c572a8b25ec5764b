"""A bounded pool of things that are dear to make and serve one caller at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from admth_runtime.errors import InputError

__all__ = ["Pool"]

Thing = TypeVar("Thing")


class Pool(Generic[Thing]):
    """At most ``limit`` things, made when they are first needed and kept until the pool is closed.

    A caller waits while all are in use. A closed pool gives nothing out, and those that are out may still come back.

    Args:
        create: makes one; it is called by one thread at a time.
        limit: how many there may be.
    """

    def __init__(self, create: Callable[[], Thing], limit: int) -> None:
        self._create = create
        self._limit = limit
        self._idle: list[Thing] = []
        self._made = 0
        self._busy = 0
        self._closed = False
        self._changed = threading.Condition()
        self._making = threading.Lock()

    @contextmanager
    def lease(self) -> Iterator[Thing]:
        """Take one for the block.

        Raises:
            InputError: the pool is closed.
            AdmthError: what ``create`` raises; another caller may try again.
        """
        thing = self._take()
        try:
            yield thing
        finally:
            with self._changed:
                self._busy -= 1
                self._idle.append(thing)
                self._changed.notify_all()

    def fill(self) -> None:
        """Make the first one now, so that a failure comes early."""
        with self.lease():
            pass

    def close(self, timeout: float | None = None) -> list[Thing]:
        """Give nothing out any more, wait for those in use, and return all; a second time there are none.

        Args:
            timeout: seconds to wait; what is in use after them is left out, since freeing it would pull it away from
                under its user.
        """
        end = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            while self._busy:
                left = None if end is None else end - time.monotonic()
                if left is not None and left <= 0:
                    break
                self._changed.wait(left)
            things, self._idle = self._idle, []
        return things

    def _take(self) -> Thing:
        with self._changed:
            while True:
                if self._closed:
                    raise InputError("this engine is closed: open the model again")
                if self._idle:
                    self._busy += 1
                    return self._idle.pop()  # the one that was used last is the warmest
                if self._made < self._limit:
                    self._made += 1
                    self._busy += 1
                    break
                self._changed.wait()
        try:
            with self._making:
                return self._create()
        except BaseException:
            with self._changed:
                self._made -= 1
                self._busy -= 1
                self._changed.notify_all()
            raise
