"""What a user may ask of a calibration, checked before anything heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from admth_calibration.gates import Gates
from admth_runtime.errors import InputError, OutputError
from admth_runtime.files import check_target

__all__ = [
    "LEAST_IMAGES",
    "METHODS",
    "REDUCE_RANGE",
    "ROUNDINGS",
    "TARGETS",
    "CalibrationOptions",
    "check_out",
    "default_out",
]

LEAST_IMAGES = 128
"""Ranges of fewer images miss values that other images have."""

TARGETS = ("cpu", "trt", "both")
"""What an INT8 model is made for: ONNX Runtime's CPU kernels take uint8 activations, TensorRT takes symmetric int8."""

METHODS = ("min-max", "percentile", "entropy", "mse", "sign-aware")
"""How ranges are chosen."""

ROUNDINGS = ("nearest", "zero-sum", "gptq")
"""How weights are rounded, from the simplest to the best."""

REDUCE_RANGE = ("auto", "yes", "no")
"""Whether weights take 7 bits: ``auto`` does where the processor's products of two bytes overflow 16 bits."""


@dataclass(frozen=True)
class CalibrationOptions:
    """How a model is calibrated.

    Attributes:
        target: ``"cpu"``, ``"trt"`` or ``"both"``.
        images: how many images give the ranges, or as many as there are, from 128.
        check_images: on how many other images the INT8 model is compared with the FP32 model.
        block_images: how many images are in memory at once, to fit the layers on.
        seed: of the draw.
        keep_fp32: layers that stay in float whatever a search finds: names, starts of names, or globs.
        method: one of ``METHODS``.
        rounding: one of ``ROUNDINGS``.
        correct_bias: correct biases in layer order.
        equalise: equalise channels before quantising.
        reduce_range: one of ``REDUCE_RANGE``.
        gates: what the model must meet; with ``min_bit_parity``, layers are kept in float until it is.
        sensitivity: measure every layer alone too, and write the table and the picture.

    Raises:
        InputError: a value is out of range.
    """

    target: str = "cpu"
    images: int = 512
    check_images: int = 500
    block_images: int = 128
    seed: int = 0
    keep_fp32: tuple[str, ...] = ()
    method: str = "mse"
    rounding: str = "gptq"
    correct_bias: bool = True
    equalise: bool = True
    reduce_range: str = "auto"
    gates: Gates = field(default_factory=Gates)
    sensitivity: bool = False

    def __post_init__(self) -> None:
        for name, choices in (
            ("target", TARGETS),
            ("method", METHODS),
            ("rounding", ROUNDINGS),
            ("reduce_range", REDUCE_RANGE),
        ):
            if getattr(self, name) not in choices:
                raise InputError(
                    f"{name.replace('_', ' ')} {getattr(self, name)!r} is unknown: use {', '.join(choices[:-1])} or "
                    f"{choices[-1]}"
                )
        for name, least in (("images", LEAST_IMAGES), ("check_images", 1), ("block_images", 8), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{name.replace('_', ' ')} {value!r} is not an integer from {least}")

    @property
    def targets(self) -> tuple[str, ...]:
        """The targets, each once."""
        return ("cpu", "trt") if self.target == "both" else (self.target,)


def default_out(model: Path, target: str) -> Path:
    """Return ``model.int8.onnx`` for ``model.onnx`` and the CPU, ``model.int8.trt.onnx`` for TensorRT."""
    ending = ".int8.trt.onnx" if target == "trt" else ".int8.onnx"
    return model.with_name(f"{model.name.removesuffix('.onnx')}{ending}")


def check_out(model: Path, out: Path) -> None:
    """Check that the calibrated model can get this name.

    Raises:
        OutputError: it does not end with ``.onnx``, it is the model itself, or it cannot be written.
    """
    if out.suffix != ".onnx":
        raise OutputError(f"cannot write {out}: a model's name ends with .onnx; pass for example --out {out.stem}.onnx")
    check_target(out)
    if out.exists() and model.exists() and out.samefile(model):
        raise OutputError(f"cannot write {out}: it is the model itself; choose another place with --out")
