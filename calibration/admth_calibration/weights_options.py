"""What a user may ask of a weights-only compression, checked before anything heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from admth_calibration.options import LEAST_IMAGES
from admth_runtime.errors import InputError

__all__ = ["BLOCK_SIZES", "CONVOLUTIONS", "WEIGHTS", "WeightsOnlyOptions", "default_weights_out"]

WEIGHTS = ("int8", "int4")
"""Bits of the weights; the manifest's precision is ``int8-weights`` or ``int4-weights``."""

CONVOLUTIONS = ("fp16", "int8")
"""How the weights of convolutions are stored."""

BLOCK_SIZES = (16, 32, 64, 128, 256)
"""Weights that share a scale; what ONNX Runtime's kernel takes."""

# Memory holds the inputs of every layer for every image, 42,000 numbers an image for the paper's network.
MOST_IMAGES = 4096

_DEFAULT_BLOCK_SIZES = {"int8": 256, "int4": 128}


@dataclass(frozen=True)
class WeightsOnlyOptions:
    """How the weights are stored.

    Attributes:
        weights: ``"int8"``, or ``"int4"`` for the layers that hold 5 % of all weights or more, and 8 bits for the rest.
        block_size: most weights that share a scale; None is 256 for 8 bits and 128 for 4. A smaller block is nearer to
            FP32, larger and slower: a scale takes four bytes.
        convolutions: ``"fp16"``, or ``"int8"`` with one scale a channel, which is smaller and flips more bits.
        keep_fp32: layers that stay in FP32: names, starts of names, or globs.
        images: how many images the roundings are chosen with, where there are images, from 128 to 4,096.
        check_images: on how many others the model is compared with the FP32 model.
        seed: of the draw.

    Raises:
        InputError: a value is unknown or out of range.
    """

    weights: str = "int8"
    block_size: int | None = None
    convolutions: str = "fp16"
    keep_fp32: tuple[str, ...] = ()
    images: int = 512
    check_images: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        if self.weights not in WEIGHTS:
            raise InputError(f"weights {self.weights!r} are unknown: use --weights-only {' or '.join(WEIGHTS)}")
        if self.block_size is not None and (isinstance(self.block_size, bool) or self.block_size not in BLOCK_SIZES):
            raise InputError(
                f"block size {self.block_size!r} is none of {', '.join(map(str, BLOCK_SIZES))}: use one of them"
            )
        if self.convolutions not in CONVOLUTIONS:
            raise InputError(f"convolutions {self.convolutions!r} are unknown: use {' or '.join(CONVOLUTIONS)}")
        for name, least in (("images", LEAST_IMAGES), ("check_images", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{name.replace('_', ' ')} {value!r} is not an integer from {least}")
        if self.images > MOST_IMAGES:
            raise InputError(
                f"images {self.images:,} is above {MOST_IMAGES:,}, beyond which roundings stay as they are and memory "
                "grows: use fewer"
            )

    @property
    def bits(self) -> int:
        """Bits of the weights of large layers."""
        return 8 if self.weights == "int8" else 4

    @property
    def largest_block(self) -> int:
        """Most weights that share a scale."""
        return self.block_size or _DEFAULT_BLOCK_SIZES[self.weights]

    @property
    def precision(self) -> str:
        """The precision that the manifest states."""
        return f"{self.weights}-weights"


def default_weights_out(model: Path, weights: str) -> Path:
    """Return ``model.w8.onnx`` or ``model.w4.onnx`` for ``model.onnx``."""
    return model.with_name(f"{model.name.removesuffix('.onnx')}.w{weights.removeprefix('int')}.onnx")
