"""The NVIDIA driver, asked directly.

CUDA's and TensorRT's own libraries may crash where there is no driver (TensorRT's lean runtime returns an object and
then dies on its first use), so everything here goes through ``ctypes`` and the driver's library alone. It is asked
before any of them is imported.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from typing import Any

__all__ = ["CudaFacts", "ask_driver"]

_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


@dataclass(frozen=True)
class CudaFacts:
    """The NVIDIA driver.

    Attributes:
        driver: whether its library is there.
        version: the CUDA version that it supports, such as ``"12.8"``, or None.
        devices: how many GPUs it sees.
        problem: why there is none, in one line, or None.
        gpus: name and compute capability of each GPU, such as ``("NVIDIA L4", "sm89")``.
    """

    driver: bool
    version: str | None = None
    devices: int = 0
    problem: str | None = None
    gpus: tuple[tuple[str, str], ...] = ()

    @property
    def version_major(self) -> int:
        """The major CUDA version that the driver supports; 0 where there is no driver."""
        return int(self.version.partition(".")[0]) if self.version else 0


def ask_driver() -> CudaFacts:
    """Start the driver and ask for its version and its GPUs; nothing is allocated and no context is made."""
    try:
        driver: Any = ctypes.CDLL(_LIBRARY)
    except FileNotFoundError:  # Windows
        return CudaFacts(driver=False, problem="no NVIDIA driver")
    except OSError as error:
        if "No such file" in str(error):
            return CudaFacts(driver=False, problem="no NVIDIA driver")
        return CudaFacts(driver=False, problem=f"the NVIDIA driver's library cannot be loaded ({error})")
    try:
        return _ask(driver)
    except AttributeError as error:
        return CudaFacts(driver=False, problem=f"the NVIDIA driver's library is another one or broken ({error})")


def _ask(driver: Any) -> CudaFacts:
    if code := driver.cuInit(0):
        return CudaFacts(driver=True, problem=f"the NVIDIA driver does not start (CUDA error {code})")
    version, devices = ctypes.c_int(), ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    driver.cuDeviceGetCount(ctypes.byref(devices))
    text = f"{version.value // 1000}.{version.value % 1000 // 10}"
    if not devices.value:
        return CudaFacts(True, text, 0, "the NVIDIA driver sees no GPU")
    gpus = tuple(_describe(driver, index) for index in range(devices.value))
    return CudaFacts(True, text, devices.value, None, gpus)


def _describe(driver: Any, index: int) -> tuple[str, str]:
    device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    major, minor = ctypes.c_int(), ctypes.c_int()
    driver.cuDeviceGet(ctypes.byref(device), index)
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    return name.value.decode(errors="replace"), f"sm{major.value}{minor.value}"
