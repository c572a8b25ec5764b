"""What this machine can run models with, and what to install or mend."""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from typing import Any

from admth_runtime._version import __version__
from admth_runtime.cpu import cpu_flags, cpu_name, usable_cores

__all__ = ["CudaFacts", "Diagnosis", "Package", "diagnose"]

# Distributions that provide an engine, all importable as onnxruntime: two of them overwrite each other's files.
_ONNXRUNTIMES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino")
_TENSORRTS = (
    "tensorrt",
    "tensorrt-cu12",
    "tensorrt-cu13",
    "tensorrt-lean",
    "tensorrt-lean-cu12",
    "tensorrt-lean-cu13",
    "tensorrt-rtx",
    "tensorrt-rtx-cu12",
    "tensorrt-rtx-cu13",
)
_OPTIONAL = {"pyarrow": ("parquet", "reading and writing Parquet")}

# The smallest honest test of an engine: an ONNX model of IR version 10 and opset 20 with one Identity of uint8 [n].
_IDENTITY_MODEL = bytes.fromhex(
    "080a3a390a100a01781201792208" + b"Identity".hex() + "1201675a100a0178120b0a09080212050a0312016e"
    "62100a0179120b0a09080212050a0312016e42040a001014"
)


@dataclass(frozen=True)
class Package:
    """An installed distribution.

    Attributes:
        name: as ``pip`` knows it.
        version: its version.
    """

    name: str
    version: str


@dataclass(frozen=True)
class CudaFacts:
    """The NVIDIA driver.

    Attributes:
        driver: whether its library is there.
        version: the CUDA version that it supports, such as ``"12.8"``, or None.
        devices: how many GPUs it sees.
        problem: why there is none, in one line, or None.
    """

    driver: bool
    version: str | None = None
    devices: int = 0
    problem: str | None = None


@dataclass(frozen=True)
class Diagnosis:
    """What was found.

    Attributes:
        admth: version of this software.
        python: version of Python.
        platform: operating system and architecture.
        cpu: the processor's name.
        cores: physical cores that this process may use.
        cpu_flags: vector instruction sets that matter for inference.
        onnxruntime: installed ONNX Runtime distributions.
        providers: execution providers of the one that is imported.
        engine_works: whether it ran a model just now.
        engine_problem: why not, in one line, or None.
        tensorrt: installed TensorRT distributions, which this version does not use yet.
        optional: optional packages by name; None where one is not installed.
        cuda: the NVIDIA driver.
        conflicts: what is wrong, each with its mend.
        advice: what to install for what is missing.
    """

    admth: str
    python: str
    platform: str
    cpu: str
    cores: int
    cpu_flags: tuple[str, ...]
    onnxruntime: tuple[Package, ...]
    providers: tuple[str, ...]
    engine_works: bool
    engine_problem: str | None
    tensorrt: tuple[Package, ...]
    optional: dict[str, str | None]
    cuda: CudaFacts
    conflicts: tuple[str, ...]
    advice: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)


def diagnose(find_version: Callable[[str], str] = metadata.version) -> Diagnosis:
    """Look at this machine; import ONNX Runtime, run a model of one operator on it, and ask the NVIDIA driver.

    Args:
        find_version: returns the version of an installed distribution, or raises ``PackageNotFoundError``.
    """
    runtimes = _installed(_ONNXRUNTIMES, find_version)
    providers, problem = _try_engine()
    optional = {name: (_installed((name,), find_version) or (None,))[0] for name in _OPTIONAL}
    cuda = _ask_cuda()
    conflicts = _conflicts(runtimes)
    return Diagnosis(
        admth=__version__,
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=cpu_name(),
        cores=usable_cores(),
        cpu_flags=cpu_flags(),
        onnxruntime=runtimes,
        providers=providers,
        engine_works=problem is None,
        engine_problem=problem,
        tensorrt=_installed(_TENSORRTS, find_version),
        optional={name: package.version if package else None for name, package in optional.items()},
        cuda=cuda,
        conflicts=conflicts,
        advice=_advice(runtimes, providers, problem, optional, cuda),
    )


def _installed(names: tuple[str, ...], find_version: Callable[[str], str]) -> tuple[Package, ...]:
    found = []
    for name in names:
        with suppress(metadata.PackageNotFoundError):
            found.append(Package(name, find_version(name)))
    return tuple(found)


def _try_engine() -> tuple[tuple[str, ...], str | None]:
    try:
        ort: Any = import_module("onnxruntime")
        providers = tuple(ort.get_available_providers())
        session = ort.InferenceSession(_IDENTITY_MODEL, providers=["CPUExecutionProvider"])
        numpy = import_module("numpy")
        pixels = numpy.arange(4, dtype=numpy.uint8)
        if not (session.run(None, {"x": pixels})[0] == pixels).all():
            return providers, "onnxruntime returned wrong values for a model of one Identity"
    except ModuleNotFoundError as error:
        return (), f"{error.name} is not installed"
    except Exception as error:  # two wheels over each other fail in many ways, AttributeError among them
        return (), f"onnxruntime does not work ({type(error).__name__}: {str(error).splitlines()[0][:200]})"
    return providers, None


def _ask_cuda() -> CudaFacts:
    """Ask the driver itself: TensorRT's and CUDA's own libraries may crash where there is none."""
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return CudaFacts(driver=False, problem="no NVIDIA driver")
    if code := driver.cuInit(0):
        return CudaFacts(driver=True, problem=f"the NVIDIA driver does not start (CUDA error {code})")
    version, devices = ctypes.c_int(), ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    driver.cuDeviceGetCount(ctypes.byref(devices))
    text = f"{version.value // 1000}.{version.value % 1000 // 10}"
    return CudaFacts(True, text, devices.value, None if devices.value else "the NVIDIA driver sees no GPU")


def _conflicts(runtimes: tuple[Package, ...]) -> tuple[str, ...]:
    if len(runtimes) < 2:
        return ()
    names = [package.name for package in runtimes]
    return (
        f"{' and '.join(names)} are both installed and overwrite each other's files: run  "
        f"pip uninstall -y {' '.join(names)}  and then  pip install 'admth[cpu]'  or  pip install 'admth[gpu]'",
    )


def _advice(
    runtimes: tuple[Package, ...],
    providers: tuple[str, ...],
    problem: str | None,
    optional: dict[str, Package | None],
    cuda: CudaFacts,
) -> tuple[str, ...]:
    advice = []
    if problem is not None:
        mend = "pip install --force-reinstall 'admth[cpu]'" if runtimes else "pip install 'admth[cpu]'"
        advice.append(f"no engine works: run  {mend}" + ("  or  pip install 'admth[gpu]'" if cuda.devices else ""))
    elif cuda.devices and "CUDAExecutionProvider" not in providers:
        names = " ".join(package.name for package in runtimes)
        advice.append(f"to use the GPU: run  pip uninstall -y {names}  and then  pip install 'admth[gpu]'")
    for name, (extra, purpose) in _OPTIONAL.items():
        if optional[name] is None:
            advice.append(f"for {purpose}: run  pip install 'admth[{extra}]'")
    return tuple(advice)
