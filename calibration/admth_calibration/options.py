"""What a user may ask of a calibration, checked before anything heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from admth_runtime.errors import InputError, OutputError
from admth_runtime.files import check_target

__all__ = ["LEAST_IMAGES", "TARGETS", "CalibrationOptions", "check_out", "default_out"]

LEAST_IMAGES = 128
"""Ranges of fewer images miss values that other images have."""

TARGETS = ("trt",)
"""What an INT8 model is made for: TensorRT takes symmetric int8 with float biases, and nothing else does well on it."""


@dataclass(frozen=True)
class CalibrationOptions:
    """How a model is calibrated.

    Attributes:
        target: ``"trt"``.
        images: how many images give the ranges, or as many as there are, from 128.
        check_images: on how many other images the INT8 model is compared with the FP32 model.
        seed: of the draw.
        keep_fp32: layers that stay in FP32: names, starts of names, or globs.

    Raises:
        InputError: a value is out of range.
    """

    target: str = "trt"
    images: int = 512
    check_images: int = 500
    seed: int = 0
    keep_fp32: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise InputError(f"target {self.target!r} is unknown: use {' or '.join(TARGETS)}")
        for name, least in (("images", LEAST_IMAGES), ("check_images", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{name.replace('_', ' ')} {value!r} is not an integer from {least}")


def default_out(model: Path) -> Path:
    """Return ``model.int8.trt.onnx`` for ``model.onnx``."""
    return model.with_name(f"{model.name.removesuffix('.onnx')}.int8.trt.onnx")


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
