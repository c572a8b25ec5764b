"""The deployed form of a trained network: the same function, rearranged for inference engines, with packed codes.

What changes against the trained network, none of it the function computed:

- Batch normalisation is folded into the convolutions.
- CNN-F's local response normalisation becomes a banded 1x1 convolution over squares and two square roots. Its window
  of five channels is then spelled out in the weights, so that no engine's reading of alpha can differ, and it runs
  several times faster on ONNX Runtime's CPU kernels than the LRN operator or PyTorch's decomposition.
- The first fully connected layers of all branches, which share their input, become one: one pass over the input and
  one synchronisation of the threads instead of one a code length.
- The maps Q_k, which only the objective uses, are dropped.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from admth_training.backbones import LocalResponseNorm
from admth_training.folding import fold_batch_norm
from admth_training.network import MultiLengthHashNetwork

__all__ = ["BandedResponseNorm", "DeployedNetwork"]


class BandedResponseNorm(nn.Module):
    """Local response normalisation, ``x / d^0.75`` with ``d = k + alpha / size * (sum of x^2 over the window)``.

    The exponent 0.75 of the paper's trunk is one square root times a fourth root.

    Nothing in it overflows in FP16, whatever finite FP16 values come in. A square does so from 256 on, and ``d`` where
    the window's values come to 11,400. So with ``t = x / 512`` it computes ``t / (d / 4096)^0.75``, which is the same,
    since ``4096^0.75`` is 512. Both numbers are powers of two, so FP32 results are the same to the bit.
    """

    SCALE = 2.0**-9
    SUM_SCALE = 2.0**-12

    def __init__(self, channels: int, norm: LocalResponseNorm) -> None:
        super().__init__()
        index = torch.arange(channels)
        band = (index[:, None] - index[None, :]).abs() <= norm.size // 2
        self.window_sum = nn.Conv2d(channels, channels, 1)
        with torch.no_grad():
            weight = norm.alpha / norm.size * (self.SUM_SCALE / self.SCALE**2)
            self.window_sum.weight.copy_(band.float()[:, :, None, None] * weight)
            self.window_sum.bias.fill_(norm.k * self.SUM_SCALE)  # type: ignore[union-attr]

    def forward(self, features: Tensor) -> Tensor:
        """Return normalised features of the same shape ``[b, channels, h, w]``."""
        scaled = features * self.SCALE
        root = torch.sqrt(self.window_sum(scaled * scaled))
        return scaled / (root * torch.sqrt(root))


class DeployedNetwork(nn.Module):
    """uint8 images in, packed codes and logits of every length out: the graph that is exported.

    The network that it is made from is left as it was. The large fully connected layers are shared with it where they
    stay as they are, and not copied: CNN-F's four branches take 870 MB.
    """

    def __init__(self, network: MultiLengthHashNetwork) -> None:
        super().__init__()
        trunk, attention = copy.deepcopy((network.trunk, network.attention))
        fold_batch_norm(trunk.eval())
        _band_response_norm(trunk)
        self.code_lengths = network.config.code_lengths
        self.trunk = trunk
        self.attention = attention.eval()
        self.shared = _inference_layers(network.shared)
        self.register_buffer("mean", network.get_buffer("mean")[:, None, None].clone())
        self.register_buffer("scale", network.get_buffer("scale")[:, None, None].clone())
        # MSB first: the first of eight bits counts 128.
        self.register_buffer("bit_values", 2.0 ** torch.arange(7, -1, -1))
        branches = [_inference_layers(branch) for branch in network.branches]
        self.widths = [int(branch[0].out_features) for branch in branches]  # type: ignore[arg-type]
        hidden = all(len(branch) > 1 for branch in branches)
        first = _merge_first_layers(branches)
        self.first = nn.Sequential(first, nn.ReLU()) if hidden else first
        self.rests = nn.ModuleList(branch[2 if hidden else 1 :] for branch in branches)
        for parameter in self.parameters():
            parameter.requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return ``code_L`` uint8 ``[b, L / 8]`` and ``logits_L`` float32 ``[b, L]`` for every length L, in order.

        Args:
            images: uint8 ``[b, H, W, 3]``, RGB.
        """
        # Cast first: TensorRT takes uint8 as a network's input and does nothing else with it.
        planes = images.float().permute(0, 3, 1, 2)
        features = self.trunk((planes - self.get_buffer("mean")) * self.get_buffer("scale"))
        shared = self.shared(self.attention(features))
        outputs: list[Tensor] = []
        together = self.first(shared)
        # A split in one part would stay in the graph as a copy.
        firsts = together.split(self.widths, dim=1) if len(self.widths) > 1 else (together,)
        for length, rest, first in zip(self.code_lengths, self.rests, firsts, strict=True):
            logits = rest(first)
            outputs += [self._pack(logits, length), logits]
        return tuple(outputs)

    def _pack(self, logits: Tensor, length: int) -> Tensor:
        bits = (logits > 0).float().reshape(-1, length // 8, 8)
        return (bits * self.get_buffer("bit_values")).sum(-1).to(torch.uint8)


def _band_response_norm(trunk: nn.Module) -> None:
    channels = 0
    for name, module in list(trunk.named_children()):
        if isinstance(module, nn.Conv2d):
            channels = module.out_channels
        elif isinstance(module, LocalResponseNorm):
            setattr(trunk, name, BandedResponseNorm(channels, module).eval())


def _inference_layers(layers: nn.Module) -> nn.Sequential:
    """Return the layers without dropout; the weights are shared, as parameters of their own."""
    assert isinstance(layers, nn.Sequential)
    kept: list[nn.Module] = []
    for layer in layers:
        if isinstance(layer, nn.Linear):
            shared = nn.Linear(layer.in_features, layer.out_features, device="meta")
            shared.weight = nn.Parameter(layer.weight.detach())
            shared.bias = nn.Parameter(layer.bias.detach())
            kept.append(shared)
        elif not isinstance(layer, nn.Dropout):
            kept.append(copy.deepcopy(layer))
    return nn.Sequential(*kept)


def _merge_first_layers(branches: list[nn.Sequential]) -> nn.Linear:
    firsts = [layer for branch in branches for layer in list(branch)[:1] if isinstance(layer, nn.Linear)]
    merged = nn.Linear(firsts[0].in_features, sum(layer.out_features for layer in firsts))
    with torch.no_grad():
        merged.weight.copy_(torch.cat([layer.weight for layer in firsts]))
        merged.bias.copy_(torch.cat([layer.bias for layer in firsts]))
    return merged
