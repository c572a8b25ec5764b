"""What travels through a pipeline: frames on the way in, results on the way out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from admth_runtime.errors import InputError
from admth_runtime.results import HashCodes
from admth_runtime.runtime import ImageLike

__all__ = ["Entry", "Frame", "FrameImage", "FrameResult"]

UInt8Array = NDArray[np.uint8]

FrameImage = ImageLike | Callable[[], ImageLike]
"""A picture, or a function that makes it; the function runs in a decoding thread."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One picture of a source.

    Attributes:
        image: a path, a Pillow image, uint8 ``[H, W, 3]`` in RGB order, or a function that returns one of these.
        uri: where it is from, such as a path or ``"clip.mp4#t=1.250"``.
        timestamp: when the source had it, in seconds since the epoch.
        error: why there is no picture, in one line; the pipeline hands it on as the frame's result.
    """

    image: FrameImage | None
    uri: str
    timestamp: float
    error: str | None = None


@dataclass(slots=True)
class Entry:
    """A frame inside the pipeline.

    Attributes:
        id: the frame's number.
        frame: the frame as the source gave it; None once it is decoded, so that a large picture is freed early.
        uri: the frame's.
        timestamp: the frame's.
        entered: when it entered, on the performance counter.
        pixels: uint8 ``[H, W, 3]`` of the network's own size, once decoded.
        error: why it has no codes.
    """

    id: int
    frame: Frame | None
    uri: str
    timestamp: float
    entered: float
    pixels: UInt8Array | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class FrameResult:
    """What became of one frame.

    Attributes:
        id: the frame's number, counted from ``PipelineOptions.first_id``; no two frames have the same.
        uri: where the frame is from.
        timestamp: when the source had it, in seconds since the epoch.
        error: why there are no codes, in one line; None when there are.
        batch: codes and logits of the inference call that the frame was in.
        row: the frame's row in ``batch``.
    """

    id: int
    uri: str
    timestamp: float
    error: str | None
    batch: HashCodes | None
    row: int

    def __getitem__(self, length: int) -> UInt8Array:
        """Return the code of one length, uint8 ``[L / 8]``, packed MSB first.

        Raises:
            CodeLengthError: the model has no such length.
            InputError: the frame has no codes.
        """
        code: UInt8Array = self._batch()[length][self.row]
        return code

    @property
    def ok(self) -> bool:
        """Whether there are codes."""
        return self.error is None

    @property
    def codes(self) -> HashCodes:
        """Codes and logits of this one frame, as ``HashRuntime.encode`` returns them: ``codes[64]`` is uint8 [1, 8].

        Raises:
            InputError: the frame has no codes.
        """
        batch, rows = self._batch(), slice(self.row, self.row + 1)
        return HashCodes(
            {length: codes[rows] for length, codes in batch.items()},
            {length: logits[rows] for length, logits in batch.logits.items()},
        )

    def hex(self, length: int) -> str:
        """Return the code of one length as hexadecimal text, L / 4 digits.

        Raises:
            CodeLengthError: the model has no such length.
            InputError: the frame has no codes.
        """
        return self[length].tobytes().hex()

    def to_dict(self) -> dict[str, Any]:
        """Return what a script needs: ``id``, ``uri``, ``timestamp``, and ``codes`` in hexadecimal or ``error``."""
        facts: dict[str, Any] = {"id": self.id, "uri": self.uri, "timestamp": round(self.timestamp, 6)}
        if self.batch is None:
            return {**facts, "error": self.error}
        return {**facts, "codes": {str(length): self.hex(length) for length in self.batch}}

    def _batch(self) -> HashCodes:
        if self.batch is None:
            raise InputError(f"frame {self.id} ({self.uri}) has no codes ({self.error}): look at result.ok first")
        return self.batch
