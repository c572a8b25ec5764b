"""The network in float and in INT8, side by side, layer after layer, on a block of calibration images.

Every layer's integers are chosen while the inputs of both are at hand: what the layer really gets, with the rounding
of everything before it, and what it should make of it. Errors are then made good where they arise, in layer order;
correcting all layers at once against the float network's outputs diverges.

Memory holds one block of images at two tensors a live edge of the graph, whatever the number of calibration images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from admth_calibration.affine import Affine, bias_steps
from admth_calibration.graph import Graph
from admth_calibration.layers import Layer, constant_of
from admth_calibration.places import Places
from admth_calibration.probing import session_options
from admth_runtime.manifest import INPUT_NAME

if TYPE_CHECKING:
    import onnx

__all__ = ["FitLayer", "IntegerLayer", "LayerInputs", "fit_layers"]

Array = NDArray[Any]

_NEWTON_STEPS = 3
_LEAST_ACTIVE = 0.02


@dataclass(frozen=True, eq=False)
class IntegerLayer:
    """A layer's weights as integers.

    Attributes:
        values: int8, in the weight's own shape.
        scales: float32 ``[output channels]``.
        bias: float32 ``[output channels]``, corrected for all that is rounded before the layer.
        own_bias: the bias corrected for the layer's own weights alone: for a model with everything else in float.
    """

    values: NDArray[np.int8]
    scales: NDArray[np.float32]
    bias: NDArray[np.float32]
    own_bias: NDArray[np.float32]

    def alone(self) -> IntegerLayer:
        """Return the layer as it is right where it alone is in INT8."""
        return IntegerLayer(self.values, self.scales, self.own_bias, self.own_bias)

    def weight(self, layer: Layer) -> NDArray[np.float32]:
        """Return the weight that the integers stand for."""
        shape = [1] * self.values.ndim
        shape[layer.axis] = -1
        return self.values.astype(np.float32) * self.scales.reshape(shape)


@dataclass(frozen=True, eq=False)
class LayerInputs:
    """What a layer's integers are chosen from.

    Attributes:
        layer: the layer.
        weight: its float weight.
        bias: its float bias, zeros where it has none, ``[output channels]``.
        exact: its input in the float network.
        rounded: its input in the INT8 network, dequantised.
        affine: how that input is quantised.
    """

    layer: Layer
    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    exact: NDArray[np.float32]
    rounded: NDArray[np.float32]
    affine: Affine


FitLayer = Callable[[LayerInputs], IntegerLayer]


def fit_layers(
    graph: Graph,
    layers: Mapping[str, Layer],
    places: Places,
    affines: Mapping[str, Affine],
    pixels: NDArray[np.uint8],
    fit: FitLayer,
    *,
    correct_bias: bool,
    advance: Callable[[int], None] = lambda layers: None,
) -> dict[str, IntegerLayer]:
    """Choose every layer's integers, in order.

    Args:
        graph: the FP32 graph.
        layers: the layers in INT8.
        places: the quantised tensors.
        affines: how each of them is quantised.
        pixels: a block of images, uint8 ``[n, H, W, 3]``.
        fit: chooses a layer's integers.
        correct_bias: shift each bias by the mean of what is still wrong behind the layer.
        advance: called with 1 after each layer.

    Returns:
        The integers by layer, in order.
    """
    runner = _Lockstep(graph, places, affines, pixels)
    by_node = {layer.node.name: layer for layer in layers.values()}
    packing = {node.name for node in graph.packing()}
    fitted: dict[str, IntegerLayer] = {}
    for node in graph.nodes:
        if node.name in packing:
            continue
        layer = by_node.get(node.name)
        if layer is None:
            runner.run(node)
        else:
            fitted[layer.name] = runner.fit(layer, fit, correct_bias)
            advance(1)
        runner.release(node)
    return fitted


class _Lockstep:
    """The live tensors of both networks."""

    def __init__(self, graph: Graph, places: Places, affines: Mapping[str, Affine], pixels: NDArray[np.uint8]) -> None:
        self._graph = graph
        self._places = places
        self._affines = affines
        packing = {node.name for node in graph.packing()}
        self._left = Counter(name for node in graph.nodes if node.name not in packing for name in node.input)
        self._exact: dict[str, Array] = {INPUT_NAME: pixels}
        # The same object where both networks still agree, so that a node need not run twice.
        self._rounded: dict[str, Array] = {INPUT_NAME: pixels}
        self._quantized: dict[str, Array] = {}

    def run(self, node: onnx.NodeProto) -> None:
        constants = self._constants(node)
        feeds = {name: self._exact[name] for name in node.input if name in self._exact}
        rounded = {name: self._rounded[name] for name in feeds}
        outputs = _run_node(node, feeds, constants)
        same = all(rounded[name] is feeds[name] for name in feeds)
        others = outputs if same else _run_node(node, rounded, constants)
        for name, exact, other in zip(node.output, outputs, others, strict=True):
            self._put(name, exact, other)

    def fit(self, layer: Layer, fit: FitLayer, correct_bias: bool) -> IntegerLayer:
        exact, rounded = self._exact[layer.source], self._quantized[layer.source]
        weight = constant_of(self._graph, layer.weight)
        channels = weight.shape[layer.axis]
        bias = np.zeros(channels, dtype=np.float32) if layer.bias is None else constant_of(self._graph, layer.bias)
        inputs = LayerInputs(layer, weight, bias, exact, rounded, self._affines[layer.source])
        chosen = fit(inputs)
        wanted = _apply(layer, exact, weight, bias)
        found = _apply(layer, rounded, chosen.weight(layer), chosen.bias)
        if correct_bias:
            shift = _bias_shift(wanted, found, self._bounds(layer))
            own = _apply(layer, exact, chosen.weight(layer), chosen.bias)
            own_bias = chosen.bias + _bias_shift(wanted, own, self._bounds(layer))
            chosen = IntegerLayer(chosen.values, chosen.scales, chosen.bias + shift, own_bias)
            found += shift.reshape(1, -1, *[1] * (found.ndim - 2))
        if self._places.target == "cpu":  # where the bias is an integer as well
            steps, scales = bias_steps(chosen.bias, inputs.affine.scale, chosen.scales)
            rounding = (steps * scales.astype(np.float64) - chosen.bias).astype(np.float32)
            found += rounding.reshape(1, -1, *[1] * (found.ndim - 2))
        self._put(layer.output, wanted, found)
        return chosen

    def _bounds(self, layer: Layer) -> tuple[float, float]:
        """Return the bounds that the layer's activation sets."""
        if layer.activation is None:
            return -np.inf, np.inf
        if layer.activation.op_type == "Relu":
            return 0.0, np.inf
        low, high = (float(constant_of(self._graph, name)) for name in layer.activation.input[1:3])
        return low, high

    def release(self, node: onnx.NodeProto) -> None:
        """Drop what no later node takes."""
        for name in node.input:
            self._left[name] -= 1
            if not self._left[name]:
                for tensors in (self._exact, self._rounded, self._quantized):
                    tensors.pop(name, None)

    def _put(self, name: str, exact: Array, rounded: Array) -> None:
        self._exact[name] = exact
        self._rounded[name] = rounded
        if name in self._places.tensors:
            self._quantized[name] = self._affines[name].round(rounded)
            if self._places.target == "cpu":  # every taker gets the quantised tensor there
                self._rounded[name] = self._quantized[name]

    def _constants(self, node: onnx.NodeProto) -> dict[str, Array]:
        return {name: constant_of(self._graph, name) for name in node.input if name in self._graph.initializers}


def _bias_shift(
    wanted: NDArray[np.float32], found: NDArray[np.float32], bounds: tuple[float, float]
) -> NDArray[np.float32]:
    """Return what to add to each channel's bias so that its mean behind the activation is right.

    Before a ReLU the mean would not do: rounding noise around zero comes out of it as a positive mean, and the average
    pool at the end adds up what the channels that hardly ever fire have of it.
    """
    others = tuple(axis for axis in range(wanted.ndim) if axis != 1)
    shape = [1] * wanted.ndim
    shape[1] = -1
    shift = wanted.mean(axis=others, dtype=np.float64) - found.mean(axis=others, dtype=np.float64)
    if np.isinf(bounds).all():
        return np.asarray(shift, dtype=np.float32)
    target = np.clip(wanted, *bounds).mean(axis=others, dtype=np.float64)
    spread = np.sqrt(np.square(wanted - found).mean(axis=others, dtype=np.float64))
    for _ in range(_NEWTON_STEPS):
        moved = found + shift.astype(np.float32).reshape(shape)
        active = ((moved > bounds[0]) & (moved < bounds[1])).mean(axis=others)
        missing = target - np.clip(moved, *bounds).mean(axis=others, dtype=np.float64)
        # A channel that hardly fires would be moved far for the sake of a few values.
        shift += np.clip(missing / np.maximum(active, _LEAST_ACTIVE), -spread, spread)
    return np.asarray(shift, dtype=np.float32)


def _apply(
    layer: Layer, values: NDArray[np.float32], weight: NDArray[np.float32], bias: NDArray[np.float32]
) -> NDArray[np.float32]:
    if layer.kind == "dense":  # without the copies that a model of the weight would take
        product: NDArray[np.float32] = values @ (weight.T if layer.axis == 0 else weight)
        product += bias
        return product
    import onnx

    node = onnx.NodeProto()
    node.CopyFrom(layer.node)
    del node.input[2:]
    node.input.append("bias")
    found: NDArray[np.float32] = _run_node(node, {layer.source: values}, {layer.weight: weight, "bias": bias})[0]
    return found


def _run_node(node: onnx.NodeProto, feeds: Mapping[str, Array], constants: Mapping[str, Array]) -> list[Array]:
    """Run one node on ONNX Runtime, so that what is simulated is what the engine's own kernels compute."""
    import onnx
    import onnxruntime as ort
    from onnx import helper

    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), [None] * value.ndim)
        for name, value in feeds.items()
    ]
    outputs = [helper.make_value_info(name, onnx.TypeProto()) for name in node.output]
    graph = helper.make_graph([node], "node", inputs, outputs)
    graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in constants.items())
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), session_options(), providers=["CPUExecutionProvider"])
    results: list[Array] = session.run(None, dict(feeds))
    return results
