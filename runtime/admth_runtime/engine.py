"""Inference engines behind one protocol: today ONNX Runtime on CPU or CUDA.

An engine takes the deployed graph's input and returns all its outputs; everything above it is the same for every
engine. Engines are imported when one is opened, since importing them is most of a cold start.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from admth_runtime.allocator import return_freed_memory
from admth_runtime.cpu import usable_cores
from admth_runtime.errors import DeviceError, InputError, ModelError, require
from admth_runtime.manifest import INPUT_NAME

__all__ = ["DEVICES", "Engine", "OnnxRuntimeEngine", "open_engine"]

DEVICES = ("auto", "cpu", "cuda")

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_ERRORS_ONLY = 3

# "/src/model.cc:256 onnxruntime::Model::Model(onnx::ModelProto&&, ...) " before what an exception says
_SOURCE_LOCATION = re.compile(r"^\S+\.(?:cc|cpp|h):\d+ .*?\((?:[^()]|\([^()]*\))*\)(?: const)?(?: \[with .*?\])? ")

_log = logging.getLogger("admth_runtime")


class Engine(Protocol):
    """A loaded model on a device. ``run`` may be called from several threads at once."""

    @property
    def name(self) -> str:
        """The inference software, such as ``"onnxruntime"``."""

    @property
    def version(self) -> str:
        """Its version."""

    @property
    def device(self) -> str:
        """Where it runs: ``"cpu"`` or ``"cuda"``."""

    @property
    def threads(self) -> int:
        """Threads that one call uses on the CPU."""

    def run(self, images: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """Run C-contiguous uint8 ``[batch, H, W, 3]`` and return every output by name.

        Raises:
            DeviceError: the engine failed, for example for want of memory.
        """

    def close(self) -> None:
        """Free the model's memory once the calls under way have returned."""


class OnnxRuntimeEngine:
    """ONNX Runtime as an :class:`Engine`.

    Sequential execution, one inter-operator thread, and no spinning, so that waiting threads leave the processor to
    image decoding. Denormals are not flushed to zero: ONNX Runtime does that by changing the floating-point mode of
    the thread that creates the session, for good, and with it the arithmetic of the program around us.

    Args:
        path: an ONNX file that :func:`admth_runtime.onnx_file.read_onnx` has accepted.
        output_names: the outputs to return.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``. Only ``"auto"`` may fall back to the CPU, and logs it once.
        threads: CPU threads of one call, or None for one a usable physical core.

    Raises:
        InputError: the device's name is unknown, or ``threads`` is no positive integer.
        MissingExtraError: ONNX Runtime is not installed.
        DeviceError: the device cannot be had.
        ModelError: ONNX Runtime refuses the model.
    """

    name = "onnxruntime"

    def __init__(
        self, path: Path, output_names: tuple[str, ...], *, device: str = "auto", threads: int | None = None
    ) -> None:
        if device not in DEVICES:
            raise InputError(f"device {device!r} is unknown: use one of {', '.join(DEVICES)}")
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
            raise InputError(f"threads {threads!r} is not a positive integer: pass 1 or more, or None for every core")
        self._ort: Any = require("onnxruntime", extra="cpu", purpose="running a model")
        self.version: str = self._ort.__version__
        self.threads = threads or usable_cores()
        self._output_names = list(output_names)
        self._session, self.device = self._open(path, device)
        return_freed_memory()

    def run(self, images: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """Run a batch; see :meth:`Engine.run`."""
        session = self._session
        if session is None:
            raise InputError("this engine is closed: open the model again")
        try:
            outputs = session.run(self._output_names, {INPUT_NAME: images})
        except Exception as error:  # onnxruntime's errors share no base class but Exception
            raise DeviceError(
                f"onnxruntime {self.version} failed on a batch of {len(images)} ({_first_line(error)}): "
                "try a smaller batch size, or device='cpu'"
            ) from error
        return dict(zip(self._output_names, outputs, strict=True))

    def close(self) -> None:
        """Let the session go; a call under way in another thread still ends well."""
        self._session = None

    def _open(self, path: Path, device: str) -> tuple[Any, str]:
        available = self._ort.get_available_providers()
        if device != "cpu" and _PROVIDERS["cuda"] in available:
            try:
                return self._session_on(path, "cuda"), "cuda"
            except DeviceError as error:
                if device == "cuda":
                    raise
                _log.warning("%s; running on the CPU instead (pass device='cpu' to say so)", error)
        elif device == "cuda":
            raise DeviceError(
                f"device 'cuda' cannot be had: onnxruntime {self.version} has {', '.join(available)}; run  "
                "pip uninstall onnxruntime  and then  pip install 'admth[gpu]', or pass device='cpu'"
            )
        return self._session_on(path, "cpu"), "cpu"

    def _session_on(self, path: Path, device: str) -> Any:
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.execution_mode = self._ort.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = _ERRORS_ONLY
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        wanted = [_PROVIDERS[device]] if device == "cpu" else [_PROVIDERS[device], _PROVIDERS["cpu"]]
        try:
            session = self._ort.InferenceSession(str(path), options, providers=wanted, enable_fallback=0)
        except Exception as error:  # see run
            reason = _first_line(error)
            if device == "cuda" and "CUDA" in str(error):
                raise DeviceError(f"device 'cuda' cannot be had: {reason}") from error
            raise ModelError(
                f"{path}: onnxruntime {self.version} refuses the model ({reason}): export it again, "
                "or run  pip install -U onnxruntime  when it is newer than this engine"
            ) from error
        # A provider that fails to start is left out with no more than a printed warning.
        if _PROVIDERS[device] not in session.get_providers():
            raise DeviceError(
                f"device {device!r} cannot be had: onnxruntime {self.version} started only "
                f"{', '.join(session.get_providers())}; run  admth-run doctor"
            )
        return session


def open_engine(
    path: str | Path, output_names: tuple[str, ...], *, device: str = "auto", threads: int | None = None
) -> Engine:
    """Open a checked model with the engine that its file needs.

    Raises:
        AdmthError: as the engine's class says.
    """
    return OnnxRuntimeEngine(Path(path), output_names, device=device, threads=threads)


def _first_line(error: Exception) -> str:
    """Return the message of an onnxruntime error without its code, the model's path, and source locations."""
    text = str(error).strip().splitlines()
    line = text[0] if text else type(error).__name__
    if line.startswith("[ONNXRuntimeError]"):
        line = line.split(" : ", 3)[-1]
    line = re.sub(r"^Load model from .* failed:", "", line)
    return _SOURCE_LOCATION.sub("", line).strip()[:300]
