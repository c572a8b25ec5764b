"""Shards to workers: who does what, who died, when to stop. The same for local processes and for Ray."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from admth_runtime.corpus.plan import CorpusPlan
from admth_runtime.corpus.shard_encoder import ShardProgress, ShardStats
from admth_runtime.encoding import TooManyUnreadableError, UnreadableImage
from admth_runtime.errors import AdmthError

__all__ = ["ErrorLimit", "Event", "WorkerDied", "WorkerLostError", "WorkerPool", "run_shards"]

_MOST_DEATHS = 3

# So many unreadable images are always collected before a run stops: a small corpus is then reported whole, and a
# large one that is hopeless stops early.
_LEAST_BEFORE_STOP = 20


class WorkerLostError(AdmthError):
    """Workers died again and again on one shard."""


@dataclass(frozen=True)
class WorkerDied:
    """A worker is gone.

    Attributes:
        reason: how, such as ``"killed by SIGKILL"``.
    """

    reason: str


Event = ShardProgress | ShardStats | WorkerDied
"""What a worker says: something is done of its shard, its shard is done, or its last word."""


class WorkerPool(Protocol):
    """Workers, by number, each with one shard at a time."""

    def start(self) -> int:
        """Start a worker and return its number.

        Raises:
            AdmthError: it cannot be started.
        """

    def assign(self, worker: int, shard: int) -> None:
        """Give a shard to a worker that has none. One that is dead says so as an event."""

    def next_event(self) -> tuple[int, Event]:
        """Wait for any worker's next event.

        Raises:
            AdmthError: what a worker met that another worker would meet too.
        """

    def release(self, worker: int) -> None:
        """End a worker that is not needed any more. What it holds may be what another waits for."""

    def close(self) -> None:
        """End all workers at once, whatever they do. A part that is not whole by then never will be."""


@dataclass
class ErrorLimit:
    """Unreadable images against the rate that is allowed.

    Attributes:
        images: images of the corpus.
        rate: the share of them that may be unreadable.
        done: unreadable images of whole parts.
        named: the first of those that this run met.
    """

    images: int
    rate: float
    done: int = 0
    named: list[UnreadableImage] = field(default_factory=list)

    @property
    def allowed(self) -> int:
        """How many images may be unreadable."""
        return math.floor(self.rate * self.images + 1e-9)  # 0.29 * 100 is 28.999...

    def meet(self, unreadable: Iterable[tuple[str, str]]) -> None:
        """Remember the first unreadable images, to name them."""
        for uri, reason in unreadable:
            if len(self.named) < _LEAST_BEFORE_STOP:
                self.named.append(UnreadableImage(uri, reason))

    def check(self, under_way: int, covered: int) -> None:
        """Stop a run that has become hopeless.

        Args:
            under_way: unreadable images of shards that are being encoded.
            covered: images that are done.

        Raises:
            TooManyUnreadableError: more are unreadable than allowed, and more than a few.
        """
        found = self.done + under_way
        if found > max(self.allowed, _LEAST_BEFORE_STOP):
            raise TooManyUnreadableError(
                f"stopped after {covered:,} of {self.images:,} images: {found:,} cannot be read, more than "
                f"--max-error-rate {self.rate:g} allows: mend the images or raise the rate, then run the same command "
                "again, which goes on",
                self.named,
            )

    def check_whole(self) -> None:
        """Judge a corpus of which all parts are there.

        Raises:
            TooManyUnreadableError: more images are unreadable than allowed, or all are.
        """
        state = f"{self.done:,} of {self.images:,} images cannot be read"
        if self.done == self.images:
            raise TooManyUnreadableError(f"{state}: there is nothing to encode", self.named)
        if self.done > self.allowed:
            raise TooManyUnreadableError(
                f"{state}, more than --max-error-rate {self.rate:g} allows: see errors.parquet, then run the same "
                "command again with --retry-errors once they are mended, or with a higher rate",
                self.named,
            )


def run_shards(
    pool: WorkerPool,
    plan: CorpusPlan,
    shards: Iterable[int],
    *,
    workers: int,
    limit: ErrorLimit,
    covered: int,
    advance: Callable[[int], None],
    finished: Callable[[ShardStats], None],
) -> None:
    """Have every shard encoded. A shard whose worker died goes to a new worker.

    Args:
        pool: the workers; none is started yet.
        plan: the corpus.
        shards: the shards to encode.
        workers: how many workers at a time.
        limit: unreadable images; those of whole parts are counted.
        covered: images of whole parts.
        advance: called with the images done since the last call; below 0 when a worker took its work to the grave.
        finished: called once a shard's part is there.

    Raises:
        WorkerLostError: three workers died on one shard.
        TooManyUnreadableError: the run is hopeless.
        AdmthError: what a worker met that another would meet too.
    """
    waiting = deque(shards)
    running: dict[int, _Running] = {}
    deaths: Counter[int] = Counter()
    for _ in range(min(workers, len(waiting))):
        _next_shard(pool, pool.start(), waiting, running)
    while running:
        worker, event = pool.next_event()
        current = running[worker]
        if isinstance(event, ShardProgress):
            current.images += event.images
            current.errors += len(event.unreadable)
            limit.meet(event.unreadable)
            advance(event.images)
            limit.check(
                sum(each.errors for each in running.values()),
                covered + sum(each.images for each in running.values()),
            )
        elif isinstance(event, ShardStats):
            limit.done += event.errors
            covered += event.images
            finished(event)
            del running[worker]
            if waiting:
                _next_shard(pool, worker, waiting, running)
            else:
                pool.release(worker)
        else:
            del running[worker]
            advance(-current.images)
            deaths[current.shard] += 1
            if deaths[current.shard] == _MOST_DEATHS:
                raise _lost(plan, current.shard, event.reason)
            waiting.appendleft(current.shard)
            _next_shard(pool, pool.start(), waiting, running)


@dataclass
class _Running:
    """A shard that is being encoded, and what is done of it."""

    shard: int
    images: int = 0
    errors: int = 0


def _next_shard(pool: WorkerPool, worker: int, waiting: deque[int], running: dict[int, _Running]) -> None:
    running[worker] = _Running(waiting.popleft())
    pool.assign(worker, running[worker].shard)


def _lost(plan: CorpusPlan, shard: int, reason: str) -> WorkerLostError:
    span = plan.span(shard)
    return WorkerLostError(
        f"{_MOST_DEATHS} workers died on shard {shard}, images {span.start:,} to {span.stop - 1:,} of the listing "
        f"(the last was {reason}): if memory ran out, run the same command again with fewer --workers"
    )
