"""CUDA through NVIDIA's ``cuda.bindings``, on the device's primary context.

The driver API is used throughout: a context that is pushed for a call and popped after it leaves the caller's own
context, PyTorch's or anybody's, exactly as it was, which ``cudaSetDevice`` would not.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from admth_runtime.errors import DeviceError, InputError, require

__all__ = ["BindingsDevice"]

_OUT_OF_MEMORY = 2


class BindingsDevice:
    """A GPU's primary context, as a :class:`~admth_runtime.engines.cuda.CudaDevice`.

    The primary context is retained as long as this object lives, which is as long as an engine or an array on the
    device needs it.

    Args:
        index: which GPU, from 0, in CUDA's order.

    Raises:
        MissingExtraError: cuda-bindings is not installed.
        InputError: there is no such GPU.
        DeviceError: CUDA reports an error.
    """

    layer = "bindings"
    captures_graphs = True

    def __init__(self, index: int) -> None:
        self._cuda: Any = require("cuda.bindings.driver", extra="tensorrt", purpose="running a TensorRT engine")
        self._do("cuInit", 0)
        count = self._do("cuDeviceGetCount")
        if not 0 <= index < count:
            raise InputError(f"device 'cuda:{index}' does not exist: this machine has {count} GPU{'s' * (count != 1)}")
        self.index = index
        device = self._do("cuDeviceGet", index)
        attribute = self._cuda.CUdevice_attribute
        major = self._do("cuDeviceGetAttribute", attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)
        minor = self._do("cuDeviceGetAttribute", attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device)
        self.compute_capability = f"sm{major}{minor}"
        self._context = self._do("cuDevicePrimaryCtxRetain", device)
        self._release = weakref.finalize(self, _release_primary, self._cuda, device, os.getpid())

    @contextmanager
    def active(self) -> Iterator[None]:
        """Push the primary context, and pop it at the end."""
        self._do("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            self._do("cuCtxPopCurrent")

    def allocate(self, size: int) -> int:
        """See :meth:`CudaDevice.allocate`."""
        return int(self._do("cuMemAlloc", size))

    def free(self, address: int) -> None:
        """See :meth:`CudaDevice.free`."""
        self._do("cuMemFree", address)

    def allocate_pinned(self, size: int) -> NDArray[np.uint8]:
        """See :meth:`CudaDevice.allocate_pinned`."""
        address = int(self._do("cuMemHostAlloc", size, 0))
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def free_pinned(self, memory: NDArray[np.uint8]) -> None:
        """See :meth:`CudaDevice.free_pinned`."""
        self._do("cuMemFreeHost", memory.ctypes.data)

    def create_stream(self) -> int:
        """See :meth:`CudaDevice.create_stream`."""
        return int(self._do("cuStreamCreate", int(self._cuda.CUstream_flags.CU_STREAM_NON_BLOCKING)))

    def destroy_stream(self, stream: int) -> None:
        """See :meth:`CudaDevice.destroy_stream`."""
        self._do("cuStreamDestroy", stream)

    def synchronize(self, stream: int) -> None:
        """See :meth:`CudaDevice.synchronize`."""
        self._do("cuStreamSynchronize", stream)

    def wait_for(self, stream: int, producer: int) -> None:
        """See :meth:`CudaDevice.wait_for`."""
        event = self._do("cuEventCreate", int(self._cuda.CUevent_flags.CU_EVENT_DISABLE_TIMING))
        try:
            self._do("cuEventRecord", event, producer)
            self._do("cuStreamWaitEvent", stream, event, 0)
        finally:
            self._do("cuEventDestroy", event)  # CUDA frees it once the work that waits for it is done

    def copy_to_device(self, address: int, memory: NDArray[np.uint8], stream: int) -> None:
        """See :meth:`CudaDevice.copy_to_device`."""
        self._do("cuMemcpyHtoDAsync", address, memory.ctypes.data, memory.nbytes, stream)

    def copy_to_host(self, memory: NDArray[np.uint8], address: int, stream: int) -> None:
        """See :meth:`CudaDevice.copy_to_host`."""
        self._do("cuMemcpyDtoHAsync", memory.ctypes.data, address, memory.nbytes, stream)

    def copy_on_device(self, target: int, source: int, size: int, stream: int) -> None:
        """See :meth:`CudaDevice.copy_on_device`."""
        self._do("cuMemcpyDtoDAsync", target, source, size, stream)

    def begin_capture(self, stream: int) -> None:
        """See :meth:`CudaDevice.begin_capture`; what other threads do meanwhile does not disturb it."""
        mode = self._cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._do("cuStreamBeginCapture", stream, mode)

    def end_capture(self, stream: int) -> Any:
        """See :meth:`CudaDevice.end_capture`."""
        graph = self._do("cuStreamEndCapture", stream)
        try:
            return self._do("cuGraphInstantiate", graph, 0)
        finally:
            self._do("cuGraphDestroy", graph)

    def launch(self, graph: Any, stream: int) -> None:
        """See :meth:`CudaDevice.launch`."""
        self._do("cuGraphLaunch", graph, stream)

    def destroy_graph(self, graph: Any) -> None:
        """See :meth:`CudaDevice.destroy_graph`."""
        self._do("cuGraphExecDestroy", graph)

    def _do(self, function: str, *arguments: Any) -> Any:
        """Call a function of the driver API and return what it gives beside the error code."""
        code, *values = getattr(self._cuda, function)(*arguments)
        if int(code):
            raise _error(self._cuda, function, code)
        return values[0] if values else None


def _error(cuda: Any, function: str, code: Any) -> DeviceError:
    if int(code) == _OUT_OF_MEMORY:
        return DeviceError(
            f"the GPU has no memory left ({function}): free some, pass a smaller concurrency, or build the engine "
            "with a smaller maximum with  admth-export trt --batch MIN OPT MAX"
        )
    name = getattr(code, "name", code)
    return DeviceError(f"CUDA failed in {function} with {name}: run  admth-run doctor")


def _release_primary(cuda: Any, device: Any, process: int) -> None:
    if os.getpid() == process:  # a forked child has no CUDA, and must not release what its parent uses
        cuda.cuDevicePrimaryCtxRelease(device)
