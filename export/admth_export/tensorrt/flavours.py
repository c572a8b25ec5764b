"""The flavours of TensorRT that build engines, and what each of them cannot do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import util
from typing import Any

from admth_export.tensorrt.options import EngineOptions, EnginePrecision
from admth_runtime.driver import ask_driver
from admth_runtime.errors import DeviceError, InputError, MissingExtraError, require

__all__ = ["FLAVOURS", "RTX", "TENSORRT", "Flavour", "check_version", "choose_flavour"]

# TensorRT-RTX builds for these on any machine; Turing (sm75) only when it is named, since it compiles less.
_RTX_GPUS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
_RTX_DEFAULT = ("sm80", "sm86", "sm89", "sm120", "sm121")

_OLDEST = {"tensorrt": (10, 3), "rtx": (1, 0)}


@dataclass(frozen=True)
class Flavour:
    """One flavour.

    Attributes:
        name: as the sidecar says it.
        title: as people say it.
        module: its Python module.
        suffix: of its engine files.
        extra: the extra that installs it.
        refused: options that it cannot honour, by their name on the command line, each with the reason and the mend.
        needs_gpu: whether it builds only on a machine with a GPU, and for that GPU.
    """

    name: str
    title: str
    module: str
    suffix: str
    extra: str
    refused: Mapping[str, str]
    needs_gpu: bool

    def installed(self) -> bool:
        """Whether its module is there; it is not imported."""
        try:
            return util.find_spec(self.module) is not None
        except (ImportError, ValueError):  # ValueError: None stands in the module's place
            return False

    def load(self) -> Any:
        """Import its module.

        Raises:
            MissingExtraError: it is not installed.
            DeviceError: it is too old.
        """
        bindings = require(self.module, extra=self.extra, purpose=f"building {self.title} engines")
        check_version(self, str(bindings.__version__))
        return bindings

    def check(self, options: EngineOptions, precision: EnginePrecision) -> None:
        """Refuse, by name, what this flavour cannot honour.

        Raises:
            InputError: an option is refused, or a GPU is not one that it builds for.
        """
        asked = {
            "--timing-cache": options.timing_cache is not None,
            "--version-compatible": options.version_compatible,
            "--gpu": bool(options.gpus),
        }
        for option, reason in self.refused.items():
            if asked[option]:
                raise InputError(f"{self.title} cannot honour {option}: {reason}")
        if self.name == "rtx":
            _check_rtx_gpus(options.gpus, precision)

    def targets(self, options: EngineOptions) -> tuple[str, ...]:
        """Return the compute capabilities to build for; for TensorRT that of the first GPU of this machine.

        Raises:
            DeviceError: there is no GPU, and this flavour needs one.
        """
        if not self.needs_gpu:
            return options.gpus or _RTX_DEFAULT
        driver = ask_driver()
        if not driver.gpus:
            raise DeviceError(
                f"{self.title} builds engines on the machine that runs them, and here is {driver.problem}: build "
                "there, make the typed model here with --onnx-only, or build for RTX GPUs with --flavor rtx"
            )
        return (driver.gpus[0][1],)


TENSORRT = Flavour(
    name="tensorrt",
    title="TensorRT",
    module="tensorrt",
    suffix=".plan",
    extra="tensorrt",
    refused={
        "--gpu": "its engines are for the GPU of the machine that builds them; leave --gpu out, or use --flavor rtx"
    },
    needs_gpu=True,
)

RTX = Flavour(
    name="rtx",
    title="TensorRT-RTX",
    module="tensorrt_rtx",
    suffix=".rtx",
    extra="rtx",
    refused={
        "--timing-cache": "it measures nothing while it builds; leave --timing-cache out",
        "--version-compatible": "its engines are for one version; leave --version-compatible out, or use "
        "--flavor tensorrt",
    },
    needs_gpu=False,
)

FLAVOURS = {flavour.name: flavour for flavour in (TENSORRT, RTX)}


def choose_flavour(name: str) -> Flavour:
    """Return a flavour by its name, or the one that this machine can build with.

    ``"auto"`` takes TensorRT where it is installed and there is a GPU, else TensorRT-RTX where that is installed.

    Raises:
        InputError: the name is unknown.
        MissingExtraError: ``"auto"``, and neither is installed.
    """
    if name != "auto":
        if name not in FLAVOURS:
            raise InputError(f"flavor {name!r} is unknown: use auto, {' or '.join(FLAVOURS)}")
        return FLAVOURS[name]
    installed = [flavour for flavour in FLAVOURS.values() if flavour.installed()]
    if not installed:
        raise MissingExtraError(
            "building engines needs TensorRT, and neither flavour is installed: run  pip install 'admth[tensorrt]'  "
            "for the GPU of this machine, or  pip install 'admth[rtx]'  for RTX GPUs"
        )
    if len(installed) == 1 or ask_driver().gpus:
        return installed[0]
    return RTX


def check_version(flavour: Flavour, version: str) -> None:
    """Refuse a TensorRT that is older than what networks of explicit types need.

    Raises:
        DeviceError: it is.
    """
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    oldest = _OLDEST[flavour.name]
    if numbers < oldest:
        wanted = ".".join(map(str, oldest))
        raise DeviceError(
            f"{flavour.title} {version} is too old: install {wanted} or newer, on a Jetson with JetPack 6.1 or newer"
        )


def _check_rtx_gpus(gpus: tuple[str, ...], precision: EnginePrecision) -> None:
    for name in gpus:
        if name not in _RTX_GPUS:
            raise InputError(
                f"TensorRT-RTX does not build for {name}: it builds for {', '.join(_RTX_GPUS)}; for another GPU, such "
                "as a Jetson's, build on it with --flavor tensorrt"
            )
    if "sm75" in gpus and not (precision.name == "fp16" or precision.half_rest):
        raise InputError(
            f"TensorRT-RTX has no FP32 matrix products for sm75 (Turing), and {precision.flags} has some: pass "
            f"{'--fp16' if precision.name == 'fp32' else '--int8 --fp16'}, or leave sm75 out of --gpu"
        )
