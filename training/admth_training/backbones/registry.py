"""The one place that makes a trunk by its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from admth_training.backbones.cnnf import CnnFTrunk
from admth_training.backbones.efficientnet_lite0 import EfficientNetLite0Trunk
from admth_training.backbones.trunk import Trunk

__all__ = ["make_trunk"]

_KINDS: Mapping[str, Callable[[int], Trunk]] = {
    "cnnf": CnnFTrunk,
    "efficientnet_lite0": EfficientNetLite0Trunk,
}


def make_trunk(backbone: str, size: int) -> Trunk:
    """Make a trunk with fresh weights.

    Args:
        backbone: one of ``admth_training.config.BACKBONES``.
        size: side of the square input in pixels.

    """
    return _KINDS[backbone](size)
