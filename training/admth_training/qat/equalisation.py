"""Equalisation: channels of one tensor get ranges that one scale serves, before the scales are learned.

A channel may be multiplied where it is made and divided where it is taken, and the network computes the same (Nagel
et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019). All that is written to a
residual stream shares the factors of its channels. Behind a ReLU6 a channel may grow until its largest value is 6.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from admth_training.qat.layers import QuantizedConv2d, QuantizedLayer
from admth_training.qat.tracing import TracedTrunk

__all__ = ["ChannelGroup", "equalise", "find_groups"]

# Most of the way, in logarithms: what activations win, the weights that take them lose.
_STRENGTH = 0.7
_LARGEST_FACTOR = 32.0


@dataclass(frozen=True)
class ChannelGroup:
    """Tensors that share the factors of their channels.

    Attributes:
        writers: names of the layers that make them.
        readers: names of the layers that take them.
        upper: the bound of the activation between, 6 for a ReLU6, or None.

    """

    writers: tuple[str, ...]
    readers: tuple[str, ...]
    upper: float | None


def find_groups(traced: TracedTrunk) -> list[ChannelGroup]:
    """Return what can be equalised at no cost or a small one: inputs of depthwise layers, and residual streams."""
    groups = []
    for node in traced.layers:
        tensor = traced.activated(node)
        readers = [layer for user in tensor.users for layer in traced.layers_after(user)]
        direct = all(traced.layers_after(user) for user in tensor.users)
        if traced.is_activation(tensor) and readers and direct and all(_depthwise(traced, r) for r in readers):
            upper = 6.0 if traced.is_relu6(tensor) else None
            groups.append(ChannelGroup((str(node.target),), tuple(str(r.target) for r in readers), upper))
    return groups + _streams(traced)


def equalise(
    layers: Mapping[str, QuantizedLayer], groups: Sequence[ChannelGroup], largest: Mapping[str, Tensor]
) -> None:
    """Scale weights and biases, in place; the network computes the same in float.

    Args:
        layers: by name.
        groups: of these layers.
        largest: of every reader's input, the largest magnitude of each channel on some images, float32 ``[c]``.

    """
    with torch.no_grad():
        for group in groups:
            found = torch.stack([largest[name] for name in group.readers]).amax(dim=0)
            top = found.max() if group.upper is None else found.new_tensor(group.upper)
            factors = (top / found.clamp_min(1e-9)).pow(_STRENGTH).clamp(1.0, _LARGEST_FACTOR)
            for name in group.writers:
                writer = layers[name]
                writer.weight.mul_(factors.view(-1, 1, 1, 1))
                if writer.bias is not None:
                    writer.bias.mul_(factors)
            for name in group.readers:
                reader = layers[name]
                depthwise = isinstance(reader, QuantizedConv2d) and reader.groups > 1
                reader.weight.div_(factors.view((-1, 1, 1, 1) if depthwise else (1, -1, 1, 1)))


def _streams(traced: TracedTrunk) -> list[ChannelGroup]:
    """Return a group for each set of linear tensors that sums join, with nothing but layers before and behind."""
    parents: dict[fx.Node, fx.Node] = {}

    def root(node: fx.Node) -> fx.Node:
        while parents.get(node, node) is not node:
            node = parents[node]
        return node

    sums = traced.sums
    linear = {traced.activated(node): node for node in traced.layers}
    linear = {tensor: node for tensor, node in linear.items() if not traced.is_activation(tensor)}
    for node in sums:
        for source in node.all_input_nodes:
            parents[root(source)] = root(node)
    members: dict[fx.Node, list[fx.Node]] = {}
    for tensor in [*linear, *sums]:
        members.setdefault(root(tensor), []).append(tensor)
    groups = []
    for tensors in members.values():
        sources = {source for node in tensors if node in sums for source in node.all_input_nodes}
        users = [user for tensor in tensors for user in tensor.users if user not in sums]
        readers = list(dict.fromkeys(layer for user in users for layer in traced.layers_after(user)))
        closed = sources <= set(tensors) and all(traced.layers_after(user) for user in users)
        if closed and readers and not any(_depthwise(traced, reader) for reader in readers):
            writers = tuple(str(linear[tensor].target) for tensor in tensors if tensor in linear)
            groups.append(ChannelGroup(writers, tuple(str(reader.target) for reader in readers), None))
    return groups


def _depthwise(traced: TracedTrunk, node: fx.Node) -> bool:
    layer = traced.layer(node)
    return isinstance(layer, QuantizedConv2d) and layer.groups == layer.in_channels == layer.out_channels > 1
