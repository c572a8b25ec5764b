"""What every trunk is."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

__all__ = ["Trunk"]


class Trunk(nn.Module):
    """Convolutions shared by all code lengths (hard parameter sharing).

    A trunk maps normalised pixels, float32 ``[b, 3, size, size]``, to ``[b, channels, grid, grid]``.

    Attributes:
        mean: per-channel value subtracted from the pixels 0..255, inside the deployed graph.
        std: per-channel divisor of the difference.
        channels: channels of the feature map.
        grid: its rows and columns.

    """

    mean: ClassVar[tuple[float, float, float]]
    std: ClassVar[tuple[float, float, float]]
    channels: int
    grid: int

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the feature map ``[b, channels, grid, grid]`` of normalised pixels ``[b, 3, size, size]``."""
        raise TypeError(f"{type(self).__name__} does not define forward")
