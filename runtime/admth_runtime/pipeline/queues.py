"""The bounded queues between a pipeline's stages.

The standard library's queues have no way to close, to drop the oldest, or to keep the order of what several workers
finish out of order.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from admth_runtime.errors import PipelineError, QueueFullError

__all__ = ["BoundedQueue", "Closed", "OrderedQueue", "StalledError"]

T = TypeVar("T")


class Closed(Exception):  # noqa: N818 - a signal between stages, not an error that anybody sees
    """The queue takes no more, or holds no more."""


class StalledError(PipelineError):
    """A stage takes nothing and its queue is full.

    Args:
        stage: the stage.
        stall_s: for how many seconds.
        waiting: how many items wait.
    """

    def __init__(self, stage: str, stall_s: float, waiting: int) -> None:
        self.stall_s = stall_s
        super().__init__(
            f"the {stage} stage has taken nothing for {stall_s:g} s while {waiting} wait in its queue: mend what "
            "blocks it, or give it longer with stall_timeout_s"
        )


class BoundedQueue(Generic[T]):
    """First in, first out, between any number of threads.

    Args:
        stage: the stage that reads it, for messages.
        capacity: the most items that wait.
        policy: what :meth:`put` does when it is full, one of ``POLICIES``.
        stall_s: seconds without a reader, while it is full, after which a blocked :meth:`put` gives up; None never.
    """

    def __init__(self, stage: str, capacity: int, *, policy: str = "block", stall_s: float | None = None) -> None:
        self.stage, self.capacity = stage, capacity
        self.peak = self.dropped = self.taken = 0
        self._policy, self._stall_s = policy, stall_s
        self._items: deque[T] = deque()
        self._closed = False
        lock = threading.Lock()
        self._filled, self._emptied = threading.Condition(lock), threading.Condition(lock)

    def __len__(self) -> int:
        return len(self._items)

    @property
    def has_room(self) -> bool:
        """Whether :meth:`put` would return at once."""
        return len(self._items) < self.capacity

    def put(self, item: T) -> None:
        """Add an item.

        Raises:
            Closed: the queue is closed.
            QueueFullError: it is full and its policy is ``"reject"``.
            StalledError: nobody has taken anything for ``stall_s``.
        """
        with self._filled:
            if len(self._items) >= self.capacity and not self._closed:
                self._make_room()
            if self._closed:
                raise Closed
            self._items.append(item)
            self.peak = max(self.peak, len(self._items))
            self._filled.notify()

    def take(self) -> tuple[int, T]:
        """Wait for the next item and return it with its number, counted from 0 in the order of taking.

        Raises:
            Closed: the queue is closed and empty.
        """
        with self._filled:
            while not self._items:
                if self._closed:
                    raise Closed
                self._filled.wait()
            item, number = self._items.popleft(), self.taken
            self.taken += 1
            if len(self._items) <= self.capacity // 2:  # a writer that waits is woken for many items, not for each
                self._emptied.notify()
            return number, item

    def close(self, *, discard: bool = False) -> None:
        """Take no more; what waits can still be taken, unless it is to be discarded."""
        with self._filled:
            self._closed = True
            if discard:
                self._items.clear()
            self._filled.notify_all()
            self._emptied.notify_all()

    def _make_room(self) -> None:
        if self._policy == "reject":
            raise QueueFullError(
                f"the queue is full ({self.capacity} frames wait): submit more slowly, or use a larger queue_size or "
                "another policy"
            )
        if self._policy == "drop-oldest":
            self._items.popleft()
            self.dropped += 1
            return
        _wait_for_room(
            self._emptied,
            full=lambda: len(self._items) >= self.capacity and not self._closed,
            progress=lambda: self.taken,
            stall_s=self._stall_s,
            stage=self.stage,
            capacity=self.capacity,
        )


class OrderedQueue(Generic[T]):
    """A queue that takes numbered items in any order and gives them out in the order of their numbers.

    Args:
        stage: the stage that reads it, for messages.
        capacity: how far a number may be ahead of the next one that is given out.
        stall_s: as of :class:`BoundedQueue`.
    """

    def __init__(self, stage: str, capacity: int, *, stall_s: float | None = None) -> None:
        self.stage, self.capacity = stage, capacity
        self.peak = 0
        self._stall_s = stall_s
        self._items: dict[int, T] = {}
        self._next = 0
        self._ready = 0  # the first number, from _next on, that is not here yet
        self._wanted = 1  # how many the collector waits for: it is not woken for fewer
        self._closed = False
        self._lock = threading.Lock()
        self._filled = threading.Condition(self._lock)
        self._early: dict[int, threading.Condition] = {}  # of writers whose number is too far ahead

    def __len__(self) -> int:
        return len(self._items)

    @property
    def has_room(self) -> bool:
        """Whether fewer items than its capacity are here."""
        return len(self._items) < self.capacity

    def put(self, number: int, item: T) -> None:
        """Add the item of a number; every number is put once, and the next one that is due never waits.

        Raises:
            Closed: the queue is closed.
            StalledError: nobody has taken anything for ``stall_s``.
        """
        with self._filled:
            if number - self._next >= self.capacity and not self._closed:
                self._wait_for_turn(number)
            if self._closed:
                raise Closed
            self._items[number] = item
            self.peak = max(self.peak, len(self._items))
            if number == self._ready:
                while self._ready in self._items:
                    self._ready += 1
                if self._ready - self._next >= self._wanted:
                    self._filled.notify()

    def collect(self, limit: int, wait_s: float, may_leave: Callable[[], bool]) -> list[T]:
        """Wait for the next items in order and return 1 to ``limit`` of them.

        Args:
            limit: the most items, at most ``capacity``.
            wait_s: how long to wait for more after the first.
            may_leave: whether fewer than ``limit`` may be returned after that; asked again after :meth:`poke`.

        Raises:
            Closed: the queue is closed and empty.
        """
        with self._filled:
            self._wanted = 1
            while self._ready == self._next:
                if self._closed:
                    raise Closed
                self._filled.wait()
            deadline, self._wanted = time.monotonic() + wait_s, limit
            while self._ready - self._next < limit and not self._closed:
                left = deadline - time.monotonic()
                if left <= 0 and may_leave():
                    break
                self._filled.wait(left if left > 0 else None)
            count = min(limit, self._ready - self._next)
            if not count:  # discarded meanwhile
                raise Closed
            items = [self._items.pop(number) for number in range(self._next, self._next + count)]
            for number in range(self._next + self.capacity, self._next + self.capacity + count):
                if number in self._early:
                    self._early[number].notify()
            self._next += count
            return items

    def poke(self) -> None:
        """Let a waiting :meth:`collect` ask ``may_leave`` again."""
        with self._filled:
            self._filled.notify()

    def close(self, *, discard: bool = False) -> None:
        """Take no more; what is there can still be collected, unless it is to be discarded."""
        with self._filled:
            self._closed = True
            if discard:
                self._items.clear()
                self._ready = self._next
            for waiting in (self._filled, *self._early.values()):
                waiting.notify_all()

    def _wait_for_turn(self, number: int) -> None:
        turn = self._early[number] = threading.Condition(self._lock)
        try:
            _wait_for_room(
                turn,
                full=lambda: number - self._next >= self.capacity and not self._closed,
                progress=lambda: self._next,
                stall_s=self._stall_s,
                stage=self.stage,
                capacity=self.capacity,
            )
        finally:
            del self._early[number]


def _wait_for_room(
    emptied: threading.Condition,
    *,
    full: Callable[[], bool],
    progress: Callable[[], int],
    stall_s: float | None,
    stage: str,
    capacity: int,
) -> None:
    """Wait until a queue is no longer full, and give up when its reader has taken nothing for ``stall_s``."""
    last, since = progress(), time.monotonic()
    while full():
        emptied.wait(None if stall_s is None else max(0.0, since + stall_s - time.monotonic()))
        now = progress()
        if now != last:
            last, since = now, time.monotonic()
        elif stall_s is not None and full() and time.monotonic() - since >= stall_s:
            raise StalledError(stage, stall_s, capacity)
