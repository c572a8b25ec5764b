"""FP32 ONNX to INT8 ONNX with explicit Q/DQ, in the form that TensorRT compiles.

TensorRT's rules (Developer Guide, "Explicit quantisation"): symmetric, zero point 0 and of type int8, activations with
one scale a tensor, weights with one a channel, scales above zero, round half to even. The inputs of convolutions and
matrix products are quantised, their outputs and biases are not: TensorRT fuses the pieces itself. Weights are stored
as int8, a quarter of the size.

Every scale is a number that FP16 has, rounded up before the weights are rounded with it, so converting the rest of the
model to FP16 afterwards changes no quantised value.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from admth_calibration.graph import Graph, matches_layer
from admth_calibration.probing import Range
from admth_runtime.errors import InputError, ModelError

if TYPE_CHECKING:
    import onnx

__all__ = [
    "QuantizedModel",
    "layers_to_quantize",
    "pixel_scale",
    "quantize",
    "quantize_weight",
    "representable_scale",
    "tensors_to_range",
]

_LARGEST = 127.0


@dataclass(frozen=True, eq=False)
class QuantizedModel:
    """An INT8 model.

    Attributes:
        model: the model, with the inputs and outputs of the FP32 one.
        layers: names of the layers in INT8.
        kept: names of the layers with weights that stay in FP32.
        scales: scale of each quantised activation, by tensor.
    """

    model: onnx.ModelProto
    layers: tuple[str, ...]
    kept: tuple[str, ...]
    scales: Mapping[str, float]


def layers_to_quantize(graph: Graph, keep_fp32: Collection[str] = ()) -> dict[str, onnx.NodeProto]:
    """Return the nodes to quantise, by layer name, in order.

    The convolution inside a response normalisation is left out: it sums squares, and its weights are exact.

    Raises:
        InputError: a name to keep matches no layer.
    """
    norms = {node.name for region in graph.response_norms() for node in region}
    layers = {layer: node for layer, node in graph.layers().items() if node.name not in norms}
    for pattern in keep_fp32:
        if not any(matches_layer(layer, pattern) for layer in layers):
            raise InputError(
                f"--keep-fp32 {pattern!r} matches no layer: name one such as {', '.join(list(layers)[:3])}, or a part "
                "of it from the left"
            )
    return {
        layer: node for layer, node in layers.items() if not any(matches_layer(layer, pattern) for pattern in keep_fp32)
    }


def tensors_to_range(layers: Mapping[str, onnx.NodeProto]) -> list[str]:
    """Return the activations whose ranges are needed: the first input of each layer, each once."""
    return list(dict.fromkeys(node.input[0] for node in layers.values()))


def quantize(
    model: onnx.ModelProto, ranges: Mapping[str, Range], layers: Mapping[str, onnx.NodeProto]
) -> QuantizedModel:
    """Put Q/DQ pairs before the layers and store their weights as int8.

    Args:
        model: the FP32 model; it is left as it was.
        ranges: of every tensor of :func:`tensors_to_range`.
        layers: what :func:`layers_to_quantize` returned for this model.

    Raises:
        ModelError: a range is not finite, or a layer has a form that has no INT8 counterpart.
    """
    import onnx

    graph = Graph(model)
    scales = {name: _activation_scale(graph, name, ranges[name]) for name in tensors_to_range(layers)}
    chosen = {node.name: layer for layer, node in layers.items()}
    result = onnx.ModelProto()
    result.ir_version = model.ir_version
    result.producer_name, result.producer_version = model.producer_name, model.producer_version
    result.opset_import.extend(model.opset_import)
    result.metadata_props.extend(model.metadata_props)
    result.graph.name = model.graph.name
    result.graph.input.extend(model.graph.input)
    result.graph.output.extend(model.graph.output)
    emitter = _Emitter(graph, result.graph, scales)
    for node in model.graph.node:
        emitter.copy(node, chosen.get(node.name))
    emitter.finish()
    others = tuple(layer for layer in graph.layers() if layer not in layers)
    return QuantizedModel(result, tuple(layers), others, scales)


def quantize_weight(weight: NDArray[np.float32], axis: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Round a weight to int8, symmetric, with one scale for each index of an axis.

    Args:
        weight: float32, of any rank.
        axis: the axis of the output channels.

    Returns:
        int8 of the same shape, and float32 scales ``[channels]``, all above zero and all numbers that FP16 has.
    """
    others = tuple(index for index in range(weight.ndim) if index != axis)
    largest = np.abs(weight).max(axis=others, initial=0.0)
    scales = np.array([representable_scale(float(value) / _LARGEST) for value in largest], dtype=np.float32)
    shape = [1] * weight.ndim
    shape[axis] = -1
    rounded = np.rint(weight / scales.reshape(shape))
    return np.clip(rounded, -_LARGEST, _LARGEST).astype(np.int8), scales


def representable_scale(scale: float) -> float:
    """Return the smallest positive FP16 number that is not below ``scale``; 1 for a scale of zero."""
    if scale == 0.0:
        return 1.0
    half = np.float16(scale)
    if float(half) < scale:
        half = np.nextafter(half, np.float16(np.inf))
    return float(half)


def pixel_scale(graph: Graph, tensor: str) -> float | None:
    """Return the scale that holds every pixel value exactly, where the tensor is normalised pixels on such a grid.

    With ``(pixel - 127) / 128`` a scale of 1/128 maps pixel values onto the integers -127 to 128, of which int8 lacks
    the last alone. A scale from the range, 1/127, would round every one of them.
    """
    multiply = graph.producers.get(tensor)
    constant = None if multiply is None or multiply.op_type != "Mul" else _constant_input(graph, multiply)
    if multiply is None or constant is None:
        return None
    subtract = graph.producers.get(multiply.input[0] if multiply.input[1] in graph.initializers else multiply.input[1])
    mean = None if subtract is None or subtract.op_type != "Sub" else _constant_input(graph, subtract)
    if subtract is None or mean is None or subtract.name not in {node.name for node in graph.normalisation()}:
        return None
    scale = float(constant.flat[0])
    on_grid = bool((constant == constant.flat[0]).all() and (mean == np.rint(mean)).all())
    fits = bool((mean >= 127).all() and (mean <= 128).all())
    return scale if on_grid and fits and representable_scale(scale) == scale else None


def _constant_input(graph: Graph, node: onnx.NodeProto) -> NDArray[np.float32] | None:
    import onnx

    names = [name for name in node.input if name in graph.initializers]
    return onnx.numpy_helper.to_array(graph.initializers[names[0]]) if len(names) == 1 else None


def _activation_scale(graph: Graph, name: str, found: Range) -> float:
    if not np.isfinite(found.largest):
        raise ModelError(f"the tensor {name} is not finite on the calibration images: train again, or leave it in FP32")
    exact = pixel_scale(graph, name)
    return exact if exact is not None else representable_scale(found.largest / _LARGEST)


class _Emitter:
    """Copies nodes in order and puts Q/DQ pairs right before the first node that takes them."""

    def __init__(self, graph: Graph, target: onnx.GraphProto, scales: Mapping[str, float]) -> None:
        self._graph = graph
        self._target = target
        self._scales = scales
        self._activations: dict[str, str] = {}
        self._weights: dict[str, str] = {}

    def copy(self, node: onnx.NodeProto, layer: str | None) -> None:
        if layer is None:
            self._target.node.add().CopyFrom(node)
            return
        axis = _weight_axis(self._graph, node, layer)
        activation = self._activation(node.input[0])
        weight = self._weight(node.input[1], axis, layer)
        copied = self._target.node.add()
        copied.CopyFrom(node)
        copied.input[0], copied.input[1] = activation, weight

    def finish(self) -> None:
        """Add the constants that are still taken in FP32."""
        used = {name for node in self._target.node for name in node.input}
        self._target.initializer.extend(tensor for name, tensor in self._graph.initializers.items() if name in used)

    def _activation(self, name: str) -> str:
        if name not in self._activations:
            self._constant(f"{name}.scale", np.array(self._scales[name], dtype=np.float32))
            self._constant(f"{name}.zero", np.array(0, dtype=np.int8))
            parameters = [f"{name}.scale", f"{name}.zero"]
            self._node("QuantizeLinear", [name, *parameters], f"{name}.int8")
            self._node("DequantizeLinear", [f"{name}.int8", *parameters], f"{name}.dequantized")
            self._activations[name] = f"{name}.dequantized"
        return self._activations[name]

    def _weight(self, name: str, axis: int, layer: str) -> str:
        import onnx

        if name not in self._weights:
            weight = onnx.numpy_helper.to_array(self._graph.initializers[name])
            if not bool(np.isfinite(weight).all()):
                raise ModelError(f"the weights of {layer} are not finite: train again")
            values, scales = quantize_weight(weight, axis)
            self._constant(f"{name}.int8", values)
            self._constant(f"{name}.scale", scales)
            self._constant(f"{name}.zero", np.zeros(len(scales), dtype=np.int8))
            inputs = [f"{name}.int8", f"{name}.scale", f"{name}.zero"]
            self._node("DequantizeLinear", inputs, f"{name}.dequantized", axis=axis)
            self._weights[name] = f"{name}.dequantized"
        return self._weights[name]

    def _node(self, operator: str, inputs: list[str], output: str, *, axis: int | None = None) -> None:
        import onnx

        name = f"{'quantize' if operator == 'QuantizeLinear' else 'dequantize'}.{output}"
        self._target.node.append(onnx.helper.make_node(operator, inputs, [output], name=name, axis=axis))

    def _constant(self, name: str, values: NDArray[np.generic]) -> None:
        import onnx

        self._target.initializer.append(onnx.numpy_helper.from_array(values, name))


def _weight_axis(graph: Graph, node: onnx.NodeProto, layer: str) -> int:
    """Return the axis of a layer's output channels in its weight."""
    attributes = {attribute.name: attribute for attribute in node.attribute}
    rank = len(graph.initializers[node.input[1]].dims)
    if node.op_type == "Conv":
        return 0
    if node.op_type == "MatMul":
        return rank - 1
    plain = all(name not in attributes or attributes[name].f == 1.0 for name in ("alpha", "beta"))
    turned = "transA" in attributes and attributes["transA"].i
    if not plain or turned:
        raise ModelError(
            f"the layer {layer} is a Gemm with alpha, beta or transA, which has no INT8 form: pass --keep-fp32 {layer}"
        )
    return 0 if "transB" in attributes and attributes["transB"].i else rank - 1
