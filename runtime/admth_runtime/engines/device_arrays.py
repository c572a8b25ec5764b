"""Arrays on the GPU: inputs that other libraries own, taken without a copy, and outputs that stay there.

Inputs speak DLPack or ``__cuda_array_interface__`` (PyTorch, CuPy, JAX, Numba, pycuda). Where an object speaks both,
DLPack is taken, because it tells the producer which stream will read and so orders the two streams.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from admth_runtime.engines.cuda import CudaDevice
from admth_runtime.errors import CodeLengthError, InputError

__all__ = ["DeviceArray", "DeviceBlock", "DeviceCodes", "DeviceInput", "host_view", "import_array", "is_device_array"]

_DLPACK_CUDA = (2, 13)  # kDLCUDA and kDLCUDAManaged
_DLPACK_UINT8 = (1, 8, 1)  # type code kDLUInt, bits, lanes


@dataclass(frozen=True)
class DeviceInput:
    """Pixels on the GPU, uint8 ``[n, H, W, 3]``, that somebody else owns.

    Attributes:
        address: where they are.
        count: the number of images n.
        owner: what keeps them alive.
        producer: stream that still writes them, or None when the producer has seen to the order.
    """

    address: int
    count: int
    owner: Any
    producer: int | None


class DeviceBlock:
    """Device memory that is freed with the last array in it.

    Args:
        device: where it is; kept alive, and with it the CUDA context.
        size: bytes.
    """

    def __init__(self, device: CudaDevice, size: int) -> None:
        self.device = device
        self.address = device.allocate(size)
        self.free = weakref.finalize(self, _free, device, self.address, os.getpid())


@dataclass(frozen=True, eq=False)
class DeviceArray:
    """An array on the GPU, for ``torch.as_tensor(array, device="cuda")`` or ``cupy.asarray(array)``, without a copy.

    Its content is complete when it is returned, so a reader need not wait for any stream. The memory is freed with
    the last reference to it; a tensor made from it holds one.

    Attributes:
        shape: of the array.
        dtype: its type.
        address: where it is on the device.
        block: the memory that it lies in.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    address: int
    block: DeviceBlock

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Version 3 of the CUDA array interface."""
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address, False),
            "strides": None,
            "stream": None,
            "version": 3,
        }


class DeviceCodes(Mapping[int, DeviceArray]):
    """Codes of n images on the GPU, by code length: ``codes[64]`` is uint8 ``[n, 8]``, packed MSB first.

    Use it as a context manager, or call :meth:`close`, to free the memory before its last reference goes.

    Attributes:
        logits: float32 ``[n, L]`` by code length, before tanh.
    """

    def __init__(self, codes: Mapping[int, DeviceArray], logits: Mapping[int, DeviceArray]) -> None:
        self._codes = dict(codes)
        self.logits: Mapping[int, DeviceArray] = dict(logits)

    def __getitem__(self, length: int) -> DeviceArray:
        if length not in self._codes:
            there = ", ".join(str(known) for known in self._codes)
            raise CodeLengthError(f"code length {length!r} is not there: this model has {there}")
        return self._codes[length]

    def __iter__(self) -> Iterator[int]:
        return iter(self._codes)

    def __len__(self) -> int:
        return len(self._codes)

    def __repr__(self) -> str:
        return f"DeviceCodes(count={self.count}, code_lengths={self.code_lengths})"

    @property
    def code_lengths(self) -> tuple[int, ...]:
        """The code lengths in bits, increasing."""
        return tuple(self._codes)

    @property
    def count(self) -> int:
        """The number of images n."""
        return next(iter(self._codes.values())).shape[0]

    def close(self) -> None:
        """Free the memory now; no array or tensor made from these codes may be used any more."""
        for array in (*self._codes.values(), *self.logits.values()):
            array.block.free()

    def __enter__(self) -> DeviceCodes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def is_device_array(value: Any) -> bool:
    """Tell whether an object is an array on an NVIDIA GPU, by the protocols that it speaks."""
    if isinstance(value, np.ndarray):
        return False
    if hasattr(value, "__dlpack_device__") and hasattr(value, "__dlpack__"):
        return value.__dlpack_device__()[0] in _DLPACK_CUDA
    return hasattr(value, "__cuda_array_interface__")


def import_array(value: Any, shape: tuple[int, ...], device: CudaDevice, stream: int) -> DeviceInput:
    """Take pixels on the GPU without a copy.

    Args:
        value: speaks DLPack or the CUDA array interface.
        shape: of one image, ``(H, W, 3)``.
        device: where they must be.
        stream: the stream that will read them.

    Raises:
        InputError: another dtype, shape, layout or GPU, or no image.
    """
    if hasattr(value, "__dlpack_device__"):
        return _import_dlpack(value, shape, device, stream)
    return _import_interface(value, shape)


def _import_interface(value: Any, shape: tuple[int, ...]) -> DeviceInput:
    facts: Mapping[str, Any] = value.__cuda_array_interface__
    found = tuple(facts["shape"])
    _check(np.dtype(facts["typestr"]).name, found, shape)
    _check_strides(found, facts.get("strides"), facts.get("mask"))
    stream = facts.get("stream")
    return DeviceInput(int(facts["data"][0]), found[0], value, None if stream is None else int(stream))


def _import_dlpack(value: Any, shape: tuple[int, ...], device: CudaDevice, stream: int) -> DeviceInput:
    kind, index = value.__dlpack_device__()
    if kind not in _DLPACK_CUDA:
        raise InputError("the pixels are not on an NVIDIA GPU: pass a NumPy array for pixels in the computer's memory")
    if index != device.index:
        raise InputError(f"the pixels are on cuda:{index} and the engine on cuda:{device.index}: move them there")
    try:
        capsule = value.__dlpack__(stream=stream)
    except (BufferError, RuntimeError, TypeError) as error:
        reason = str(error).strip().splitlines()
        raise InputError(
            f"the pixels cannot be shared ({reason[0] if reason else type(error).__name__}): detach and copy them first"
        ) from error
    tensor = _tensor_of(capsule)
    dtype = (tensor.code, tensor.bits, tensor.lanes)
    found = tuple(tensor.shape[axis] for axis in range(tensor.ndim))
    name = "uint8" if dtype == _DLPACK_UINT8 else f"of DLPack type {dtype}"
    _check(name, found, shape)
    strides = tuple(tensor.strides[axis] for axis in range(tensor.ndim)) if tensor.strides else None
    _check_strides(found, strides)
    # The capsule is left unconsumed: its own destructor gives the memory back, so holding it is enough.
    return DeviceInput((tensor.data or 0) + tensor.byte_offset, found[0], (value, capsule), None)


class _DLTensor(ctypes.Structure):
    """``DLTensor`` of dlpack.h, with device and dtype spelled out; it is the start of a ``DLManagedTensor``."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


def _tensor_of(capsule: Any) -> _DLTensor:
    pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    try:
        address = pointer_of(capsule, b"dltensor")
    except ValueError as error:
        raise InputError(f"the pixels' DLPack capsule cannot be read ({error}): pass a fresh array") from error
    return _DLTensor.from_address(address)


def _check(dtype: str, found: tuple[int, ...], shape: tuple[int, ...]) -> None:
    if dtype != "uint8" or found[1:] != shape:
        raise InputError(
            f"pixels are {dtype} {list(found)}, not a uint8 array [n, {', '.join(map(str, shape))}]: "
            "preprocess the images first"
        )
    if not found[0]:
        raise InputError("no images were given: pass at least one")


def _check_strides(shape: tuple[int, ...], strides: Any, mask: Any = None) -> None:
    """Accept C-contiguous arrays; an axis of one element may have any stride. A byte is an element here."""
    expected = [int(np.prod(shape[axis + 1 :])) for axis in range(len(shape))]
    fits = strides is None or all(
        size == 1 or stride == wanted for size, stride, wanted in zip(shape, strides, expected, strict=True)
    )
    if mask is not None or not fits:
        raise InputError("the pixels are not C-contiguous: pass  pixels.contiguous()  or its like")


def _free(device: CudaDevice, address: int, process: int) -> None:
    if os.getpid() == process:  # a forked child has no CUDA
        with device.active():
            device.free(address)


def host_view(memory: NDArray[np.uint8], shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """View the start of page-locked memory as an array."""
    size = int(np.prod(shape)) * dtype.itemsize
    return memory[:size].view(dtype).reshape(shape)
