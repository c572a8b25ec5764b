"""Rounding to integers and to scales, exactly as an INT8 model does it, with straight-through gradients.

``q = clamp(round(x / s) + z)`` and ``x' = (q - z) s``, in float32, with a division and round half to even: ONNX's
QuantizeLinear and DequantizeLinear. PyTorch's own fake quantisation multiplies by ``1 / s`` instead, which rounds
some values to the other side.

Scales carry few significant bits. Then ``127 s`` is exact in float32, and ``max|w| / 127`` gives the scale back to the
bit. And for TensorRT, where activations' scales are powers of two and weights' scales have 7 bits, every product and
every sum of a layer is exact in float32 as long as the sum of integers stays below 2^17: whatever computes it, in
whatever order, in integers or in float, gets the same numbers, and rounds them alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["LARGEST", "fake_quantize", "quantize_weight", "round_scale", "round_scale_down", "straight_through"]

LARGEST = 127
"""Largest integer of a weight; -128 is not used, so that a weight and its negative are both there."""

# Scales of weights smaller than this are not numbers of 7 bits that FP16 has.
_LEAST_HALF_SCALE = 2.0**-18
_MANTISSA_BITS = 23
_SQUARE_ROOT_OF_2 = 0x3504F3  # its mantissa


class _FakeQuantize(torch.autograd.Function):
    """Round to the grid; gradients of Esser et al., "Learned Step Size Quantization", 2020, eq. 3 and section 2.2."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
        result = (x / scale).round_().clamp_(low, high).mul_(scale)
        ctx.save_for_backward(x, scale, result)
        ctx.low, ctx.high = low, high
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, scale, result = ctx.saved_tensors
        gradient = gradients[0]
        inside = gradient * ((x >= (ctx.low - 0.5) * scale) & (x <= (ctx.high + 0.5) * scale))
        # d x' / d s is (x' - x) / s inside the range and x' / s, the bound, outside.
        of_scale = (torch.sum(gradient * result) - torch.sum(inside * x)) / scale
        of_scale /= (x.numel() * max(ctx.high, -ctx.low)) ** 0.5
        return inside, of_scale.reshape(scale.shape), None, None


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, replacement: Tensor) -> Tensor:
        return replacement.view_as(replacement)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def fake_quantize(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """Round activations to the grid ``scale * {low, ..., high}``.

    Args:
        x: float32, of any shape.
        scale: scalar float32 above zero; its gradient is scaled by ``1 / sqrt(elements * largest integer)``.
        low: smallest integer less the zero point, so 0 - z for uint8.
        high: largest integer less the zero point.

    """
    return _FakeQuantize.apply(x, scale, low, high)  # type: ignore[no-any-return,no-untyped-call]


def straight_through(value: Tensor, replacement: Tensor) -> Tensor:
    """Return ``replacement``, with the gradient going to ``value`` as if it had not been replaced."""
    return _StraightThrough.apply(value, replacement)  # type: ignore[no-any-return,no-untyped-call]


def round_scale(scale: Tensor, bits: int) -> Tensor:
    """Return the nearest scales of so many significant bits; of one bit, the power of two that is nearest in ratio.

    Args:
        scale: float32 above zero and not subnormal, of any shape.
        bits: from 1 to 23, the leading one included.

    """
    dropped = _MANTISSA_BITS + 1 - bits
    half = (1 << dropped) - _SQUARE_ROOT_OF_2 if bits == 1 else 1 << (dropped - 1)
    # Adding to the bits of a positive floating-point number carries into its exponent as it should.
    return ((scale.view(torch.int32) + half) & -(1 << dropped)).view(torch.float32)


def round_scale_down(scale: float, bits: int) -> float:
    """Return the nearest number of so many significant bits that is not above ``scale``, which is above zero."""
    dropped = _MANTISSA_BITS + 1 - bits
    kept = torch.tensor(scale, dtype=torch.float32).view(torch.int32) & -(1 << dropped)
    return float(kept.view(torch.float32))


def quantize_weight(weight: Tensor, least: Tensor | None, *, bits: int) -> tuple[Tensor, Tensor]:
    """Round a weight to symmetric int8, with one scale an output channel: ``max|w| / 127``, rounded to few bits.

    The largest weight of a channel always becomes 127 or -127, so whoever reads ``q s`` finds the same scale and the
    same integers.

    Args:
        weight: float32 ``[out, ...]``.
        least: float32 ``[out]``, a floor of the scales, which makes the largest weight of a channel below it larger;
            None makes channels with very small weights zero.
        bits: significant bits of the scales, at most 16.

    Returns:
        Whole numbers from -127 to 127 as float32, of the weight's shape, and float32 scales ``[out]``, 1 for a channel
        of zeros.

    """
    flat = weight.detach().flatten(1)
    largest, place = flat.abs().max(dim=1)
    scale = largest / LARGEST
    scale = torch.where(scale < _LEAST_HALF_SCALE, 0.0, scale) if least is None else torch.maximum(scale, least)
    empty = scale < torch.finfo(torch.float32).tiny
    scale = round_scale(torch.where(empty, 1.0, scale), bits)
    integers = (flat / scale[:, None]).round_().clamp_(-LARGEST, LARGEST)
    peak = flat.gather(1, place[:, None])
    integers.scatter_(1, place[:, None], torch.where(peak < 0, -float(LARGEST), float(LARGEST)))
    return torch.where(empty[:, None], 0.0, integers).view_as(weight), scale
