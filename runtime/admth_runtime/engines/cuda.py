"""The few things that an engine needs of CUDA, behind one protocol, and how a device is opened.

Two implementations behave alike: :mod:`admth_runtime.engines.cuda_bindings` on the device's primary context, which
PyTorch, CuPy and ONNX Runtime share; and :mod:`admth_runtime.engines.cuda_pycuda` in the context that an application
made with pycuda. Addresses and streams are plain integers here, which is what TensorRT takes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from admth_runtime.driver import CudaFacts, ask_driver
from admth_runtime.errors import DeviceError

__all__ = ["CudaDevice", "check_driver", "open_cuda"]


class CudaDevice(Protocol):
    """A GPU in a CUDA context. Every method but :meth:`active` is called while the context is active.

    Every method raises :class:`~admth_runtime.errors.DeviceError` when CUDA reports an error.
    """

    @property
    def layer(self) -> str:
        """``"bindings"`` or ``"pycuda"``."""

    @property
    def index(self) -> int:
        """Which GPU it is, from 0, in CUDA's order."""

    @property
    def compute_capability(self) -> str:
        """Such as ``"sm89"``."""

    @property
    def captures_graphs(self) -> bool:
        """Whether :meth:`capture` is there; pycuda has no CUDA graphs."""

    def active(self) -> AbstractContextManager[None]:
        """Make the context current in this thread, and what was current before current again at the end."""

    def allocate(self, size: int) -> int:
        """Allocate device memory of ``size`` bytes and return its address, aligned to 256 bytes."""

    def free(self, address: int) -> None:
        """Free device memory."""

    def allocate_pinned(self, size: int) -> NDArray[np.uint8]:
        """Allocate page-locked host memory, uint8 ``[size]``."""

    def free_pinned(self, memory: NDArray[np.uint8]) -> None:
        """Free page-locked host memory; no view of it may be used any more."""

    def create_stream(self) -> int:
        """Create a stream that does not wait for the default stream, and return its handle."""

    def destroy_stream(self, stream: int) -> None:
        """Destroy a stream."""

    def synchronize(self, stream: int) -> None:
        """Wait, without the interpreter's lock, until all work on the stream is done."""

    def wait_for(self, stream: int, producer: int) -> None:
        """Let ``stream`` wait for all that another library has queued on the stream ``producer`` up to now."""

    def copy_to_device(self, address: int, memory: NDArray[np.uint8], stream: int) -> None:
        """Queue a copy of page-locked memory to the device."""

    def copy_to_host(self, memory: NDArray[np.uint8], address: int, stream: int) -> None:
        """Queue a copy from the device that fills page-locked memory."""

    def copy_on_device(self, target: int, source: int, size: int, stream: int) -> None:
        """Queue a copy of ``size`` bytes on the device."""

    def begin_capture(self, stream: int) -> None:
        """Record the work that this thread queues on the stream from now on, instead of doing it."""

    def end_capture(self, stream: int) -> Any:
        """Return what was recorded, as a graph that can be launched."""

    def launch(self, graph: Any, stream: int) -> None:
        """Queue a graph."""

    def destroy_graph(self, graph: Any) -> None:
        """Free a graph."""


def check_driver(*, cuda_major: int = 0, needed_by: str = "this model") -> CudaFacts:
    """Make sure that there is a driver, new enough, that sees a GPU; nothing but the driver is touched.

    Args:
        cuda_major: the major CUDA version that the software needs, or 0 when that is unknown.
        needed_by: that software, for the message.

    Raises:
        DeviceError: it is missing, does not start, sees no GPU, or is too old.
    """
    facts = ask_driver()
    if facts.problem is not None:
        raise DeviceError(
            f"{needed_by} needs an NVIDIA GPU: {facts.problem}; install or repair the driver and check it with  "
            "nvidia-smi , or run an ONNX model with device='cpu'"
        )
    if facts.version_major < cuda_major:
        raise DeviceError(
            f"the NVIDIA driver supports CUDA {facts.version} and {needed_by} needs CUDA {cuda_major}: update the "
            f"driver, or install the -cu{facts.version_major} build of that package"
        )
    return facts


def open_cuda(layer: str, index: int) -> CudaDevice:
    """Open a GPU.

    Args:
        layer: ``"bindings"`` or ``"pycuda"``.
        index: which GPU, from 0; with pycuda it is the context's own.

    Raises:
        InputError: there is no such GPU.
        MissingExtraError: the package is not installed.
        DeviceError: CUDA reports an error, or no pycuda context is current.
    """
    if layer == "pycuda":
        from admth_runtime.engines.cuda_pycuda import PycudaDevice

        return PycudaDevice(index)
    from admth_runtime.engines.cuda_bindings import BindingsDevice

    return BindingsDevice(index)
