"""What a running pipeline counts and times; bounded, however long it runs."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

__all__ = ["PipelineStats", "QueueStats", "StageClock", "StageStats"]

_RECENT = 1024


@dataclass(frozen=True)
class StageStats:
    """Times of one stage.

    Attributes:
        frames: frames that it has worked on.
        calls: how often it ran; a batch is one call.
        errors: frames that it could not work on.
        seconds: the time it spent working, without waiting, over all its threads.
        p50_ms: median of the latest 1,024 calls, in milliseconds; the others are their percentiles.
        p90_ms: 90th percentile.
        p99_ms: 99th percentile.
        max_ms: the longest call of all.
    """

    frames: int
    calls: int
    errors: int
    seconds: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    max_ms: float


@dataclass(frozen=True)
class QueueStats:
    """State of one queue.

    Attributes:
        depth: items that wait now: frames, or batches before the stages ``infer`` and ``sink``.
        peak: the most that ever waited.
        capacity: the most that may wait.
    """

    depth: int
    peak: int
    capacity: int


@dataclass(frozen=True)
class PipelineStats:
    """A pipeline's account: ``frames = delivered + errors + dropped + rejected + discarded + under_way``.

    Attributes:
        frames: frames that the source gave or ``submit`` was called with.
        delivered: frames whose codes the sink has taken.
        errors: frames whose error the sink, or ``on_error``, has taken.
        dropped: frames that gave way to newer ones (policy ``"drop-oldest"``).
        rejected: frames that found the queue full (policy ``"reject"``).
        discarded: frames that were under way when the pipeline ended without delivering them.
        under_way: frames inside; 0 once the pipeline has ended.
        seconds: since the start, or from start to end.
        latency: from a frame's entrance until the sink has taken it.
        stages: of ``source``, ``decode``, ``preprocess``, ``batch``, ``infer`` and ``sink``.
        queues: of the queues, by the stage that reads them: ``decode``, ``batch``, ``infer``, ``sink``.
    """

    frames: int
    delivered: int
    errors: int
    dropped: int
    rejected: int
    discarded: int
    under_way: int
    seconds: float
    latency: StageStats
    stages: Mapping[str, StageStats]
    queues: Mapping[str, QueueStats]

    @property
    def frames_per_second(self) -> float:
        """Delivered frames a second, over the whole run."""
        return self.delivered / self.seconds if self.seconds > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {**asdict(self), "frames_per_second": self.frames_per_second}


class StageClock:
    """Adds up the times of a stage; may be used by several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._frames = self._calls = self._errors = 0
        self._seconds = self._longest = 0.0
        self._recent: deque[float] = deque(maxlen=_RECENT)

    @property
    def frames(self) -> int:
        """Frames so far."""
        return self._frames

    @property
    def errors(self) -> int:
        """Errors so far."""
        return self._errors

    def add(self, seconds: float, frames: int = 1, errors: int = 0) -> None:
        """Count one call."""
        with self._lock:
            self._frames += frames
            self._calls += 1
            self._errors += errors
            self._seconds += seconds
            self._longest = max(self._longest, seconds)
            self._recent.append(seconds)

    def stats(self) -> StageStats:
        """Sum up."""
        with self._lock:
            recent = np.asarray(self._recent or [0.0])
            totals = (self._frames, self._calls, self._errors, self._seconds, 1e3 * self._longest)
        frames, calls, errors, seconds, longest = totals
        p50, p90, p99 = (float(value) for value in 1e3 * np.percentile(recent, (50, 90, 99)))
        return StageStats(frames, calls, errors, seconds, p50, p90, p99, longest)
