"""Workers on a Ray cluster: actors with one model each."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from admth_runtime.corpus.scheduling import Event, WorkerDied
from admth_runtime.corpus.shard_encoder import ShardEncoder, ShardProgress, ShardStats, WorkerConfig
from admth_runtime.errors import AdmthError, DeviceError, require

__all__ = ["RayWorkers"]

_SECONDS_TO_ANSWER = 5


class RayWorkers:
    """A :class:`~admth_runtime.corpus.scheduling.WorkerPool` of Ray actors.

    Ray restarts no actor of ours: the scheduler sees every death and counts it, as it does with local processes.

    Attributes:
        room: how many actors the cluster has room for.

    Args:
        config: what workers need to know; its paths must name the same files on every node.
        address: ``"auto"`` takes the cluster of ``RAY_ADDRESS`` or the one that runs on this machine, and starts one
            when there is none; ``"local"`` starts one; else ``host:port`` or ``ray://host:port``. A process that is
            connected to a cluster already stays with that.
        gpu: each actor gets a GPU.

    Raises:
        DeviceError: there is no cluster at that address, or it has no room for a single actor.
        MissingExtraError: Ray is not installed.
    """

    def __init__(self, config: WorkerConfig, *, address: str, gpu: bool) -> None:
        self._ray: Any = require("ray", extra="ray", purpose="--ray")
        self._config = config
        self._ours = not self._ray.is_initialized()
        if self._ours:
            _connect(self._ray, address)
        self.room = _room(self._ray.cluster_resources(), config.threads, gpu)
        self._class = self._ray.remote(
            num_cpus=config.threads, num_gpus=1 if gpu else 0, max_restarts=0, max_task_retries=0
        )(_Actor)
        self._workers: dict[int, _Worker] = {}
        self._started = 0

    def start(self) -> int:
        """Start an actor; see :meth:`WorkerPool.start`."""
        self._started += 1
        self._workers[self._started] = _Worker(self._class.remote(self._config))
        return self._started

    def assign(self, worker: int, shard: int) -> None:
        """Give a shard to an actor; see :meth:`WorkerPool.assign`."""
        held = self._workers[worker]
        held.events = held.actor.encode.options(num_returns="streaming").remote(shard)

    def next_event(self) -> tuple[int, Event]:
        """Wait for an event; see :meth:`WorkerPool.next_event`."""
        number_of = {worker.events: number for number, worker in self._workers.items() if worker.events is not None}
        (ready, *_), _ = self._ray.wait(list(number_of), num_returns=1)
        number = number_of[ready]
        try:
            event: Event = self._ray.get(next(ready))
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, AdmthError):
                raise type(error.cause)(str(error.cause)) from error
            self.release(number)
            return number, WorkerDied(f"stopped by {error.cause!r}")
        except (self._ray.exceptions.RayActorError, StopIteration) as error:
            self.release(number)
            return number, WorkerDied(f"lost by Ray: {_first_line(error)}")
        if isinstance(event, ShardStats):
            self._workers[number].events = None
        return number, event

    def release(self, worker: int) -> None:
        """End an actor, so that its processors are free for others; see :meth:`WorkerPool.release`."""
        with suppress(Exception):  # an actor, or a cluster, that is gone already
            self._ray.kill(self._workers.pop(worker).actor)

    def close(self) -> None:
        """End all actors at once; see :meth:`WorkerPool.close`. A connection that we did not make is kept."""
        for worker in list(self._workers):
            self.release(worker)
        if self._ours:
            self._ray.shutdown()


@dataclass
class _Worker:
    actor: Any
    events: Any = None


class _Actor:
    """What runs in Ray's process: a :class:`ShardEncoder`."""

    def __init__(self, config: WorkerConfig) -> None:
        self._config = config
        self._encoder: ShardEncoder | None = None

    def encode(self, shard: int) -> Iterator[ShardProgress | ShardStats]:
        if self._encoder is None:  # not in __init__, whose errors Ray reports as an actor's death
            self._encoder = ShardEncoder(self._config)
        yield from self._encoder.encode(shard)


def _connect(ray: Any, address: str) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent to anybody unless it was asked for
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == "local":
        options["include_dashboard"] = False
    elif address != "auto":
        _knock(address)
    try:
        ray.init(address=None if address == "auto" else address, **options)
    except Exception as error:  # Ray raises ConnectionError, ValueError, RuntimeError and errors of its own
        raise DeviceError(
            f"there is no Ray cluster at {address!r} ({_first_line(error)}): start one with  ray start --head  or "
            "pass --ray local"
        ) from error


def _knock(address: str) -> None:
    """Check that something listens at an address: Ray itself would ask for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port or 0)), timeout=_SECONDS_TO_ANSWER).close()
    except (OSError, ValueError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DeviceError(
            f"there is no Ray cluster at {address!r} ({reason}): start one with  ray start --head  or pass --ray local"
        ) from error


def _room(resources: dict[str, float], threads: int, gpu: bool) -> int:
    room = int(resources.get("CPU", 0) // threads)
    if gpu:
        room = min(room, int(resources.get("GPU", 0)))
    if room < 1:
        has = f"{resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs"
        needs = f"{threads} CPUs and a GPU" if gpu else f"{threads} CPUs"
        raise DeviceError(f"the Ray cluster has {has} and a worker needs {needs}: pass fewer --threads, or add a node")
    return room


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
