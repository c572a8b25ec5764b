"""Affine quantisation of a tensor: real = scale * (integer - zero point), rounding half to even, saturating.

ONNX QuantizeLinear and DequantizeLinear, operation for operation in float32, so that what is simulated here is what
an engine computes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Affine",
    "asymmetric_u8",
    "bias_steps",
    "least_weight_scales",
    "quantize_weight",
    "representable_scale",
    "symmetric_s8",
    "weight_scales",
]

_LARGEST = 127
_LEAST_SCALE = 1e-8  # a channel of zeros, or a tensor that is constantly zero, still needs a scale above zero
# Sums of products are added to a bias in 32 bits, and wrap around: a bias leaves them room.
_MOST_BIAS_STEPS = 2.0**30
_WANTED_BIAS_STEPS = 2.0**28


@dataclass(frozen=True)
class Affine:
    """How one tensor is quantised.

    Attributes:
        scale: real value of one step, above zero; a float32 number.
        zero_point: the integer of the real value 0.
        signed: int8 from -128 to 127, or uint8 from 0 to 255.
    """

    scale: float
    zero_point: int
    signed: bool

    @property
    def bounds(self) -> tuple[float, float]:
        """Smallest and largest real value."""
        low, high = (-128, 127) if self.signed else (0, 255)
        return (low - self.zero_point) * self.scale, (high - self.zero_point) * self.scale

    @property
    def dtype(self) -> type[np.int8] | type[np.uint8]:
        """NumPy's type of the integers."""
        return np.int8 if self.signed else np.uint8

    def quantize(self, values: NDArray[np.float32]) -> NDArray[np.generic]:
        """Return the integers of float32 values of any shape."""
        low, high = (-128, 127) if self.signed else (0, 255)
        steps = np.rint(values / np.float32(self.scale))
        integers: NDArray[np.generic] = np.clip(steps + np.float32(self.zero_point), low, high).astype(self.dtype)
        return integers

    def dequantize(self, integers: NDArray[np.generic]) -> NDArray[np.float32]:
        """Return the float32 values of integers of any shape."""
        steps = integers.astype(np.float32) - np.float32(self.zero_point)
        return steps * np.float32(self.scale)

    def round(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return float32 values as they come back from their integers."""
        return self.dequantize(self.quantize(values))


def asymmetric_u8(low: float, high: float) -> Affine:
    """Cover a range, widened so that it holds 0, with the 256 steps of uint8: what ONNX Runtime's CPU kernels take."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = float(np.float32(max((high - low) / 255, _LEAST_SCALE)))
    return Affine(scale, int(np.clip(np.rint(-low / scale), 0, 255)), signed=False)


def symmetric_s8(low: float, high: float) -> Affine:
    """Cover a range with int8 around zero: what TensorRT takes. The scale is a number that FP16 has, rounded up."""
    return Affine(representable_scale(max(abs(low), abs(high)) / _LARGEST), 0, signed=True)


def representable_scale(scale: float) -> float:
    """Return the smallest positive FP16 number that is not below ``scale``; 1 for a scale of zero."""
    if scale == 0.0:
        return 1.0
    half = np.float16(scale)
    if float(half) < scale:
        half = np.nextafter(half, np.float16(np.inf))
    return float(half)


def weight_scales(
    rows: NDArray[np.floating],
    *,
    half: bool,
    largest: int = _LARGEST,
    least: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Return one scale for each row, so that its largest value becomes ``largest``.

    Args:
        rows: weights ``[output channels, inputs of each]``.
        half: only numbers that FP16 has, rounded up.
        largest: 127, or 63 where products of two bytes must not overflow 16 bits (``reduce_range``).
        least: the smallest scale of each row, ``[output channels]``, or None.

    Returns:
        float32 ``[output channels]``, all above zero.
    """
    most = np.abs(rows).max(axis=1, initial=0.0)
    if half:
        return np.array([representable_scale(float(value) / largest) for value in most], dtype=np.float32)
    scales = np.asarray(most, dtype=np.float32) / np.float32(largest)
    if least is not None:
        bounded: NDArray[np.float32] = np.maximum(scales, least)
        return bounded
    # A row of zeros takes 1: any scale is right.
    return np.where(scales > _LEAST_SCALE, scales, np.float32(1.0)).astype(np.float32)


def least_weight_scales(bias: NDArray[np.floating], input_scale: float) -> NDArray[np.float32]:
    """Return the smallest scale of each row's weights with which its bias fits into 32 bits.

    Networks have channels whose weights are all but zero and whose bias is not: pruned by training, and folded with
    their batch normalisation. A bias is an integer too, of the scale of input and weight together.

    Args:
        bias: ``[output channels]``.
        input_scale: scale of the layer's input.
    """
    least = np.abs(bias.astype(np.float64)) / (input_scale * _WANTED_BIAS_STEPS)
    return np.maximum(least, _LEAST_SCALE).astype(np.float32)


def bias_steps(
    bias: NDArray[np.floating], input_scale: float, scales: NDArray[np.float32]
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Return a bias as integers, and their scales: those of input and weight multiplied, in float32.

    Args:
        bias: ``[output channels]``.
        input_scale: scale of the layer's input.
        scales: of the weights, ``[output channels]``.
    """
    steps = np.float32(input_scale) * scales
    integers = np.clip(np.rint(bias.astype(np.float64) / steps), -_MOST_BIAS_STEPS, _MOST_BIAS_STEPS)
    return integers.astype(np.int32), steps


def quantize_weight(weight: NDArray[np.float32], axis: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Round a weight to the nearest int8, symmetric, with one scale for each index of an axis.

    Args:
        weight: float32, of any rank.
        axis: the axis of the output channels.

    Returns:
        int8 of the same shape, and float32 scales ``[channels]``, all above zero and all numbers that FP16 has.
    """
    turned = np.moveaxis(weight, axis, 0)
    scales = weight_scales(turned.reshape(len(turned), -1), half=True)
    shape = [1] * weight.ndim
    shape[axis] = -1
    rounded = np.rint(weight / scales.reshape(shape))
    return np.clip(rounded, -_LARGEST, _LARGEST).astype(np.int8), scales
