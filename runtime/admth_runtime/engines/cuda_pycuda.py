"""CUDA through pycuda, in the context that the application made with it.

An application that lives in a pycuda context cannot use memory of the primary context, so the engine joins its
context: the one that is current when the engine is opened, made for example by ``import pycuda.autoinit``. It stays
the application's own, and must outlive the engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from admth_runtime.errors import DeviceError, InputError, require

__all__ = ["PycudaDevice"]

_MEND = "make one first, for example with  import pycuda.autoinit , or pass cuda='bindings'"


class PycudaDevice:
    """The current pycuda context, as a :class:`~admth_runtime.engines.cuda.CudaDevice`.

    Args:
        index: which GPU the caller asked for; it must be the context's.

    Raises:
        MissingExtraError: pycuda is not installed.
        InputError: the context is another GPU's.
        DeviceError: no pycuda context is current, or CUDA reports an error.
    """

    layer = "pycuda"
    captures_graphs = False

    def __init__(self, index: int) -> None:
        self._cuda: Any = require("pycuda.driver", extra="pycuda", purpose="cuda='pycuda'")
        with self._errors("looking for the current context"):
            context = self._cuda.Context.get_current()
        if context is None:
            raise DeviceError(f"cuda='pycuda' joins the current pycuda context and there is none: {_MEND}")
        self._context = context
        with self._errors("asking the device"):
            device = self._cuda.Context.get_device()
            major, minor = device.compute_capability()
            self.index = next(i for i in range(self._cuda.Device.count()) if self._cuda.Device(i) == device)
        if index != self.index:
            raise InputError(
                f"device 'cuda:{index}' is not the GPU of the current pycuda context, 'cuda:{self.index}': pass that"
            )
        self.compute_capability = f"sm{major}{minor}"
        # pycuda frees by object, and its callers here speak of addresses and handles.
        self._memory: dict[int, Any] = {}
        self._streams: dict[int, Any] = {}

    @contextmanager
    def active(self) -> Iterator[None]:
        """Push the application's context, and pop it at the end."""
        with self._errors("entering the context"):
            self._context.push()
        try:
            yield
        finally:
            with self._errors("leaving the context"):
                self._cuda.Context.pop()

    def allocate(self, size: int) -> int:
        """See :meth:`CudaDevice.allocate`."""
        with self._errors("allocating device memory"):
            memory = self._cuda.mem_alloc(size)
        self._memory[int(memory)] = memory
        return int(memory)

    def free(self, address: int) -> None:
        """See :meth:`CudaDevice.free`."""
        with self._errors("freeing device memory"):
            self._memory.pop(address).free()

    def allocate_pinned(self, size: int) -> NDArray[np.uint8]:
        """See :meth:`CudaDevice.allocate_pinned`."""
        with self._errors("allocating page-locked memory"):
            memory: NDArray[np.uint8] = self._cuda.pagelocked_empty(size, np.uint8)
        return memory

    def free_pinned(self, memory: NDArray[np.uint8]) -> None:
        """See :meth:`CudaDevice.free_pinned`."""
        allocation: Any = memory.base
        with self._errors("freeing page-locked memory"):
            allocation.free()

    def create_stream(self) -> int:
        """See :meth:`CudaDevice.create_stream`."""
        with self._errors("creating a stream"):
            stream = self._cuda.Stream(1)  # CU_STREAM_NON_BLOCKING
        self._streams[int(stream.handle)] = stream
        return int(stream.handle)

    def destroy_stream(self, stream: int) -> None:
        """See :meth:`CudaDevice.destroy_stream`; pycuda destroys a stream with its object."""
        del self._streams[stream]

    def synchronize(self, stream: int) -> None:
        """See :meth:`CudaDevice.synchronize`."""
        with self._errors("running the engine"):
            self._streams[stream].synchronize()

    def wait_for(self, stream: int, producer: int) -> None:
        """See :meth:`CudaDevice.wait_for`; pycuda cannot name a foreign stream, so this waits for the whole context."""
        with self._errors("waiting for the producer of the input"):
            self._cuda.Context.synchronize()

    def copy_to_device(self, address: int, memory: NDArray[np.uint8], stream: int) -> None:
        """See :meth:`CudaDevice.copy_to_device`."""
        with self._errors("copying to the device"):
            self._cuda.memcpy_htod_async(address, memory, self._streams[stream])

    def copy_to_host(self, memory: NDArray[np.uint8], address: int, stream: int) -> None:
        """See :meth:`CudaDevice.copy_to_host`."""
        with self._errors("copying from the device"):
            self._cuda.memcpy_dtoh_async(memory, address, self._streams[stream])

    def copy_on_device(self, target: int, source: int, size: int, stream: int) -> None:
        """See :meth:`CudaDevice.copy_on_device`."""
        with self._errors("copying on the device"):
            self._cuda.memcpy_dtod_async(target, source, size, self._streams[stream])

    def begin_capture(self, stream: int) -> None:
        """Refuse: pycuda has no CUDA graphs."""
        _no_graphs()

    def end_capture(self, stream: int) -> Any:
        """Refuse: pycuda has no CUDA graphs."""
        _no_graphs()

    def launch(self, graph: Any, stream: int) -> None:
        """Refuse: pycuda has no CUDA graphs."""
        _no_graphs()

    def destroy_graph(self, graph: Any) -> None:
        """Refuse: pycuda has no CUDA graphs."""
        _no_graphs()

    @contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        """Turn what pycuda raises into one of our errors."""
        try:
            yield
        except self._cuda.MemoryError as error:
            raise DeviceError(
                f"the GPU has no memory left ({doing}): free some, pass a smaller concurrency, or build the engine "
                "with a smaller maximum with  admth-export trt --batch MIN OPT MAX"
            ) from error
        except self._cuda.Error as error:
            reason = str(error).strip().splitlines()
            raise DeviceError(
                f"CUDA failed {doing} ({reason[0] if reason else error!r}): run  admth-run doctor"
            ) from error


def _no_graphs() -> NoReturn:
    raise DeviceError("pycuda has no CUDA graphs: pass cuda_graphs=False, or cuda='bindings'")
