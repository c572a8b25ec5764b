"""Normalised pixels that INT8 holds exactly: 256 levels of a pixel on 256 integers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from admth_calibration.affine import representable_scale
from admth_calibration.graph import Graph
from admth_calibration.layers import constant_of, find_layers

if TYPE_CHECKING:
    import onnx

__all__ = ["PixelGrid", "pixel_grid", "with_exact_pixels"]

_MIDDLE = 128


@dataclass(frozen=True, eq=False)
class PixelGrid:
    """Normalisation ``(pixel - mean) * scale`` with one integer mean, so that pixels are ``scale`` times integers.

    Attributes:
        scale: real value of one level.
        mean: 127 or 128.
        nodes: the nodes of the normalisation, from the pixels on, in order.
    """

    scale: float
    mean: int
    nodes: tuple[onnx.NodeProto, ...]


@dataclass(frozen=True, eq=False)
class _Normalisation:
    """``(pixel - mean) * scale``, a channel each."""

    mean: NDArray[np.float32]
    scale: NDArray[np.float32]
    subtract: onnx.NodeProto
    multiply: onnx.NodeProto | None


def pixel_grid(graph: Graph, tensor: str) -> PixelGrid | None:
    """Return the grid that holds every pixel value exactly, where a tensor is normalised pixels on one.

    With ``(pixel - 127) / 128`` a scale of 1/128 maps pixel values onto the integers -127 to 128: all of them with
    uint8 and zero point 127, all but the last with int8. A scale from the range, 1/127, would round every one.
    """
    found = _normalisation(graph, tensor)
    if found is None:
        return None
    scale, mean = float(found.scale.flat[0]), float(found.mean.flat[0])
    if (found.scale != scale).any() or (found.mean != mean).any() or mean not in (127, 128):
        return None
    if representable_scale(scale) != scale:
        return None
    nodes = graph.normalisation()
    return PixelGrid(scale, int(mean), tuple(nodes))


def with_exact_pixels(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the same function with its normalisation on the integer grid, where the first convolution allows it.

    Mean and scale move into the convolution's weights and bias, which leaves ``pixel - 128``. Padding stands for
    pixels of the mean value, so that only a convolution without padding can take them over; otherwise, and where
    the pixels are on a grid already, the model is returned as it is.
    """
    import onnx

    graph = Graph(model)
    layers = find_layers(graph)
    first = next(iter(layers.values()), None)
    found = None if first is None or first.kind != "conv" else _normalisation(graph, first.source)
    if first is None or found is None or pixel_grid(graph, first.source) is not None:
        return model
    attributes = first.attributes()
    if any(attributes.get("pads", [0])) or attributes.get("auto_pad", b"NOTSET") != b"NOTSET":
        return model
    weight = constant_of(graph, first.weight)
    channels = weight.shape[1]
    mean, scale = (np.broadcast_to(value.reshape(-1), channels) for value in (found.mean, found.scale))
    folded = (weight * scale.reshape(1, -1, 1, 1)).astype(np.float32)
    shift = (folded.sum(axis=(2, 3), dtype=np.float64) @ (_MIDDLE - mean.astype(np.float64))).astype(np.float32)
    bias = np.zeros(len(weight), dtype=np.float32) if first.bias is None else constant_of(graph, first.bias)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    names = {"weight": f"{first.name}.weight", "bias": f"{first.name}.bias", "mean": "admth.pixel_mean"}
    _replace(result, {first.weight, first.bias or ""}, {names["weight"]: folded, names["bias"]: bias + shift})
    result.graph.initializer.append(
        onnx.numpy_helper.from_array(np.full((1, 1, 1), _MIDDLE, dtype=np.float32), names["mean"])
    )
    for node in result.graph.node:
        if node.name == first.node.name:
            del node.input[:]
            node.input.extend([found.subtract.output[0], names["weight"], names["bias"]])
        elif node.name == found.subtract.name:
            node.input[1] = names["mean"]
    if found.multiply is not None:
        kept = [node for node in result.graph.node if node.name != found.multiply.name]
        del result.graph.node[:]
        result.graph.node.extend(kept)
    return result


def _normalisation(graph: Graph, tensor: str) -> _Normalisation | None:
    last = graph.producers.get(tensor)
    if last is None or last.op_type not in ("Mul", "Sub"):
        return None
    multiply = last if last.op_type == "Mul" else None
    scale = np.ones(1, dtype=np.float32) if multiply is None else _constant_input(graph, multiply)
    subtract = last if multiply is None else graph.producers.get(multiply.input[0])
    if scale is None or subtract is None or subtract.op_type != "Sub":
        return None
    mean = _constant_input(graph, subtract)
    if mean is None or subtract.name not in {node.name for node in graph.normalisation()}:
        return None
    return _Normalisation(mean, scale, subtract, multiply)


def _constant_input(graph: Graph, node: onnx.NodeProto) -> NDArray[np.float32] | None:
    return constant_of(graph, node.input[1]) if node.input[1] in graph.initializers else None


def _replace(model: onnx.ModelProto, old: set[str], new: dict[str, NDArray[np.float32]]) -> None:
    import onnx

    kept = [tensor for tensor in model.graph.initializer if tensor.name not in old]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in new.items())
