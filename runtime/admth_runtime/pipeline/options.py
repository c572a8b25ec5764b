"""What a pipeline may be told: batch, waiting, queue and what happens when it is full."""

from __future__ import annotations

import math
from dataclasses import dataclass

from admth_runtime.errors import InputError

__all__ = ["POLICIES", "PipelineOptions"]

POLICIES = ("block", "drop-oldest", "reject")
"""What a full queue at the entrance does with the next frame; :class:`PipelineOptions` describes them."""


@dataclass(frozen=True)
class PipelineOptions:
    """How a :class:`~admth_runtime.pipeline.pipeline.HashPipeline` works.

    Attributes:
        batch_size: the most images in one inference call; None takes the runtime's ``batch_size``.
        max_wait_ms: how long the first image of a batch waits for more, in milliseconds. A batch that is not full
            leaves then, unless the engine is still busy with the batches before: while it waits anyway it goes on
            filling. 0 takes what is there.
        queue_size: frames that may wait at the entrance, before they are decoded.
        policy: what happens when so many wait already. ``"block"``: the source, or the caller of ``submit``, waits.
            ``"drop-oldest"``: the frame that has waited longest is dropped and counted, so that what is encoded is
            fresh: for cameras. ``"reject"``: ``submit`` raises ``QueueFullError``; a new frame of a source that is
            read is left out. Both are counted. The queues after the entrance always block, so that pressure travels
            back to it.
        decode_threads: threads that decode and preprocess; None takes one a usable core.
        stall_timeout_s: when a stage takes nothing for so many seconds while the queue before it is full, the
            pipeline ends with an error that names it. None waits for ever.
        stop_timeout_s: how long a source or sink may take to return once the pipeline is told to stop, in seconds;
            one that takes longer is left behind and reported.
        max_engine_failures: so many inference calls that fail in a row end the pipeline; fewer become errors of
            their frames.
        max_frames: frames to read from the source before it counts as ended; None reads all.
        first_id: the id of the first frame; the others count up from it.

    Raises:
        InputError: a value is unknown or out of range.
    """

    batch_size: int | None = None
    max_wait_ms: float = 10.0
    queue_size: int = 64
    policy: str = "block"
    decode_threads: int | None = None
    stall_timeout_s: float | None = 60.0
    stop_timeout_s: float = 10.0
    max_engine_failures: int = 3
    max_frames: int | None = None
    first_id: int = 0

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise InputError(f"policy {self.policy!r} is unknown: use one of {', '.join(POLICIES)}")
        for name, least, optional in (
            ("batch_size", 1, True),
            ("queue_size", 1, False),
            ("decode_threads", 1, True),
            ("max_engine_failures", 1, False),
            ("max_frames", 1, True),
            ("first_id", 0, False),
        ):
            value = getattr(self, name)
            if not (value is None and optional) and (
                isinstance(value, bool) or not isinstance(value, int) or value < least
            ):
                raise InputError(f"{name} {value!r} is not an integer of {least} or more")
        for name, above, optional in (
            ("max_wait_ms", False, False),
            ("stall_timeout_s", True, True),
            ("stop_timeout_s", True, False),
        ):
            value = getattr(self, name)
            if value is None and optional:
                continue
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or value < 0 or (above and value == 0):
                raise InputError(f"{name} {value!r} is not a {'positive number' if above else 'number of 0 or more'}")
