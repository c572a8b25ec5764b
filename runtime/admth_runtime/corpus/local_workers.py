"""Worker processes on this machine."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from queue import SimpleQueue
from threading import Thread
from typing import IO

from admth_runtime.corpus.scheduling import Event, WorkerDied
from admth_runtime.corpus.shard_encoder import WorkerConfig
from admth_runtime.corpus.worker import event_from
from admth_runtime.errors import AdmthError

__all__ = ["LocalWorkers"]

# A process of our own making and not multiprocessing's: that would import the caller's main module again, which a
# script without a __main__ guard, or one read from standard input, does not survive.
_BOOTSTRAP = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from admth_runtime.corpus.worker import main; main()"
)
_SECONDS_TO_DIE = 5


@dataclass(frozen=True)
class _Worker:
    process: subprocess.Popen[str]
    stderr: IO[bytes]


class LocalWorkers:
    """A :class:`~admth_runtime.corpus.scheduling.WorkerPool` of processes, each with a model of its own."""

    def __init__(self, config: WorkerConfig) -> None:
        self._config = config
        self._workers: dict[int, _Worker] = {}
        self._started = 0
        self._lines: SimpleQueue[tuple[int, str | None]] = SimpleQueue()

    def start(self) -> int:
        """Start a worker; see :meth:`WorkerPool.start`."""
        stderr = tempfile.TemporaryFile()  # noqa: SIM115  closed with the worker
        process = subprocess.Popen(
            [sys.executable, "-c", _BOOTSTRAP, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for us to see, who end the workers
        )
        self._started += 1
        number = self._started
        self._workers[number] = _Worker(process, stderr)
        Thread(target=self._listen, args=(number, process.stdout), daemon=True).start()
        self._tell(number, json.dumps(asdict(self._config)))
        return number

    def assign(self, worker: int, shard: int) -> None:
        """Give a shard to a worker; see :meth:`WorkerPool.assign`."""
        self._tell(worker, str(shard))

    def next_event(self) -> tuple[int, Event]:
        """Wait for an event; see :meth:`WorkerPool.next_event`."""
        number, line = self._lines.get()
        while number not in self._workers:  # the last word of one that was released
            number, line = self._lines.get()
        if line is None:
            return number, WorkerDied(self._bury(number))
        event = event_from(line)
        if isinstance(event, AdmthError):
            raise event
        return number, event

    def release(self, worker: int) -> None:
        """End an idle worker; see :meth:`WorkerPool.release`."""
        self._workers[worker].process.kill()
        self._bury(worker)

    def close(self) -> None:
        """End all workers at once; see :meth:`WorkerPool.close`."""
        for worker in self._workers.values():
            worker.process.kill()
        for number in list(self._workers):
            self._bury(number)

    def _listen(self, number: int, lines: IO[str]) -> None:
        with lines:
            for line in lines:
                if line.endswith("\n"):  # what a dying worker could still write of a line is no event
                    self._lines.put((number, line))
        self._lines.put((number, None))

    def _tell(self, number: int, line: str) -> None:
        stdin = self._workers[number].process.stdin
        assert stdin is not None
        with suppress(BrokenPipeError):  # a dead worker is met as an event
            stdin.write(line + "\n")
            stdin.flush()

    def _bury(self, number: int) -> str:
        """Wait for the end of a worker whose output has ended, and return how it died."""
        worker = self._workers.pop(number)
        try:
            code = worker.process.wait(_SECONDS_TO_DIE)
        except subprocess.TimeoutExpired:
            worker.process.kill()
            code = worker.process.wait()
        if worker.process.stdin is not None:
            with suppress(BrokenPipeError):
                worker.process.stdin.close()
        with worker.stderr as stderr:
            stderr.seek(0)
            said = stderr.read().decode(errors="replace").strip().splitlines()
        if code < 0:
            with suppress(ValueError):
                return f"killed by {signal.Signals(-code).name}"
        return f"ended with exit code {code}" + (f", saying {said[-1][:200]!r}" if said else "")
