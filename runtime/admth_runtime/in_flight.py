"""Calls in flight: who is inside a shared object, and when the last one has left it after it was closed."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from types import TracebackType

from admth_runtime.errors import InputError

__all__ = ["CallGate"]


class CallGate:
    """Lets calls in until it is closed, and then frees what they use once the last of them has left.

    Use it as a context manager around each call; a thread may enter again while it is inside. After a fork the child
    starts with no calls in flight, since the threads that were inside stayed with the parent.

    Args:
        release: frees what the calls use; called once, by the last that leaves or by :meth:`close`.
        closed_message: what a call is told that comes too late.
    """

    def __init__(self, release: Callable[[], None], closed_message: str) -> None:
        self._release: Callable[[], None] | None = release
        self._closed_message = closed_message
        self._closed = False
        self._inside: dict[int, int] = {}  # depth by thread
        self._changed = threading.Condition()  # of a reentrant lock, so a signal handler may close too
        self._process = os.getpid()

    @property
    def closed(self) -> bool:
        """Whether no call is let in any more."""
        return self._closed

    def check(self) -> None:
        """Raise what a call is told that comes too late.

        Raises:
            InputError: the gate is closed and this thread is in no call.
        """
        if self._closed and threading.get_ident() not in self._inside:
            raise InputError(self._closed_message)

    def __enter__(self) -> None:
        self._forget_other_process()
        thread = threading.get_ident()
        with self._changed:
            self.check()
            self._inside[thread] = self._inside.get(thread, 0) + 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        thread = threading.get_ident()
        with self._changed:
            depth = self._inside.pop(thread, 1) - 1
            if depth:
                self._inside[thread] = depth
            if not self._closed or depth:
                return
            self._changed.notify_all()
        self._release_when_empty()

    def close(self) -> None:
        """Let no call in any more, wait for those of other threads, and free what they used.

        A second time, it waits again. From inside a call it returns without waiting for that one, which still ends
        well and then frees.
        """
        self._forget_other_process()
        thread = threading.get_ident()
        with self._changed:
            self._closed = True
            while any(other != thread for other in self._inside):
                self._changed.wait()
        self._release_when_empty()

    def _release_when_empty(self) -> None:
        with self._changed:
            if self._inside:
                return
            release, self._release = self._release, None
        if release is not None:
            release()

    def _forget_other_process(self) -> None:
        if self._process != os.getpid():
            self._process = os.getpid()
            self._inside, self._changed = {}, threading.Condition()
