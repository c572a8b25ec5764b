"""A GPU made of the computer's memory, behind the functions of cuda.bindings.driver and of pycuda.driver.

Addresses are real addresses of host memory, so a copy to a wrong one is caught or crashes. Streams are lazy: nothing
that is queued happens before somebody waits for it, so a wait that is forgotten gives wrong results. What CUDA calls
undefined is collected in ``Machine.violations``, and what is allocated and freed is counted.
"""

from __future__ import annotations

import ctypes
import enum
import threading
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace

import numpy as np

ALIGNMENT = 256


class CUresult(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_INVALID_DEVICE = 101
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900


class CUdevice_attribute(enum.IntEnum):
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76


class CUstream_flags(enum.IntEnum):
    CU_STREAM_DEFAULT = 0
    CU_STREAM_NON_BLOCKING = 1


class CUevent_flags(enum.IntEnum):
    CU_EVENT_DISABLE_TIMING = 2


class CUstreamCaptureMode(enum.IntEnum):
    CU_STREAM_CAPTURE_MODE_GLOBAL = 0
    CU_STREAM_CAPTURE_MODE_THREAD_LOCAL = 1


class CudaFault(Exception):
    def __init__(self, code: CUresult) -> None:
        self.code = code


@dataclass
class Stream:
    handle: int
    queue: list = field(default_factory=list)
    recording: list | None = None
    lock: threading.RLock = field(default_factory=threading.RLock)

    def put(self, operation) -> None:
        (self.queue if self.recording is None else self.recording).append(operation)

    def drain(self, until=None) -> None:
        with self.lock:
            while self.queue:
                operation = self.queue.pop(0)
                operation()
                if operation is until:
                    return


@dataclass
class Machine:
    """The state of the GPUs of one test."""

    gpus: list = field(default_factory=lambda: [("Double L4", 8, 9)])
    driver_version: int = 13000
    start_code: int = 0
    memory: int = 1 << 30
    allocations: dict = field(default_factory=dict)  # address: (size, keeper)
    pinned: dict = field(default_factory=dict)
    streams: dict = field(default_factory=dict)
    graphs: dict = field(default_factory=dict)
    events: dict = field(default_factory=dict)
    log: list = field(default_factory=list)  # what was freed, in order
    violations: list = field(default_factory=list)
    calls: dict = field(default_factory=dict)
    primary: int = 0  # how often the primary context is retained
    handles: int = 100
    fail: dict = field(default_factory=dict)  # function: result that its next call gives
    local: threading.local = field(default_factory=threading.local)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def contexts(self) -> list:
        if not hasattr(self.local, "contexts"):
            self.local.contexts = []
        return self.local.contexts

    def need_context(self, kind: str | None = None) -> None:
        current = self.contexts()
        if not current or (kind is not None and not str(current[-1]).startswith(kind)):
            self.violations.append(f"context is {current[-1:]} in a call that needs {kind or 'one'}")
            raise CudaFault(CUresult.CUDA_ERROR_INVALID_CONTEXT)

    def handle(self) -> int:
        with self.lock:
            self.handles += 1
            return self.handles

    def allocate(self, size: int, table: dict) -> int:
        used = sum(kept for kept, _ in self.allocations.values())
        if size <= 0:
            raise CudaFault(CUresult.CUDA_ERROR_INVALID_VALUE)
        if table is self.allocations and used + size > self.memory:
            raise CudaFault(CUresult.CUDA_ERROR_OUT_OF_MEMORY)
        keeper = ctypes.create_string_buffer(b"\xa5" * (size + ALIGNMENT), size + ALIGNMENT)
        address = -(-ctypes.addressof(keeper) // ALIGNMENT) * ALIGNMENT
        table[address] = (size, keeper)
        return address

    def free(self, address: int, table: dict, what: str) -> None:
        if address not in table:
            self.violations.append(f"{what} of {address}, which is not allocated")
            raise CudaFault(CUresult.CUDA_ERROR_INVALID_VALUE)
        if any(stream.queue for stream in self.streams.values() if stream.handle > 2):
            self.violations.append(f"{what} while work is queued")
        del table[address]
        self.log.append(what)

    def check_range(self, address: int, size: int, table: dict) -> None:
        for start, (length, _) in table.items():
            if start <= address and address + size <= start + length:
                return
        self.violations.append(f"{size} bytes at {address} are not allocated")
        raise CudaFault(CUresult.CUDA_ERROR_ILLEGAL_ADDRESS)

    def stream(self, handle) -> Stream:
        handle = int(handle)
        if handle in (1, 2) and handle not in self.streams:  # the default streams are always there
            self.streams[handle] = Stream(handle)
        if handle not in self.streams:
            raise CudaFault(CUresult.CUDA_ERROR_INVALID_VALUE)
        return self.streams[handle]

    def copy(self, target: int, source: int, size: int, stream, to: dict, of: dict) -> None:
        self.check_range(target, size, to)
        self.check_range(source, size, of)

        def operation() -> None:
            self.check_range(target, size, to)
            self.check_range(source, size, of)
            ctypes.memmove(target, source, size)

        self.stream(stream).put(operation)

    def upload(self, array: np.ndarray, offset: int = 0) -> int:
        """Put an array into device memory, as another library would, and return its address."""
        address = self.allocate(array.nbytes + offset, self.allocations) + offset
        ctypes.memmove(address, np.ascontiguousarray(array).ctypes.data, array.nbytes)
        return address

    def download(self, address: int, shape, dtype) -> np.ndarray:
        array = np.empty(shape, dtype)
        self.check_range(address, array.nbytes, self.allocations)
        ctypes.memmove(array.ctypes.data, address, array.nbytes)
        return array

    def ctypes(self) -> SimpleNamespace:
        """Python's ctypes with the driver's library as the only one."""
        names = ("byref", "c_int", "create_string_buffer")
        return SimpleNamespace(CDLL=lambda library: self._library(), **{name: getattr(ctypes, name) for name in names})

    def _library(self) -> SimpleNamespace:

        def put(value):
            def fill(reference, *_):
                reference._obj.value = value
                return 0

            return fill

        def attribute(reference, key, device):
            reference._obj.value = self.gpus[device.value][key - 74]
            return 0

        def name(buffer, size, device):
            buffer.value = self.gpus[device.value][0].encode()
            return 0

        def device(reference, index):
            reference._obj.value = index
            return 0

        return SimpleNamespace(
            cuInit=lambda flags: self.start_code,
            cuDriverGetVersion=put(self.driver_version),
            cuDeviceGetCount=put(len(self.gpus)),
            cuDeviceGet=device,
            cuDeviceGetName=name,
            cuDeviceGetAttribute=attribute,
        )


def driver_module(machine: Machine) -> ModuleType:
    """``cuda.bindings.driver`` on that machine; parameters are named as there."""
    module = ModuleType("cuda.bindings.driver")
    for kind in (CUresult, CUdevice_attribute, CUstream_flags, CUevent_flags, CUstreamCaptureMode):
        setattr(module, kind.__name__, kind)

    def offer(function, results: int = 1):
        name = function.__name__

        def call(*arguments):
            machine.calls[name] = machine.calls.get(name, 0) + 1
            nothing = (None,) * results
            if name in machine.fail:
                return machine.fail.pop(name), *nothing
            try:
                with machine.lock:
                    value = function(*arguments)
            except CudaFault as fault:
                return fault.code, *nothing
            return (CUresult.CUDA_SUCCESS, value)[: 1 + results]

        call.__wrapped__ = function  # so that inspect.signature gives its parameters
        setattr(module, name, call)

    def cuInit(Flags):
        if not machine.gpus:
            raise CudaFault(CUresult.CUDA_ERROR_NO_DEVICE)

    def cuDeviceGetCount():
        return len(machine.gpus)

    def cuDeviceGet(ordinal):
        if not 0 <= ordinal < len(machine.gpus):
            raise CudaFault(CUresult.CUDA_ERROR_INVALID_DEVICE)
        return ordinal

    def cuDeviceGetAttribute(attrib, dev):
        return machine.gpus[dev][int(attrib) - 74]

    def cuDevicePrimaryCtxRetain(dev):
        machine.primary += 1
        return f"primary {dev}"

    def cuDevicePrimaryCtxRelease(dev):
        machine.primary -= 1
        if machine.primary == 0 and machine.allocations:
            machine.violations.append("the primary context goes with memory in it")
        machine.log.append("primary")

    def cuCtxPushCurrent(ctx):
        machine.contexts().append(ctx)

    def cuCtxPopCurrent():
        return machine.contexts().pop()

    def cuMemAlloc(bytesize):
        machine.need_context("primary")
        return machine.allocate(bytesize, machine.allocations)

    def cuMemFree(dptr):
        machine.need_context("primary")
        machine.free(int(dptr), machine.allocations, "device memory")

    def cuMemHostAlloc(bytesize, Flags):
        machine.need_context("primary")
        return machine.allocate(bytesize, machine.pinned)

    def cuMemFreeHost(p):
        machine.need_context("primary")
        machine.free(int(p), machine.pinned, "pinned memory")

    def cuStreamCreate(Flags):
        machine.need_context("primary")
        handle = machine.handle()
        machine.streams[handle] = Stream(handle)
        return handle

    def cuStreamDestroy(hStream):
        machine.stream(hStream)
        del machine.streams[int(hStream)]
        machine.log.append("stream")

    def cuStreamWaitEvent(hStream, hEvent, Flags):
        source, marker = machine.events[hEvent]
        machine.stream(hStream).put(lambda: source.drain(until=marker) if marker in source.queue else None)

    def cuEventCreate(Flags):
        handle = machine.handle()
        machine.events[handle] = None
        return handle

    def cuEventRecord(hEvent, hStream):
        def marker() -> None:
            pass

        source = machine.stream(hStream)
        source.put(marker)
        machine.events[hEvent] = (source, marker)

    def cuEventDestroy(hEvent):
        del machine.events[hEvent]

    def cuMemcpyHtoDAsync(dstDevice, srcHost, ByteCount, hStream):
        machine.need_context("primary")
        machine.copy(int(dstDevice), int(srcHost), ByteCount, hStream, machine.allocations, machine.pinned)

    def cuMemcpyDtoHAsync(dstHost, srcDevice, ByteCount, hStream):
        machine.need_context("primary")
        machine.copy(int(dstHost), int(srcDevice), ByteCount, hStream, machine.pinned, machine.allocations)

    def cuMemcpyDtoDAsync(dstDevice, srcDevice, ByteCount, hStream):
        machine.need_context("primary")
        machine.copy(int(dstDevice), int(srcDevice), ByteCount, hStream, machine.allocations, machine.allocations)

    def cuStreamBeginCapture(hStream, mode):
        stream = machine.stream(hStream)
        if stream.queue:
            machine.violations.append("a capture begins on a stream with work queued")
        stream.recording = []

    def cuStreamEndCapture(hStream):
        stream = machine.stream(hStream)
        recorded, stream.recording = stream.recording, None
        handle = machine.handle()
        machine.graphs[handle] = recorded
        return handle

    def cuGraphInstantiate(hGraph, flags):
        handle = machine.handle()
        machine.graphs[handle] = list(machine.graphs[hGraph])
        return handle

    def cuGraphDestroy(hGraph):
        del machine.graphs[hGraph]

    def cuGraphLaunch(hGraphExec, hStream):
        for operation in machine.graphs[hGraphExec]:
            machine.stream(hStream).put(operation)

    def cuGraphExecDestroy(hGraphExec):
        del machine.graphs[hGraphExec]
        machine.log.append("graph")

    nothing = {
        cuInit, cuDevicePrimaryCtxRelease, cuCtxPushCurrent, cuMemFree, cuMemFreeHost, cuStreamDestroy,
        cuStreamWaitEvent, cuEventRecord, cuEventDestroy, cuMemcpyHtoDAsync, cuMemcpyDtoHAsync, cuMemcpyDtoDAsync,
        cuStreamBeginCapture, cuGraphDestroy, cuGraphLaunch, cuGraphExecDestroy,
    }  # fmt: skip
    something = {
        cuDeviceGetCount, cuDeviceGet, cuDeviceGetAttribute, cuDevicePrimaryCtxRetain, cuCtxPopCurrent, cuMemAlloc,
        cuMemHostAlloc, cuStreamCreate, cuEventCreate, cuStreamEndCapture, cuGraphInstantiate,
    }  # fmt: skip
    for function in nothing:
        offer(function, results=0)
    for function in something:
        offer(function)

    def cuStreamSynchronize(hStream):
        """Outside the machine's lock, since draining runs models."""
        machine.calls["cuStreamSynchronize"] = machine.calls.get("cuStreamSynchronize", 0) + 1
        if "cuStreamSynchronize" in machine.fail:
            return (machine.fail.pop("cuStreamSynchronize"),)
        try:
            machine.stream(hStream).drain()
        except CudaFault as fault:
            return (fault.code,)
        return (CUresult.CUDA_SUCCESS,)

    module.cuStreamSynchronize = cuStreamSynchronize
    return module


def pycuda_module(machine: Machine) -> ModuleType:
    """The part of ``pycuda.driver`` that is used, on that machine."""
    module = ModuleType("pycuda.driver")

    class Error(Exception):
        pass

    class OutOfMemory(Error, MemoryError):
        pass

    def checked(function):
        def call(*arguments):
            try:
                return function(*arguments)
            except CudaFault as fault:
                kind = OutOfMemory if fault.code == CUresult.CUDA_ERROR_OUT_OF_MEMORY else Error
                raise kind(f"{function.__name__} failed: {fault.code.name}") from None

        return call

    class Device:
        def __init__(self, number):
            self.number = number

        def __eq__(self, other):
            return self.number == other.number

        def __hash__(self):
            return hash(self.number)

        @staticmethod
        def count():
            return len(machine.gpus)

        def compute_capability(self):
            return machine.gpus[self.number][1:]

        def make_context(self):
            context = Context(self)
            context.push()
            return context

    class Context:
        def __init__(self, device):
            self._device = device
            self._name = f"pycuda {device.number}"
            known[self._name] = self

        def push(self):
            machine.contexts().append(self._name)

        @staticmethod
        def pop():
            machine.contexts().pop()

        @staticmethod
        def get_current():
            return known.get(machine.contexts()[-1]) if machine.contexts() else None

        @staticmethod
        def get_device():
            return Context.get_current()._device

        @staticmethod
        def synchronize():
            machine.need_context("pycuda")
            for stream in list(machine.streams.values()):
                stream.drain()

    known: dict[str, Context] = {}

    class DeviceAllocation:
        def __init__(self, address):
            self._address = address

        def __int__(self):
            return self._address

        def free(self):
            machine.need_context("pycuda")
            machine.free(self._address, machine.allocations, "device memory")

    @checked
    def mem_alloc(size):
        machine.need_context("pycuda")
        return DeviceAllocation(machine.allocate(size, machine.allocations))

    class HostMemory(np.ndarray):
        """Stands for the allocation object at the base of a page-locked array."""

        def free(self):
            machine.need_context("pycuda")
            machine.free(self.ctypes.data, machine.pinned, "pinned memory")

    def pagelocked_empty(shape, dtype):
        machine.need_context("pycuda")
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        address = machine.allocate(size, machine.pinned)
        base = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address)).view(HostMemory)
        array = np.asarray(base).view(np.ndarray)
        return Held(array.view(dtype).reshape(shape), base)

    class Held(np.ndarray):
        """A NumPy array collapses chains of bases, so the double says what pycuda's array has as its base."""

        def __new__(cls, array, allocation):
            held = array.view(cls)
            held._allocation = allocation
            return held

        def __array_finalize__(self, source):
            self._allocation = getattr(source, "_allocation", None)

        @property
        def base(self):
            return self._allocation

    class PyStream:
        def __init__(self, flags=0):
            machine.need_context("pycuda")
            self.handle = machine.handle()
            machine.streams[self.handle] = Stream(self.handle)

        def synchronize(self):
            checked(machine.stream(self.handle).drain)()

        def __del__(self):
            machine.streams.pop(self.handle, None)
            machine.log.append("stream")

    @checked
    def memcpy_htod_async(dest, src, stream):
        machine.need_context("pycuda")
        machine.copy(dest, src.ctypes.data, src.nbytes, stream.handle, machine.allocations, machine.pinned)

    @checked
    def memcpy_dtoh_async(dest, src, stream):
        machine.need_context("pycuda")
        machine.copy(dest.ctypes.data, src, dest.nbytes, stream.handle, machine.pinned, machine.allocations)

    @checked
    def memcpy_dtod_async(dest, src, size, stream):
        machine.need_context("pycuda")
        machine.copy(dest, src, size, stream.handle, machine.allocations, machine.allocations)

    module.Error, module.MemoryError = Error, OutOfMemory
    module.Device, module.Context, module.Stream = Device, Context, PyStream
    module.mem_alloc, module.pagelocked_empty = mem_alloc, pagelocked_empty
    module.memcpy_htod_async, module.memcpy_dtoh_async = memcpy_htod_async, memcpy_dtoh_async
    module.memcpy_dtod_async = memcpy_dtod_async
    return module
