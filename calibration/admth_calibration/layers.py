"""The layers of a graph that INT8 is for, with what stands around them: activation, residual sum, and shape changes."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from admth_calibration.graph import Graph, matches_layer
from admth_runtime.errors import InputError, ModelError

if TYPE_CHECKING:
    import onnx

__all__ = ["Layer", "check_layer_names", "constant_of", "find_layers", "select_layers"]

# Operators that move values and change none: what stands before and after them shares one scale.
MOVING_OPERATORS = ("Flatten", "MaxPool", "Reshape", "Split", "Squeeze", "Transpose", "Unsqueeze")


@dataclass(frozen=True, eq=False)
class Layer:
    """A convolution or matrix product with constant weights.

    Attributes:
        name: the weight's name without ``.weight``.
        node: its node.
        source: the tensor it takes.
        output: the tensor it makes.
        activation: the ReLU or Clip right after it that alone takes its output, or None.
        weight: name of the weight.
        bias: name of the bias, or None.
        axis: the axis of the output channels in the weight.
        kind: ``"depthwise"`` and ``"conv"`` are convolutions, ``"dense"`` is a matrix product.
    """

    name: str
    node: onnx.NodeProto
    source: str
    output: str
    activation: onnx.NodeProto | None
    weight: str
    bias: str | None
    axis: int
    kind: Literal["depthwise", "conv", "dense"]

    @property
    def result(self) -> str:
        """The tensor behind the activation, or the layer's own output where there is none."""
        return self.output if self.activation is None else str(self.activation.output[0])

    def attributes(self) -> dict[str, Any]:
        """Return the node's attributes as Python values."""
        import onnx

        return {item.name: onnx.helper.get_attribute_value(item) for item in self.node.attribute}

    def rows(self, weight: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return a weight as ``[output channels, inputs of each]``."""
        turned = np.moveaxis(weight, self.axis, 0)
        return np.ascontiguousarray(turned).reshape(len(turned), -1)

    def from_rows(self, rows: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        """Undo :meth:`rows` for a weight of this shape."""
        turned = (shape[self.axis], *(size for axis, size in enumerate(shape) if axis != self.axis))
        return np.ascontiguousarray(np.moveaxis(rows.reshape(turned), 0, self.axis))


def find_layers(graph: Graph) -> dict[str, Layer]:
    """Return every layer that has an INT8 form, by name, in order.

    The convolution inside a response normalisation is left out: it sums squares, and its weights are exact.

    Raises:
        ModelError: a layer is quantised already, or is a Gemm with alpha, beta or transA.
    """
    norms = {node.name for region in graph.response_norms() for node in region}
    found: dict[str, Layer] = {}
    for name, node in graph.layers().items():
        if node.name in norms:
            continue
        takers = graph.consumers.get(node.output[0], [])
        activation = takers[0] if len(takers) == 1 and takers[0].op_type in ("Relu", "Clip") else None
        bias = node.input[2] if len(node.input) > 2 and node.input[2] else None
        if graph.initializers.get(node.input[1]) is None:
            raise ModelError(
                f"the weight of the layer {name} is quantised already: pass the FP32 model of  admth-export onnx"
            )
        axis, kind = _form(graph, node, name)
        found[name] = Layer(name, node, node.input[0], node.output[0], activation, node.input[1], bias, axis, kind)
    return found


def select_layers(layers: Mapping[str, Layer], keep: Collection[str]) -> dict[str, Layer]:
    """Return the layers without those to keep in float.

    Args:
        layers: all of them.
        keep: names, parts of names from the left, or globs.

    Raises:
        InputError: a name to keep matches no layer; the nearest names are given.
    """
    check_layer_names(layers, keep)
    return {name: layer for name, layer in layers.items() if not any(matches_layer(name, pattern) for pattern in keep)}


def check_layer_names(layers: Collection[str], patterns: Collection[str], option: str = "--keep-fp32") -> None:
    """Check that every pattern matches a layer.

    Raises:
        InputError: one does not; the nearest names are given.
    """
    for pattern in patterns:
        if not any(matches_layer(layer, pattern) for layer in layers):
            near = difflib.get_close_matches(pattern, list(layers), 3, 0.3) or list(layers)[:3]
            raise InputError(
                f"{option} {pattern!r} matches no layer: name one such as {', '.join(near)}, or a part of it from the "
                "left"
            )


def constant_of(graph: Graph, name: str) -> NDArray[Any]:
    """Return a constant of the graph as an array."""
    import onnx

    return onnx.numpy_helper.to_array(graph.initializers[name])


def _form(graph: Graph, node: onnx.NodeProto, name: str) -> tuple[int, Literal["depthwise", "conv", "dense"]]:
    """Return the axis of the output channels in the weight, and the kind of the layer."""
    attributes = {attribute.name: attribute for attribute in node.attribute}
    dims = graph.initializers[node.input[1]].dims
    if node.op_type == "Conv":
        groups = attributes["group"].i if "group" in attributes else 1
        return 0, "depthwise" if groups > 1 and dims[1] == 1 and groups == dims[0] else "conv"
    if node.op_type == "MatMul":
        return len(dims) - 1, "dense"
    plain = all(key not in attributes or attributes[key].f == 1.0 for key in ("alpha", "beta"))
    turned = "transA" in attributes and attributes["transA"].i
    if not plain or turned:
        raise ModelError(
            f"the layer {name} is a Gemm with alpha, beta or transA, which has no INT8 form: pass --keep-fp32 {name}"
        )
    return (0 if "transB" in attributes and attributes["transB"].i else 1), "dense"
