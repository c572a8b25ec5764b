"""The network: one trunk, channel attention, one branch a code length, and the maps between neighbouring lengths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from admth_runtime.errors import InputError
from admth_training.backbones import EfficientNetLite0Trunk, load_imagenet_weights, make_trunk
from admth_training.config import NetworkConfig

__all__ = ["ChannelAttention", "MultiLengthHashNetwork", "build_network"]


class ChannelAttention(nn.Module):
    """Weigh the channels of a feature map by what they respond to on average (the paper's eq. 2-4).

    Eq. 2 averages every channel over the grid, eq. 3 passes the averages through two fully connected layers
    ``sigmoid(W2 relu(W1 G))`` with the given channel reduction, and eq. 4 scales the channels by the result. The
    equations show no bias and neither do the layers. At 256 channels the paper's two statements, "1/16 of the input"
    and "c = 16", are the same.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, max(channels // reduction, 1), bias=False)
        self.excite = nn.Linear(max(channels // reduction, 1), channels, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Return scaled features of the same shape ``[b, channels, h, w]``."""
        average = features.mean(dim=(2, 3))
        scale = torch.sigmoid(self.excite(torch.relu(self.squeeze(average))))
        return features * scale[:, :, None, None]


class MultiLengthHashNetwork(nn.Module):
    """Logits of every code length from one pass; a bit is 1 where its logit is > 0.

    Attributes:
        trunk: the convolutions, which ``freeze_trunk`` keeps as they are.
        attention: channel attention, or the identity.
        shared: fc6 and fc7 where the split comes after them, else only the flattening.
        branches: one for each code length, in order.
        maps: Q_k of eq. 8 between neighbours, ``[shorter, longer]`` or ``[longer, shorter]`` by ``map_direction``;
            used by the objective alone and dropped at export.

    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.trunk = make_trunk(config.backbone, config.size)
        # Kept out of the state: they are constants of the backbone, and part of config.json's facts.
        self.register_buffer("mean", torch.tensor(self.trunk.mean), persistent=False)
        self.register_buffer("scale", 1.0 / torch.tensor(self.trunk.std), persistent=False)
        self.attention = (
            ChannelAttention(self.trunk.channels, config.attention_reduction) if config.attention else nn.Identity()
        )
        width = self.trunk.channels * self.trunk.grid**2
        layers: list[nn.Module] = [nn.Flatten()]
        depth = {"conv": 0, "fc6": 1, "fc7": 2}[config.split]
        for _ in range(depth):
            layers += _hidden_layer(width, config)
            width = config.width
        self.shared = nn.Sequential(*layers)
        hidden = (2 if config.backbone == "cnnf" else 1) - depth
        self.branches = nn.ModuleList(_branch(width, hidden, length, config) for length in config.code_lengths)
        self.maps = nn.ParameterList(_maps(config))
        _initialize(self.shared, self.branches)

    def normalize(self, pixels: Tensor) -> Tensor:
        """Turn uint8 pixels ``[b, H, W, 3]`` into the trunk's float32 input ``[b, 3, H, W]``."""
        mean, scale = self.get_buffer("mean"), self.get_buffer("scale")
        planes = pixels.float().permute(0, 3, 1, 2)
        return (planes - mean[:, None, None]) * scale[:, None, None]

    def features(self, pixels: Tensor) -> Tensor:
        """Return the trunk's features ``[b, channels, grid, grid]`` of uint8 pixels ``[b, H, W, 3]``."""
        return self.trunk(self.normalize(pixels))  # type: ignore[no-any-return]

    def heads(self, features: Tensor) -> tuple[Tensor, ...]:
        """Return logits ``[b, L]`` for every code length, in order, of the trunk's features."""
        shared = self.shared(self.attention(features))
        return tuple(branch(shared) for branch in self.branches)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Return logits, float ``[b, L]`` for every code length in order, of uint8 pixels ``[b, H, W, 3]``, RGB."""
        return self.heads(self.features(pixels))

    def trainable_parts(self) -> Sequence[nn.Module]:
        """Everything but the trunk: what is trained when the trunk is frozen."""
        return (self.attention, self.shared, self.branches, self.maps)


def build_network(
    config: NetworkConfig, *, pretrained: bool = False, seed: int | None = None
) -> MultiLengthHashNetwork:
    """Make a network with fresh weights, the trunk's from ImageNet if asked.

    Args:
        config: its shape.
        pretrained: load ImageNet weights into the trunk; there are some for EfficientNet-Lite0.
        seed: of the fresh weights; the global generator is left as it was. None uses the global generator.

    Raises:
        InputError: there are no ImageNet weights for this backbone.
        MissingExtraError: the package with the weights is not installed.

    """
    if seed is None:
        network = MultiLengthHashNetwork(config)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = MultiLengthHashNetwork(config)
    if pretrained:
        if not isinstance(network.trunk, EfficientNetLite0Trunk):
            raise InputError(f"there are no ImageNet weights for backbone {config.backbone!r}: leave --pretrained out")
        load_imagenet_weights(network.trunk)
    return network


def _hidden_layer(inputs: int, config: NetworkConfig) -> list[nn.Module]:
    return [nn.Linear(inputs, config.width), nn.ReLU(), nn.Dropout(config.dropout_rate)]


def _branch(inputs: int, hidden: int, length: int, config: NetworkConfig) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(hidden):
        layers += _hidden_layer(inputs, config)
        inputs = config.width
    return nn.Sequential(*layers, nn.Linear(inputs, length))


def _initialize(shared: nn.Module, branches: nn.ModuleList) -> None:
    """Start layers before a ReLU as He et al. (2015) do, and code layers as Glorot and Bengio (2010) do.

    Codes then start at a size where pairs differ. PyTorch's own start is about six times smaller here, next to the
    saddle point of the likelihood at zero, and costs several epochs.
    """
    code_layers = {id(branch[-1]) for branch in branches if isinstance(branch, nn.Sequential)}
    for part in (shared, branches):
        for layer in part.modules():
            if isinstance(layer, nn.Linear):
                if id(layer) in code_layers:
                    nn.init.xavier_normal_(layer.weight)
                else:
                    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)


def _maps(config: NetworkConfig) -> list[nn.Parameter]:
    """Start each Q_k as a partial identity: bit i of one code at first predicts bit i of its neighbour."""
    maps = []
    for shorter, longer in zip(config.code_lengths, config.code_lengths[1:], strict=False):
        shape = (shorter, longer) if config.map_direction == "short-to-long" else (longer, shorter)
        maps.append(nn.Parameter(torch.eye(*shape)))
    return maps
