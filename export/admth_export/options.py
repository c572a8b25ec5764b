"""What a user may ask of an export, checked before anything heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from admth_runtime.errors import InputError, OutputError

__all__ = ["MODEL_FILE", "ImageChoice", "OnnxOptions", "check_target"]

MODEL_FILE = "model.onnx"


@dataclass(frozen=True)
class OnnxOptions:
    """Versions of the file format.

    Attributes:
        opset: version of the standard operators; 20 is what TensorRT 10.3 and onnxruntime 1.20 still read.
        ir_version: version of the file format; 10 for the same reason.
    """

    opset: int = 20
    ir_version: int = 10

    def __post_init__(self) -> None:
        if not 18 <= self.opset <= 23:
            raise InputError(f"opset {self.opset} is not from 18 to 23: leave --opset out for 20")
        if not 8 <= self.ir_version <= 12:
            raise InputError(f"IR version {self.ir_version} is not from 8 to 12: leave --ir-version out for 10")


@dataclass(frozen=True)
class ImageChoice:
    """Which images the gate takes.

    Attributes:
        data: a data set such as ``"folder:pictures"``; None is the one that the run was trained on.
        root: for a list, the folder that relative paths start from.
        strip_prefix: for a list, a text that is cut from the start of each path.
        images: how many queries, or all where there are fewer.
        database_images: how many database images for the effect on retrieval, or all; 0 leaves it out.
        seed: of both draws.
    """

    data: str | None = None
    root: str | None = None
    strip_prefix: str | None = None
    images: int = 1000
    database_images: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("images", 1), ("database_images", 0), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{name.replace('_', ' ')} {value!r} is not an integer from {least}")


def check_target(target: Path) -> None:
    """Check that a model can get this name.

    Raises:
        OutputError: it does not end with ``.onnx``, it is a folder, or its own folder does not exist.
    """
    if target.suffix != ".onnx":
        raise OutputError(f"cannot write {target}: a model's name ends with .onnx; pass for example --out model.onnx")
    if target.is_dir():
        raise OutputError(f"cannot write {target}: it is a folder; name a file in it")
    if not target.parent.is_dir():
        raise OutputError(f"cannot write {target}: its folder does not exist; create it first")
