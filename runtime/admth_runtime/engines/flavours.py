"""Which installed TensorRT can run an engine: by flavour, version and CUDA version, before it is asked to.

A plain plan is read by the very major and minor version of TensorRT that wrote it. A version-compatible plan is also
read by later versions, and by the lean runtime, which is a tenth of the size. A TensorRT-RTX engine is read by the
TensorRT-RTX of its major and minor version.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata, util
from typing import Any

from admth_runtime.engine_file import EngineFile
from admth_runtime.errors import DeviceError, MissingExtraError, require

__all__ = ["FLAVOUR_MODULES", "TensorRTModule", "choose_module", "cuda_major_of", "find_distribution"]

FLAVOUR_MODULES = {"tensorrt": ("tensorrt", "tensorrt_lean"), "rtx": ("tensorrt_rtx",)}
"""Python modules that may run an engine of each flavour, best first."""

_EXTRAS = {"tensorrt": "tensorrt", "tensorrt_lean": "tensorrt-lean", "tensorrt_rtx": "rtx"}
_CUDA_BUILDS = (13, 12)


@dataclass(frozen=True)
class TensorRTModule:
    """An installed TensorRT that fits an engine.

    Attributes:
        name: the module's name: ``"tensorrt"``, ``"tensorrt_lean"`` or ``"tensorrt_rtx"``.
        version: its version.
        bindings: the module.
    """

    name: str
    version: str
    bindings: Any


def choose_module(engine: EngineFile) -> TensorRTModule:
    """Import the TensorRT that an engine needs, and compare versions; its runtime is not started.

    Raises:
        MissingExtraError: no TensorRT of the engine's flavour is installed.
        DeviceError: those that are installed are of another version, or cannot read a plain plan.
    """
    flavour = engine.header.flavour
    installed = [name for name in FLAVOUR_MODULES[flavour] if _is_installed(name)]
    problems = []
    for name in installed:
        compatible = engine.sidecar is not None and engine.sidecar.version_compatible
        if name == "tensorrt_lean" and not compatible:
            problems.append("tensorrt_lean runs version-compatible plans only and this is a plain one")
            continue
        bindings = require(name, extra=_EXTRAS[name], purpose=f"running {engine.path.name}")
        version = str(bindings.__version__)
        if _fits(_version(version), engine.header.version, compatible):
            return TensorRTModule(name, version, bindings)
        problems.append(f"{name} {version} is installed")
    rebuild = engine.sidecar.rebuild_command if engine.sidecar is not None else "admth-export trt"
    if not installed:
        extra = _EXTRAS[FLAVOUR_MODULES[flavour][0]]
        raise MissingExtraError(
            f"running {engine.path.name}, built by {engine.header}, needs the package "
            f"{FLAVOUR_MODULES[flavour][0]}, which is not installed: run  pip install 'admth[{extra}]'"
        )
    raise DeviceError(
        f"{engine.path} was built by {engine.header} and {' and '.join(problems)}: install that version, or run  "
        f"{rebuild}{'  --version-compatible' if problems[-1].startswith('tensorrt_lean runs') else ''}"
    )


def cuda_major_of(module: str) -> int:
    """Return the major CUDA version that an installed TensorRT was built for; 0 where its packages do not say.

    NVIDIA's wheels say it in their names, such as ``tensorrt-rtx-cu13``; a system-wide TensorRT does not.
    """
    found = find_distribution(module)
    return next((major for major in _CUDA_BUILDS if found is not None and found[0].endswith(f"-cu{major}")), 0)


def find_distribution(module: str) -> tuple[str, str] | None:
    """Return name and version of the distribution that brings a TensorRT module, or None."""
    base = module.replace("_", "-")
    for name in (*(f"{base}-cu{major}" for major in _CUDA_BUILDS), base):
        with suppress(metadata.PackageNotFoundError):
            return name, metadata.version(name)
    return None


def _is_installed(name: str) -> bool:
    try:
        return util.find_spec(name) is not None
    except (ImportError, ValueError):  # ValueError: a module without a spec, or None in its place
        return False


def _fits(installed: tuple[int, ...], engine: tuple[int, ...], compatible: bool) -> bool:
    # The header keeps a byte for a part; major and minor versions are far below 256.
    return installed[:2] == engine[:2] or (compatible and installed[:2] > engine[:2])


def _version(text: str) -> tuple[int, ...]:
    parts = []
    for part in text.split("."):
        if not part.isdigit():
            break
        parts.append(int(part))
    return tuple(parts)
