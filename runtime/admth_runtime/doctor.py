"""What this machine can run models with, and what to install or mend."""

from __future__ import annotations

import platform
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module, metadata, util
from typing import Any

from admth_runtime._version import __version__
from admth_runtime.cpu import cpu_flags, cpu_name, usable_cores
from admth_runtime.driver import CudaFacts, ask_driver

__all__ = ["CudaFacts", "Diagnosis", "Package", "TensorRTFacts", "diagnose"]

# Distributions that provide an engine, all importable as onnxruntime: two of them overwrite each other's files.
_ONNXRUNTIMES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino")
# Modules of the TensorRT flavours, with their extra and the distributions that bring them.
_TENSORRTS = {
    "tensorrt": ("tensorrt", ("tensorrt", "tensorrt-cu12", "tensorrt-cu13")),
    "tensorrt_lean": ("tensorrt-lean", ("tensorrt-lean", "tensorrt-lean-cu12", "tensorrt-lean-cu13")),
    "tensorrt_rtx": ("rtx", ("tensorrt-rtx", "tensorrt-rtx-cu12", "tensorrt-rtx-cu13")),
}
_CUDA_PYTHON = ("cuda-bindings", "pycuda")
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
class TensorRTFacts:
    """An installed TensorRT.

    Attributes:
        module: the Python module: ``"tensorrt"``, ``"tensorrt_lean"`` or ``"tensorrt_rtx"``.
        version: its version, or None where it is not installed by ``pip`` and cannot be imported here.
        packages: the installed distributions that bring it.
        usable: whether engines can be run with it on this machine.
        problem: why not, with the mend, or None.
    """

    module: str
    version: str | None
    packages: tuple[Package, ...]
    usable: bool
    problem: str | None


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
        tensorrt: installed flavours of TensorRT, and whether engines can be run with them here.
        cuda_python: installed packages that an engine may reach CUDA through.
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
    tensorrt: tuple[TensorRTFacts, ...]
    cuda_python: tuple[Package, ...]
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
    cuda = ask_driver()
    cuda_python = _installed(_CUDA_PYTHON, find_version)
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
        tensorrt=_tensorrts(find_version, cuda, cuda_python),
        cuda_python=cuda_python,
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


def _tensorrts(
    find_version: Callable[[str], str], cuda: CudaFacts, cuda_python: tuple[Package, ...]
) -> tuple[TensorRTFacts, ...]:
    """Look at the flavours of TensorRT; none is imported where there is no driver, since some would crash there."""
    found = []
    for module, (extra, names) in _TENSORRTS.items():
        packages = _installed(names, find_version)
        present = bool(packages) or _has_module(module)
        if not present:
            continue
        version = packages[-1].version if packages else None
        problem = cuda.problem or _tensorrt_problem(packages, extra, cuda, cuda_python)
        if problem is None:
            try:
                version = str(import_module(module).__version__)
            except Exception as error:  # libraries that are missing or of another version fail in many ways
                problem = f"it cannot be imported ({_line(error)}): run  pip install --force-reinstall 'admth[{extra}]'"
        found.append(TensorRTFacts(module, version, packages, problem is None, problem))
    return tuple(found)


def _tensorrt_problem(
    packages: tuple[Package, ...], extra: str, cuda: CudaFacts, cuda_python: tuple[Package, ...]
) -> str | None:
    needed = max((int(package.name[-2:]) for package in packages if package.name[-4:-2] == "cu"), default=0)
    if cuda.version_major < needed:
        return (
            f"it needs CUDA {needed} and the driver supports {cuda.version}: update the driver, or install the "
            f"-cu{cuda.version_major} build"
        )
    if not cuda_python:
        return f"it needs cuda-bindings: run  pip install 'admth[{extra}]'"
    return None


def _has_module(name: str) -> bool:
    try:
        return util.find_spec(name) is not None
    except (ImportError, ValueError):  # ValueError: None in its place
        return False


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


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
