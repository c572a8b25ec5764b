"""Cross-layer equalisation: give the channels of a tensor ranges that one scale serves.

A channel may be multiplied by any positive number where it is made and divided by it where it is taken; the network
computes the same (Nagel et al. 2019, "Data-free quantization through weight equalization and bias correction"). Small
channels then use more of the steps that the largest channel dictates.

- Between a convolution and a depthwise one it is free: both have a weight scale for every channel.
- In the residual stream, all convolutions that write a sum share one factor a channel, and all that read it divide.
- Elsewhere the reader's weights of one output channel drift apart, as SmoothQuant (Xiao et al. 2023) trades on purpose.

Behind ReLU6 a channel of small values may grow until its largest value is 6.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from admth_calibration.graph import Graph
from admth_calibration.layers import Layer, constant_of, find_layers

if TYPE_CHECKING:
    import onnx

__all__ = ["Equalisation", "equalise", "tensors_to_equalise"]

_MOST = 32.0  # a channel that is nearly always zero is not worth more


@dataclass(frozen=True)
class Equalisation:
    """How far each kind of tensor is equalised: 0 leaves it, 1 gives all channels the same largest value.

    Attributes:
        depthwise: inputs of depthwise convolutions.
        stream: the residual stream.
        dense: inputs of fully connected layers (SmoothQuant).

    Less than 1 leaves room for images whose values are larger than any seen.
    """

    depthwise: float = 0.5
    stream: float = 0.5
    dense: float = 0.0


@dataclass(frozen=True, eq=False)
class _Group:
    """Tensors that share their channels' factors, who makes them and who takes them."""

    tensors: tuple[str, ...]
    writers: tuple[Layer, ...]
    readers: tuple[Layer, ...]
    strength: float


def tensors_to_equalise(graph: Graph, options: Equalisation) -> list[str]:
    """Return the tensors whose channels' extremes :func:`equalise` needs, sorted."""
    return sorted({name for group in _groups(graph, options) for name in group.tensors})


def equalise(graph: Graph, largest: Mapping[str, NDArray[np.float32]], options: Equalisation) -> onnx.ModelProto:
    """Return the same function with its channels equalised.

    Args:
        graph: the FP32 graph; it is left as it was.
        largest: of each tensor of :func:`tensors_to_equalise`, the largest absolute value of every channel (axis 1),
            ``[channels]``, over the calibration images.
        options: how far.
    """
    import onnx

    factors_of_output: dict[str, NDArray[np.float32]] = {}
    factors_of_input: dict[str, NDArray[np.float32]] = {}
    for group in _groups(graph, options):
        found = np.max([largest[name] for name in group.tensors], axis=0)
        ratio = float(found.max()) / np.maximum(found, 1e-9)
        factors = np.minimum(ratio**group.strength, _MOST).astype(np.float32)
        for layer in group.writers:
            factors_of_output[layer.name] = factors
        for layer in group.readers:
            factors_of_input[layer.name] = factors
    changed: dict[str, NDArray[np.float32]] = {}
    for layer in find_layers(graph).values():
        outward, inward = factors_of_output.get(layer.name), factors_of_input.get(layer.name)
        if outward is None and inward is None:
            continue
        rows = layer.rows(constant_of(graph, layer.weight))
        shape = tuple(graph.initializers[layer.weight].dims)
        if inward is not None:
            rows = rows / _per_input(layer, inward, rows)
        if outward is not None:
            rows = rows * outward[:, None]
            if layer.bias is not None:
                changed[layer.bias] = constant_of(graph, layer.bias) * outward
        changed[layer.weight] = layer.from_rows(rows.astype(np.float32), shape)
    result = onnx.ModelProto()
    result.CopyFrom(graph.model)
    for tensor in result.graph.initializer:
        if tensor.name in changed:
            tensor.CopyFrom(onnx.numpy_helper.from_array(changed[tensor.name], tensor.name))
    return result


def _per_input(layer: Layer, factors: NDArray[np.float32], rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the factor of every weight of ``[output channels, inputs of each]``."""
    if layer.kind == "depthwise":
        return factors[:, None]
    return np.repeat(factors, rows.shape[1] // len(factors))[None, :]


def _groups(graph: Graph, options: Equalisation) -> list[_Group]:
    layers = find_layers(graph)
    readers: dict[str, list[Layer]] = {}
    for layer in layers.values():
        readers.setdefault(layer.source, []).append(layer)
    groups = []
    for layer in layers.values():
        takers = graph.consumers.get(layer.result, [])
        found = readers.get(layer.result, [])
        if layer.activation is None or len(takers) != len(found) or not found:
            continue
        kinds = {reader.kind for reader in found}
        strength = options.depthwise if kinds == {"depthwise"} else options.dense if kinds == {"dense"} else 0.0
        if strength:
            groups.append(_Group((layer.result,), (layer,), tuple(found), strength))
    if options.stream:
        groups.extend(_streams(graph, layers.values(), options.stream))
    return groups


def _streams(graph: Graph, layers: Iterable[Layer], strength: float) -> list[_Group]:
    """Return a group for each set of linear tensors that sums join, with nothing but layers before and behind."""
    roots: dict[str, str] = {}

    def root(name: str) -> str:
        while roots.get(name, name) != name:
            name = roots[name]
        return name

    sums = [node for node in graph.nodes if node.op_type == "Add" and not set(node.input) & set(graph.initializers)]
    for node in sums:
        for name in node.input:
            roots[root(name)] = root(node.output[0])
    layers = list(layers)
    linear = {layer.output: layer for layer in layers if layer.activation is None and layer.kind != "dense"}
    names = set(linear) | {name for node in sums for name in (*node.input, *node.output)}
    sets: dict[str, list[str]] = {}
    for name in sorted(names):
        sets.setdefault(root(name), []).append(name)
    made_by_sum = {node.output[0] for node in sums}
    reading = {layer.node.name: layer for layer in layers}
    found = []
    for members in sets.values():
        writers = [linear[name] for name in members if name in linear]
        takers = [node for name in members for node in graph.consumers.get(name, []) if node not in sums]
        whole = all(name in linear or name in made_by_sum for name in members)
        if whole and writers and takers and all(node.name in reading for node in takers):
            readers = [reading[node.name] for node in takers]
            found.append(_Group(tuple(members), tuple(writers), tuple(readers), strength))
    return found
