"""Batch normalisation folded into the convolutions before it: the form that is quantised and deployed."""

from __future__ import annotations

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from admth_training.backbones.efficientnet_lite0 import SameConvNorm

__all__ = ["fold_batch_norm"]


def fold_batch_norm(trunk: nn.Module) -> None:
    """Fold every batch normalisation of a trunk into its convolution, in place; the function computed stays.

    Args:
        trunk: in evaluation mode, since the running statistics are what is folded. A trunk without batch
            normalisation, or one that was folded before, stays as it is.

    """
    for module in list(trunk.modules()):
        if isinstance(module, SameConvNorm) and isinstance(module.norm, nn.BatchNorm2d):
            module.conv = fuse_conv_bn_eval(module.conv, module.norm)
            module.norm = nn.Identity()  # type: ignore[assignment]
