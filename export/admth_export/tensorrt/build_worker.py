"""The building process: TensorRT alone, so that a crash of it, or Ctrl-C, leaves nothing of it in ours.

In: one line of JSON, what :func:`request_line` gives. Out: lines of JSON with ``message`` (severity and text),
``phase`` (name, parent, steps), ``step`` (phase), ``finished`` (phase), then ``error`` (type and message) or
``result``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, BinaryIO

from admth_export.tensorrt.builder import Listener, build_engine
from admth_export.tensorrt.flavours import FLAVOURS
from admth_export.tensorrt.options import EngineOptions
from admth_runtime.errors import AdmthError, OutputError
from admth_runtime.sidecar import BatchProfile

__all__ = ["main", "request_line"]


def request_line(
    *,
    flavour: str,
    model: Path,
    engine: Path,
    cache: Path | None,
    shape: tuple[int, int, int],
    targets: tuple[str, ...],
    options: EngineOptions,
) -> bytes:
    """Return the request as JSON.

    Args:
        flavour: the flavour's name.
        model: the typed ONNX model.
        engine: where the engine is to be written.
        cache: where the updated timing cache is to be written, or None.
        shape: of one image, ``(H, W, 3)``.
        targets: compute capabilities.
        options: the rest.
    """
    fields = {
        "flavour": flavour,
        "model": str(model),
        "engine": str(engine),
        "cache": None if cache is None else str(cache),
        "shape": list(shape),
        "targets": list(targets),
        "batch": options.batch.to_dict(),
        "workspace_mib": options.workspace_mib,
        "optimization_level": options.optimization_level,
        "timing_cache": None if options.timing_cache is None else str(options.timing_cache),
        "version_compatible": options.version_compatible,
        "tf32": options.tf32,
    }
    return json.dumps(fields).encode() + b"\n"


def main() -> None:
    """Serve one request from standard input."""
    # TensorRT prints; what it prints must not land between the lines of the protocol.
    with os.fdopen(os.dup(1), "wb") as out:
        os.dup2(2, 1)
        request = json.loads(sys.stdin.buffer.readline())
        try:
            _send(out, {"result": _build(request, out)})
        except AdmthError as error:
            _send(out, {"error": {"type": type(error).__name__, "message": str(error)}})
        except OSError as error:
            message = f"cannot write {request['engine']}: {error.strerror or error}; choose another place with --out"
            _send(out, {"error": {"type": OutputError.__name__, "message": message}})
        # TensorRT's own threads and libraries are not waited for: all that matters is on the disk.
        out.flush()
        os._exit(0)


def _build(request: dict[str, Any], out: BinaryIO) -> dict[str, Any]:
    flavour = FLAVOURS[request["flavour"]]
    batch = request["batch"]
    options = EngineOptions(
        batch=BatchProfile(batch["min"], batch["opt"], batch["max"]),
        workspace_mib=request["workspace_mib"],
        optimization_level=request["optimization_level"],
        timing_cache=None if request["timing_cache"] is None else Path(request["timing_cache"]),
        version_compatible=request["version_compatible"],
        tf32=request["tf32"],
    )
    height, width, channels = request["shape"]
    listener = Listener(
        message=lambda severity, text: _send(out, {"message": [severity, text]}),
        phase_started=lambda name, parent, steps: _send(out, {"phase": [name, parent, steps]}),
        stepped=lambda name: _send(out, {"step": name}),
        phase_finished=lambda name: _send(out, {"finished": name}),
    )
    built = build_engine(
        flavour.load(),
        Path(request["model"]),
        (height, width, channels),
        options,
        request["targets"],
        listener,
        choose_targets=not flavour.needs_gpu,
    )
    Path(request["engine"]).write_bytes(built.plan)
    if request["cache"] is not None and built.timing_cache is not None:
        Path(request["cache"]).write_bytes(built.timing_cache)
    return {"seconds": built.seconds, "version": built.version}


def _send(out: BinaryIO, message: dict[str, Any]) -> None:
    # One write a line: TensorRT may log from several threads.
    out.write(json.dumps(message).encode() + b"\n")
    out.flush()


if __name__ == "__main__":
    main()
