"""One way through an engine: an execution context with a stream and buffers of its own, for one call at a time.

An execution context must not be shared between threads, and memory is best allocated once. So every lane has its
context, its stream, device buffers and page-locked host buffers, all at the size of the engine's largest batch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from admth_runtime.engines.cuda import CudaDevice
from admth_runtime.engines.device_arrays import DeviceInput, host_view
from admth_runtime.engines.trt_logger import TensorRTMessages
from admth_runtime.errors import DeviceError
from admth_runtime.sidecar import BatchProfile

__all__ = ["Lane", "LaneSpec", "TensorSpec"]

_ALIGNMENT = 256  # bytes; TensorRT requires it of every tensor's address

_log = logging.getLogger("admth_runtime")


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of an engine.

    Attributes:
        name: the tensor's name.
        dtype: its type.
        shape: of one image.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def bytes_of(self, count: int) -> int:
        """Bytes of ``count`` images."""
        return count * int(np.prod(self.shape)) * self.dtype.itemsize


@dataclass(frozen=True)
class LaneSpec:
    """What all lanes of an engine have in common.

    Attributes:
        input: the pixels.
        outputs: the codes and logits.
        profiles: batch sizes of the engine's optimisation profiles, by their number.
        graphs: capture a CUDA graph of a batch that comes again.
        label: what messages call the engine.
    """

    input: TensorSpec
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[BatchProfile, ...]
    graphs: bool
    label: str

    @property
    def max_batch(self) -> int:
        """The largest batch of any profile."""
        return max(profile.maximum for profile in self.profiles)

    def place(self, count: int) -> tuple[int, int]:
        """Return the profile that takes ``count`` images, and the batch size to run them in.

        The tightest profile that holds them is taken. Where each begins above ``count``, the batch is padded to the
        smallest size that one takes.
        """
        fitting = [
            (profile.maximum, number)
            for number, profile in enumerate(self.profiles)
            if profile.minimum <= count <= profile.maximum
        ]
        if fitting:
            return min(fitting)[1], count
        padded, number = min(
            (profile.minimum, number) for number, profile in enumerate(self.profiles) if profile.minimum > count
        )
        return number, padded


class Lane:
    """See the module. Made, used and released while the device is active.

    Args:
        device: the GPU.
        context: the execution context; this lane becomes its only user.
        spec: what all lanes have in common.
        messages: where TensorRT's errors are collected.

    Raises:
        DeviceError: memory cannot be had, or TensorRT refuses.
    """

    def __init__(self, device: CudaDevice, context: Any, spec: LaneSpec, messages: TensorRTMessages) -> None:
        self._device, self._context, self._spec, self._messages = device, context, spec, messages
        del context  # the traceback of an error below must not keep it beyond its CUDA context
        self._profile = -1
        self._batch = 0
        self._addresses: dict[str, int] = {}
        # A graph is right only while the context stays as it was captured, so there is one, of the last batch.
        self._graph: Any = None
        self._graphs = spec.graphs and device.captures_graphs
        self._repeats = 0
        self._on_device: dict[str, int] = {}
        self._pinned: dict[str, NDArray[np.uint8]] = {}
        self.stream = 0
        try:
            self.stream = device.create_stream()
            for tensor in (spec.input, *spec.outputs):
                size = tensor.bytes_of(spec.max_batch)
                self._on_device[tensor.name] = device.allocate(size)
                self._pinned[tensor.name] = device.allocate_pinned(size)
        except BaseException:
            self.release_context()
            self.release_memory()
            raise

    def run(self, images: NDArray[np.uint8] | DeviceInput) -> dict[str, NDArray[Any]]:
        """Run pixels from anywhere, and return arrays of their own in the computer's memory."""
        with self._settled():
            count = self._start(images)
            for tensor in self._spec.outputs:
                memory = self._pinned[tensor.name][: tensor.bytes_of(count)]
                self._device.copy_to_host(memory, self._on_device[tensor.name], self.stream)
        return {
            tensor.name: host_view(self._pinned[tensor.name], (count, *tensor.shape), tensor.dtype).copy()
            for tensor in self._spec.outputs
        }

    def run_to_device(self, images: NDArray[np.uint8] | DeviceInput, target: Mapping[str, int]) -> None:
        """Run pixels from anywhere, and leave each output at its address in ``target`` on the device."""
        with self._settled():
            count = self._start(images)
            for tensor in self._spec.outputs:
                size = tensor.bytes_of(count)
                self._device.copy_on_device(target[tensor.name], self._on_device[tensor.name], size, self.stream)

    def release_context(self) -> None:
        """Free the graph and the execution context, which must go before the engine."""
        self._drop_graph()
        self._context = None

    def release_memory(self) -> None:
        """Free the buffers, then the stream."""
        for address in self._on_device.values():
            self._device.free(address)
        for memory in self._pinned.values():
            self._device.free_pinned(memory)
        self._on_device, self._pinned = {}, {}
        if self.stream:
            self._device.destroy_stream(self.stream)

    @contextmanager
    def _settled(self) -> Iterator[None]:
        """Wait for the stream at the end of a call, and of one that fails too: it may still read or write buffers."""
        try:
            yield
        except BaseException:
            with suppress(DeviceError):
                self._device.synchronize(self.stream)
            raise
        self._device.synchronize(self.stream)

    def _start(self, images: NDArray[np.uint8] | DeviceInput) -> int:
        """Queue input and engine, and return the number of images."""
        if isinstance(images, DeviceInput):
            self._enqueue(*self._adopt(images))
            return images.count
        self._enqueue(*self._upload(images))
        return len(images)

    def _upload(self, images: NDArray[np.uint8]) -> tuple[int, int, int]:
        """Queue the copy of pixels to the lane's own buffer; return profile, batch and address."""
        tensor, count = self._spec.input, len(images)
        profile, batch = self._spec.place(count)
        memory = self._pinned[tensor.name]
        view = host_view(memory, (batch, *tensor.shape), tensor.dtype)
        view[:count] = images
        view[count:] = images[-1]  # padding must be images too: what an earlier call left is not ours to run
        address = self._on_device[tensor.name]
        self._device.copy_to_device(address, memory[: tensor.bytes_of(batch)], self.stream)
        return profile, batch, address

    def _adopt(self, images: DeviceInput) -> tuple[int, int, int]:
        """Use pixels where they are, or copy them on the device where TensorRT could not; see :meth:`_upload`."""
        if images.producer is not None:
            self._device.wait_for(self.stream, images.producer)
        profile, batch = self._spec.place(images.count)
        if batch == images.count and images.address % _ALIGNMENT == 0:
            return profile, batch, images.address
        tensor = self._spec.input
        address, size = self._on_device[tensor.name], tensor.bytes_of(1)
        self._device.copy_on_device(address, images.address, images.count * size, self.stream)
        for row in range(images.count, batch):
            self._device.copy_on_device(address + row * size, images.address, size, self.stream)
        return profile, batch, address

    def _enqueue(self, profile: int, batch: int, address: int) -> None:
        """Queue the engine, as a graph from the second time on that nothing has changed."""
        changed = self._configure(profile, batch, address)
        self._repeats = 0 if changed else self._repeats + 1
        if self._graph is not None:
            self._device.launch(self._graph, self.stream)
        elif self._graphs and self._repeats == 1:
            self._capture()
        else:
            self._execute()

    def _capture(self) -> None:
        """Capture the engine and launch it; where it cannot be captured, run it plainly from now on."""
        self._device.synchronize(self.stream)  # so that the copy of the input stays outside
        graph = None
        try:
            self._device.begin_capture(self.stream)
            try:
                self._execute()
            finally:
                graph = self._device.end_capture(self.stream)
        except DeviceError as error:
            if graph is not None:
                self._device.destroy_graph(graph)
            self._graphs = False
            reason = str(error)  # a log record that held the error would hold all that its traceback holds
            _log.warning("%s: CUDA graphs are off for it, since it cannot be captured (%s)", self._spec.label, reason)
            self._execute()
            return
        self._graph = graph
        self._device.launch(graph, self.stream)

    def _execute(self) -> None:
        self._messages.clear()
        if not self._context.execute_async_v3(self.stream):
            raise DeviceError(
                f"{self._spec.label} failed on a batch of {self._batch} ({self._messages.reason()}): free GPU memory, "
                "or run  admth-run doctor"
            )

    def _configure(self, profile: int, batch: int, address: int) -> bool:
        """Set profile, shape and addresses where they differ from the last call; return whether any did."""
        context, name = self._context, self._spec.input.name
        wanted = {**self._on_device, name: address}
        if (profile, batch, wanted) == (self._profile, self._batch, self._addresses):
            return False
        self._drop_graph()
        self._messages.clear()
        done = True
        if profile != self._profile:
            self._batch, self._profile = 0, -1
            done = bool(context.set_optimization_profile_async(profile, self.stream))
            self._device.synchronize(self.stream)
        if done and batch != self._batch:
            done = bool(context.set_input_shape(name, (batch, *self._spec.input.shape)))
        for tensor, place in wanted.items():
            if done and self._addresses.get(tensor) != place:
                done = bool(context.set_tensor_address(tensor, place))
        if not done:
            self._profile, self._batch, self._addresses = -1, 0, {}
            raise DeviceError(
                f"{self._spec.label} refuses a batch of {batch} ({self._messages.reason()}): build it again with  "
                "admth-export trt"
            )
        self._profile, self._batch, self._addresses = profile, batch, wanted
        return True

    def _drop_graph(self) -> None:
        graph, self._graph = self._graph, None
        if graph is not None:
            self._device.destroy_graph(graph)
