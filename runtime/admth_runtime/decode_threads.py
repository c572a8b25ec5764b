"""Threads that decode the files of one batch side by side."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

__all__ = ["DecodeThreads"]

Item = TypeVar("Item")
Result = TypeVar("Result")


class DecodeThreads:
    """A pool that starts with the first batch of several files and lives until it is closed.

    Args:
        count: how many threads; with 1 all is done by the thread that calls.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._process = os.getpid()

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """Apply a function to every item and return the results in order.

        Raises:
            Exception: what the function raises for the first item that fails, once no thread is at work on another.
        """
        if self.count == 1 or len(items) < 2:
            return [function(item) for item in items]
        from concurrent.futures import wait

        pool = self._started()
        futures = [pool.submit(function, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            for future in futures:
                future.cancel()
            wait(futures)
            raise

    def close(self) -> None:
        """End the threads. The caller sees to it that no :meth:`map` is under way."""
        pool, self._pool = self._pool, None
        if pool is not None and self._process == os.getpid():
            pool.shutdown()

    def _started(self) -> ThreadPoolExecutor:
        if self._process != os.getpid():  # the threads stayed with the parent of this process
            self._process, self._lock, self._pool = os.getpid(), threading.Lock(), None
        with self._lock:
            if self._pool is None:
                from concurrent.futures import ThreadPoolExecutor  # a runtime that only encodes pixels starts without

                self._pool = ThreadPoolExecutor(self.count, thread_name_prefix="admth-decode")
            return self._pool
