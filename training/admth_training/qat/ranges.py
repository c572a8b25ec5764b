"""Where fine-tuning starts from: ranges of least square error, and biases that undo the mean error of the weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from admth_runtime.errors import TrainingError

__all__ = ["ChannelObserver", "Observer", "QuantizedRange", "best_range"]

_SAMPLE_PER_BATCH = 4096


@dataclass(frozen=True)
class QuantizedRange:
    """A scale, above zero, and a zero point."""

    scale: float
    zero_point: int


class Observer:
    """Keeps the extremes of a tensor and an even sample of its values: bounded, whatever comes by."""

    def __init__(self) -> None:
        self._low = 0.0
        self._high = 0.0
        self._sample: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        """Take a batch into account."""
        values = x.detach().flatten()
        low, high = torch.aminmax(values)
        self._low, self._high = min(self._low, float(low)), max(self._high, float(high))
        stride = max(len(values) // _SAMPLE_PER_BATCH, 1)
        # A stride that shares a factor with the channels' layout would see the same few of them.
        self._sample.append(values[:: stride | 1].float().cpu().clone())

    def check(self, name: str) -> None:
        """Check that values came by and were numbers.

        Args:
            name: of the tensor, for the message.

        Raises:
            TrainingError: the tensor was not finite, or never seen.

        """
        if not self._sample:
            raise TrainingError(f"the tensor {name} was never computed: no training image is readable")
        finite = math.isfinite(self._high - self._low) and all(bool(torch.isfinite(x).all()) for x in self._sample)
        if not finite:
            raise TrainingError(f"the tensor {name} is not finite on the training images: train the FP32 run again")

    def range(self, *, signed: bool) -> QuantizedRange:
        """Return the range of least square error of what came by; see :func:`best_range`."""
        return best_range(torch.cat(self._sample), self._low, self._high, signed=signed)


class ChannelObserver:
    """Keeps the mean and the largest magnitude of every channel of a tensor ``[b, c, ...]``."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._largest: Tensor | None = None
        self._count = 0

    def update(self, x: Tensor) -> None:
        """Take a batch into account."""
        values = x.detach().flatten(2) if x.ndim > 2 else x.detach()[:, :, None]
        total, largest = values.double().mean(dim=2).sum(dim=0), values.abs().amax(dim=(0, 2))
        self._sum = total if self._sum is None else self._sum + total
        self._largest = largest if self._largest is None else torch.maximum(self._largest, largest)
        self._count += len(x)

    def mean(self) -> Tensor:
        """Return the channels' means, float32 ``[c]``, once something came by."""
        assert self._sum is not None
        return (self._sum / self._count).float()

    def largest(self) -> Tensor:
        """Return the channels' largest magnitudes, float32 ``[c]``, once something came by."""
        assert self._largest is not None
        return self._largest


def best_range(sample: Tensor, low: float, high: float, *, signed: bool) -> QuantizedRange:
    """Try ranges from all that was seen to a part of it, and return the one of least square error.

    Args:
        sample: values, float32 ``[n]``.
        low: smallest value, at most 0.
        high: largest value, at least 0.
        signed: symmetric int8 with a power of two, else uint8; without negative values its zero point is 0.

    """
    largest = max(-low, high)
    if largest == 0.0:
        return QuantizedRange(1.0, 0)
    candidates = _powers_of_two(largest) if signed else _shrunk(low, high)
    return min(candidates, key=lambda candidate: _square_error(sample, candidate, signed=signed))


def _powers_of_two(largest: float) -> list[QuantizedRange]:
    """From the power that takes the largest value in, down to an eighth of it."""
    above = math.ceil(math.log2(largest / 127))
    return [QuantizedRange(2.0**power, 0) for power in range(above, above - 4, -1)]


def _shrunk(low: float, high: float) -> list[QuantizedRange]:
    """From all of the range to a fifth of it."""
    full = (high - low) / 255
    return [
        QuantizedRange(shrink * full, min(max(round(-low / full), 0), 255))
        for shrink in (step / 80 for step in range(80, 15, -1))
    ]


def _square_error(sample: Tensor, candidate: QuantizedRange, *, signed: bool) -> float:
    low, high = (-128, 127) if signed else (-candidate.zero_point, 255 - candidate.zero_point)
    rounded = (sample / candidate.scale).round_().clamp_(low, high).mul_(candidate.scale)
    return float((rounded - sample).square_().sum())
