"""A worker process: shard numbers come in as lines on standard input, events go out as JSON lines on standard output.

It ends when its standard input does, so it outlives its parent by a moment at most, even when that was killed.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from queue import SimpleQueue
from threading import Thread
from typing import IO, Any

from admth_runtime.corpus.shard_encoder import ShardEncoder, ShardProgress, ShardStats, WorkerConfig
from admth_runtime.errors import AdmthError

__all__ = ["event_from", "main"]


def main() -> None:
    """Encode shards until standard input ends; the first line of it is the :class:`WorkerConfig`."""
    # What a library prints must not get between the events.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    config = WorkerConfig(**json.loads(sys.stdin.readline()))
    shards: SimpleQueue[int] = SimpleQueue()
    Thread(target=_listen, args=(shards,), daemon=True).start()
    try:
        with ShardEncoder(config) as encoder:
            while True:
                for event in encoder.encode(shards.get()):
                    _say(out, "stats" if isinstance(event, ShardStats) else "progress", asdict(event))
    except AdmthError as error:
        _say(out, "failed", {"kind": type(error).__name__, "message": str(error)})


def event_from(line: str) -> ShardProgress | ShardStats | AdmthError:
    """Read one line that a worker wrote."""
    message = json.loads(line)
    facts = message["facts"]
    if message["event"] == "failed":
        from admth_runtime import errors

        kind: type[AdmthError] = getattr(errors, facts["kind"], AdmthError)
        return kind(facts["message"])
    if message["event"] == "progress":
        return ShardProgress(facts["images"], tuple((uri, reason) for uri, reason in facts["unreadable"]))
    return ShardStats(**facts)


def _listen(shards: SimpleQueue[int]) -> None:
    for line in sys.stdin:
        shards.put(int(line))
    # The parent closed the pipe or is gone. Nobody waits for what is under way, and renames leave no half files.
    os._exit(0)


def _say(out: IO[str], event: str, facts: dict[str, Any]) -> None:
    out.write(json.dumps({"event": event, "facts": facts}) + "\n")
    out.flush()
