"""The trunks: everything before channel attention, from normalised pixels to a feature map."""

from __future__ import annotations

from admth_training.backbones.cnnf import CnnFTrunk, LocalResponseNorm
from admth_training.backbones.efficientnet_lite0 import EfficientNetLite0Trunk, load_imagenet_weights
from admth_training.backbones.registry import make_trunk
from admth_training.backbones.trunk import Trunk

__all__ = [
    "CnnFTrunk",
    "EfficientNetLite0Trunk",
    "LocalResponseNorm",
    "Trunk",
    "load_imagenet_weights",
    "make_trunk",
]
