"""The candidate's side of the parity gate: a process of its own that runs a model as users will run it.

It imports the lean runtime alone, never PyTorch, so no library that PyTorch loads can change what the engine does, and
an engine that crashes takes nothing down with it. The process speaks with its parent over pipes:

- in: one line of JSON with ``model``, ``device``, ``threads``, ``shape`` (of uint8 pixels) and ``runs`` (pairs of batch
  size and number of images), then the pixels' bytes;
- out: lines of JSON, each with ``advance`` (images done), or ``error`` (type and message), or at the end ``result``
  (engine facts and a list of name, dtype and shape), which the arrays' bytes follow.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from admth_runtime.errors import AdmthError
from admth_runtime.results import HashCodes
from admth_runtime.runtime import HashRuntime

__all__ = ["main"]


def main() -> None:
    """Serve one request from standard input."""
    # Libraries may print; what they print must not land between the lines of the protocol.
    with os.fdopen(os.dup(1), "wb") as out:
        os.dup2(2, 1)
        request = json.loads(sys.stdin.buffer.readline())
        pixels = _read_pixels(sys.stdin.buffer, tuple(request["shape"]))
        try:
            _serve(request, pixels, out)
        except AdmthError as error:
            _send(out, {"error": {"type": type(error).__name__, "message": str(error)}})


def _serve(request: dict[str, Any], pixels: NDArray[np.uint8], out: BinaryIO) -> None:
    batch_sizes = [size for size, _ in request["runs"]]
    arrays: dict[str, NDArray[Any]] = {}
    with HashRuntime(
        request["model"], device=request["device"], threads=request["threads"], batch_size=max(batch_sizes)
    ) as runtime:
        for place, (batch_size, count) in enumerate(request["runs"]):
            parts = []
            for start in range(0, count, batch_size):
                batch = pixels[start : min(start + batch_size, count)]
                parts.append(runtime.encode_pixels(batch))
                _send(out, {"advance": len(batch)})
            codes = HashCodes.concatenate(parts)
            for length in codes:
                arrays[f"{place}/code_{length}"] = codes[length]
                arrays[f"{place}/logits_{length}"] = codes.logits[length]
        engine = runtime.engine
        facts = {
            "name": engine.name,
            "version": engine.version,
            "device": engine.device,
            "threads": engine.threads,
        }
    described = [[name, str(array.dtype), list(array.shape)] for name, array in arrays.items()]
    _send(out, {"result": {"engine": facts, "arrays": described}})
    for array in arrays.values():
        out.write(np.ascontiguousarray(array).tobytes())
    out.flush()


def _read_pixels(source: BinaryIO, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    pixels = np.empty(shape, dtype=np.uint8)
    view, filled = pixels.data.cast("B"), 0
    while filled < len(view):
        count = source.readinto(view[filled:])  # type: ignore[attr-defined]
        if not count:
            raise EOFError(f"only {filled} of {len(view)} bytes of pixels came")
        filled += count
    return pixels


def _send(out: BinaryIO, message: dict[str, Any]) -> None:
    out.write(json.dumps(message).encode() + b"\n")
    out.flush()


if __name__ == "__main__":
    main()
