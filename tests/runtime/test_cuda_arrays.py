"""DLPack from another library on the GPU: capsules are made here as dlpack.h describes them."""

from __future__ import annotations

import ctypes
import gc

import numpy as np
import pytest
from _cuda_double import Machine
from _tensorrt_double import assert_clean, install, save_engine
from _tiny_model import SIZE

from admth_runtime import HashRuntime, InputError
from admth_runtime.engine import is_on_gpu
from admth_runtime.engines.device_arrays import is_device_array


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )  # fmt: skip


_DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("manager_ctx", ctypes.c_void_p), ("deleter", _DELETER))


class DlpackArray:
    """An array on the double's GPU that speaks DLPack, and the CUDA array interface too, which must not be taken."""

    def __init__(self, machine, array, *, strides=None, offset=0, device=0, kind=2, error=None):
        self._machine, self._array, self._error = machine, array, error
        self._place, self._strides, self._offset = (kind, device), strides, offset
        self._start = machine.upload(array)
        machine.primary += 1
        self.streams, self.deleted = [], 0

    @property
    def __cuda_array_interface__(self):
        raise AssertionError("DLPack orders the streams, so it is to be taken")

    def __dlpack_device__(self):
        return self._place

    def __dlpack__(self, *, stream=None):
        if self._error is not None:
            raise BufferError(self._error)
        self.streams.append(stream)
        array, count = self._array, self._array.ndim
        shape = (ctypes.c_int64 * count)(*array.shape)
        strides = None if self._strides is None else (ctypes.c_int64 * count)(*self._strides)
        kind = {"u": 1, "f": 2}[array.dtype.kind]
        managed = _Managed()
        managed.tensor = _Tensor(
            self._start - self._offset, *self._place, count, kind, 8 * array.dtype.itemsize, 1,
            ctypes.cast(shape, ctypes.POINTER(ctypes.c_int64)),
            ctypes.cast(strides, ctypes.POINTER(ctypes.c_int64)) if strides is not None else None,
            self._offset,
        )  # fmt: skip

        def delete(_):
            self.deleted += 1

        managed.deleter = _DELETER(delete)
        self._keep = (managed, shape, strides)
        new = ctypes.pythonapi.PyCapsule_New
        destructor = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(lambda _: delete(None))
        self._destructor = destructor
        new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return new(ctypes.addressof(managed), b"dltensor", ctypes.cast(destructor, ctypes.c_void_p))

    def release(self):
        del self._machine.allocations[self._start]
        self._machine.primary -= 1


@pytest.fixture
def gpu(monkeypatch):
    machine = Machine()
    install(monkeypatch, machine, "tensorrt_rtx")
    yield machine
    assert_clean(machine)


@pytest.fixture
def runtime(gpu, tmp_path):
    with HashRuntime(save_engine(tmp_path), concurrency=1) as opened:
        yield opened


@pytest.mark.parametrize("offset", [0, 64])
@pytest.mark.parametrize("strided", [False, True])
def test_pixels_are_read_where_they_are(gpu, runtime, pixels, offset, strided):
    expected = runtime.encode(pixels)
    strides = (SIZE * SIZE * 3, SIZE * 3, 3, 1) if strided else None
    array = DlpackArray(gpu, pixels, strides=strides, offset=offset)
    uploads = gpu.calls["cuMemcpyHtoDAsync"]
    codes = runtime.encode(array)
    assert all(np.array_equal(codes[length], expected[length]) for length in codes)
    assert gpu.calls["cuMemcpyHtoDAsync"] == uploads
    (stream,) = array.streams
    assert stream in gpu.streams  # the producer was told who will read
    gc.collect()
    assert array.deleted == 1  # the memory was given back once
    array.release()


@pytest.mark.parametrize(
    ("array", "options", "message"),
    [
        (np.zeros((2, SIZE, SIZE, 3), np.float32), {}, r"of DLPack type \(2, 32, 1\)"),
        (np.zeros((2, SIZE, SIZE), np.uint8), {}, r"not a uint8 array \[n, 12, 12, 3\]"),
        (np.zeros((2, SIZE, SIZE, 3), np.uint8), {"strides": (432, 1, 12, 144)}, "not C-contiguous"),
        (np.zeros((2, SIZE, SIZE, 3), np.uint8), {"device": 1}, "are on cuda:1 and the engine on cuda:0"),
        (np.zeros((2, SIZE, SIZE, 3), np.uint8), {"error": "requires grad\nmore"}, r"\(requires grad\)"),
    ],
)
def test_arrays_that_are_refused(gpu, runtime, array, options, message):
    given = DlpackArray(gpu, array, **options)
    for method in (runtime.encode_pixels, runtime.encode_device):
        with pytest.raises(InputError, match=message):
            method(given)
    given.release()


def test_an_array_of_the_cpu_is_not_on_the_gpu(gpu, runtime, pixels):
    torch = pytest.importorskip("torch")
    tensor = torch.from_numpy(pixels)
    assert not is_on_gpu(tensor)
    assert not is_device_array(pixels)
    assert not is_on_gpu("a.jpg")
    with pytest.raises(InputError, match="pixels are Tensor, not a uint8 array"):
        runtime.encode_pixels(tensor)


def test_what_is_left_on_the_gpu_speaks_the_array_interface(gpu, runtime, pixels):
    with runtime.encode_device(pixels[:3]) as codes:
        assert is_device_array(codes[16])
        again = codes.logits[64]
        facts = again.__cuda_array_interface__
        assert (facts["shape"], facts["typestr"], facts["strides"], facts["stream"]) == ((3, 64), "<f4", None, None)
        assert "DeviceCodes(count=3" in repr(codes)
