"""CNN-F, the paper's trunk: the "fast" network of Chatfield et al., "Return of the Devil in the Details", 2014.

The layer list is that of MatConvNet's ``cnn_imagenet_init`` (vgg-f), up to pool5.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from admth_training.backbones.trunk import Trunk

__all__ = ["CnnFTrunk", "LocalResponseNorm"]


class LocalResponseNorm(nn.Module):
    """Normalisation across neighbouring channels: ``y = x / (k + alpha / size * sum(x^2)) ^ beta``.

    MatConvNet's ``[N kappa alpha beta] = [5 2 1e-4 0.75]`` does not divide alpha by N; PyTorch and ONNX do, so the
    same function has alpha 5e-4 here. It is computed in FP32 also under autocast, since squares overflow in FP16.
    """

    size = 5
    alpha = 5e-4
    beta = 0.75
    k = 2.0

    def forward(self, features: Tensor) -> Tensor:
        """Return the normalised features, of the same shape ``[b, c, h, w]``."""
        with torch.autocast(device_type=features.device.type, enabled=False):
            return F.local_response_norm(features.float(), self.size, self.alpha, self.beta, self.k)


class CnnFTrunk(Trunk):
    """conv1 to pool5: 256 channels on a 6x6 grid at 224 pixels.

    The mean is that of ImageNet's training images, the average of MatConvNet's mean image.
    """

    mean = (123.68, 116.779, 103.939)
    std = (1.0, 1.0, 1.0)

    def __init__(self, size: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 11, stride=4)
        self.norm1 = LocalResponseNorm()
        self.pool1 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv2 = nn.Conv2d(64, 256, 5, padding=2)
        self.norm2 = LocalResponseNorm()
        self.pool2 = nn.MaxPool2d(3, 2)
        self.conv3 = nn.Conv2d(256, 256, 3, padding=1)
        self.conv4 = nn.Conv2d(256, 256, 3, padding=1)
        self.conv5 = nn.Conv2d(256, 256, 3, padding=1)
        self.pool5 = nn.MaxPool2d(3, 2)
        self.channels = 256
        self.grid = _grid(size)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return pool5 ``[b, 256, grid, grid]`` of mean-subtracted pixels ``[b, 3, size, size]``."""
        x = self.pool1(self.norm1(F.relu(self.conv1(pixels))))
        x = self.pool2(self.norm2(F.relu(self.conv2(x))))
        x = F.relu(self.conv3(x))
        x = F.relu(self.conv4(x))
        return self.pool5(F.relu(self.conv5(x)))  # type: ignore[no-any-return]


def _grid(size: int) -> int:
    conv1 = (size - 11) // 4 + 1
    pool1 = -(-(conv1 - 3) // 2) + 1
    pool2 = (pool1 - 3) // 2 + 1
    return (pool2 - 3) // 2 + 1
