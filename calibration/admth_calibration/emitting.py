"""Writing an INT8 graph: Q/DQ pairs around layers, weights and biases as integers, in the form each target compiles.

For the CPU, ONNX Runtime fuses ``DQ -> Conv -> Q`` to QLinearConv and ``DQ -> Gemm`` to QGemm where every Q and DQ has
a zero point, the bias is int32 with scale ``input scale * weight scale`` to the last bit, and a convolution's output
is quantised. An activation whose bounds the uint8 range has is left out: saturation does its work.

For TensorRT, inputs and weights alone are quantised, biases are float, zero points are 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from admth_calibration.affine import Affine, bias_steps
from admth_calibration.graph import Graph
from admth_calibration.layers import Layer, constant_of
from admth_calibration.lockstep import IntegerLayer
from admth_calibration.pixels import pixel_grid
from admth_calibration.places import Places
from admth_runtime.manifest import INPUT_NAME

if TYPE_CHECKING:
    import onnx

__all__ = ["emit"]


def emit(
    graph: Graph,
    layers: Mapping[str, Layer],
    places: Places,
    affines: Mapping[str, Affine],
    integers: Mapping[str, IntegerLayer],
) -> onnx.ModelProto:
    """Write the INT8 model.

    Args:
        graph: the FP32 graph; it is left as it was.
        layers: the layers in INT8.
        places: the quantised tensors.
        affines: how each of them is quantised.
        integers: weights and bias of each of the layers.

    Returns:
        A model with the inputs, outputs and metadata of the FP32 one.
    """
    import onnx

    model = graph.model
    result = onnx.ModelProto()
    result.ir_version = model.ir_version
    result.producer_name, result.producer_version = model.producer_name, model.producer_version
    result.opset_import.extend(model.opset_import)
    result.metadata_props.extend(model.metadata_props)
    result.graph.name = model.graph.name
    result.graph.input.extend(model.graph.input)
    result.graph.output.extend(model.graph.output)
    emitter = _Emitter(graph, result.graph, places, affines)
    chosen = {layer.node.name: layer for layer in layers.values()}
    emitter.start()
    for node in graph.nodes:
        layer = chosen.get(node.name)
        if layer is None:
            emitter.copy(node)
        else:
            emitter.layer(layer, integers[layer.name])
    emitter.finish()
    return result


class _Emitter:
    """Copies nodes in order, and puts Q/DQ pairs behind the tensors that have them."""

    def __init__(self, graph: Graph, target: onnx.GraphProto, places: Places, affines: Mapping[str, Affine]) -> None:
        self._graph = graph
        self._target = target
        self._places = places
        self._affines = affines
        self._cpu = places.target == "cpu"
        self._dequantized: dict[str, str] = {}
        self._done: set[str] = set()
        norms = {node.name for region in graph.response_norms() for node in region}
        self._window_sums = {node.name for node in graph.nodes if node.op_type == "Conv" and node.name in norms}

    def start(self) -> None:
        """On the CPU, let exact pixels in as the integers that they are, without a float normalisation."""
        if not self._cpu:
            return
        for name in self._places.tensors:
            grid = pixel_grid(self._graph, name)
            transposes = [node for node in grid.nodes if node.op_type == "Transpose"] if grid else []
            if grid is None or len(transposes) != 1:
                continue
            self._constant("images.scale", np.array(grid.scale, dtype=np.float32))
            self._constant("images.zero", np.array(grid.mean, dtype=np.uint8))
            self._node("DequantizeLinear", [INPUT_NAME, "images.scale", "images.zero"], "images.normalised")
            moved = self._target.node.add()
            moved.CopyFrom(transposes[0])
            moved.input[0], moved.output[0] = "images.normalised", name
            self._done.update(node.name for node in grid.nodes)
            self._pair(name)

    def copy(self, node: onnx.NodeProto) -> None:
        """Copy a node that stays in float; it takes quantised tensors on the CPU alone."""
        if node.name in self._done:
            return
        if self._cpu and node.name in self._window_sums:
            self._window_sum(node)
            return
        copied = self._target.node.add()
        copied.CopyFrom(node)
        if self._cpu:
            for index, name in enumerate(copied.input):
                copied.input[index] = self._dequantized.get(name, name)
        self._pairs(node.output)

    def layer(self, layer: Layer, integers: IntegerLayer) -> None:
        """Write a layer in INT8."""
        import onnx

        affine = self._affines[layer.source]
        copied = onnx.NodeProto()
        copied.CopyFrom(layer.node)
        weight = self._weight(layer, integers, copied)
        bias = self._bias(layer, integers, affine)
        del copied.input[:]
        copied.input.extend([self._dequantized[layer.source], weight, bias])
        if copied.op_type == "MatMul":
            copied.op_type = "Gemm"  # which has a place for the bias
        if self._saturates(layer):
            assert layer.activation is not None
            copied.output[0] = layer.result
            self._done.add(layer.activation.name)
        self._target.node.append(copied)
        self._pairs(copied.output)

    def finish(self) -> None:
        """Add the constants that are still taken in float."""
        used = {name for node in self._target.node for name in node.input}
        self._target.initializer.extend(tensor for name, tensor in self._graph.initializers.items() if name in used)

    def _window_sum(self, node: onnx.NodeProto) -> None:
        """Write a response normalisation's 1x1 convolution as a matrix product over the last axis.

        INT8 convolutions work on channels-last tensors. ONNX Runtime then needs no transposition around this float
        island, and pools the bytes behind it with its fast kernel: 0.5 ms instead of 1.9 of CNN-F's 11.
        """
        import onnx

        source = self._dequantized.get(node.input[0], node.input[0])
        band = constant_of(self._graph, node.input[1])
        names = [f"{node.output[0]}.{part}" for part in ("last", "product", "sum")]
        self._constant(f"{names[1]}.weight", np.ascontiguousarray(band[:, :, 0, 0].T))
        self._constant(f"{names[2]}.bias", constant_of(self._graph, node.input[2]))
        make = onnx.helper.make_node
        self._target.node.extend(
            [
                make("Transpose", [source], [names[0]], name=names[0], perm=[0, 2, 3, 1]),
                make("MatMul", [names[0], f"{names[1]}.weight"], [names[1]], name=names[1]),
                make("Add", [names[1], f"{names[2]}.bias"], [names[2]], name=names[2]),
                make("Transpose", [names[2]], [node.output[0]], name=node.name, perm=[0, 3, 1, 2]),
            ]
        )

    def _saturates(self, layer: Layer) -> bool:
        """Whether the integers' bounds do all that the activation would."""
        if not self._cpu or layer.activation is None or layer.result not in self._places.tensors:
            return False
        low, high = self._affines[layer.result].bounds
        if low < 0:
            return False
        if layer.activation.op_type == "Relu":
            return True
        bounds = [float(constant_of(self._graph, name)) for name in layer.activation.input[1:3]]
        # A step beyond the upper bound would be a value that Clip cuts off.
        return bounds[0] == 0 and high <= bounds[1] * (1 + 1e-6)

    def _pairs(self, tensors: object) -> None:
        for name in tensors:  # type: ignore[attr-defined]
            if name in self._places.tensors:
                self._pair(name)

    def _pair(self, name: str) -> None:
        affine = self._affines[name]
        parameters = [f"{name}.scale", f"{name}.zero"]
        self._constant(parameters[0], np.array(affine.scale, dtype=np.float32))
        self._constant(parameters[1], np.array(affine.zero_point, dtype=affine.dtype))
        self._node("QuantizeLinear", [name, *parameters], f"{name}.int8")
        self._node("DequantizeLinear", [f"{name}.int8", *parameters], f"{name}.dequantized")
        self._dequantized[name] = f"{name}.dequantized"

    def _weight(self, layer: Layer, integers: IntegerLayer, node: onnx.NodeProto) -> str:
        values, axis = integers.values, layer.axis
        if node.op_type == "Gemm" and axis == 0 and self._cpu:
            # ONNX Runtime keeps a turned weight twice.
            values, axis = np.ascontiguousarray(values.T), 1
            kept = [attribute for attribute in node.attribute if attribute.name != "transB"]
            del node.attribute[:]
            node.attribute.extend(kept)
        name = layer.weight
        self._constant(f"{name}.int8", values)
        self._constant(f"{name}.scale", integers.scales)
        self._constant(f"{name}.zero", np.zeros(len(integers.scales), dtype=np.int8))
        inputs = [f"{name}.int8", f"{name}.scale", f"{name}.zero"]
        self._node("DequantizeLinear", inputs, f"{name}.dequantized", axis=axis)
        return f"{name}.dequantized"

    def _bias(self, layer: Layer, integers: IntegerLayer, affine: Affine) -> str:
        name = layer.bias or f"{layer.name}.bias"
        if not self._cpu:
            self._constant(f"{name}.corrected", integers.bias)
            return f"{name}.corrected"
        steps, scales = bias_steps(integers.bias, affine.scale, integers.scales)
        self._constant(f"{name}.int32", steps)
        self._constant(f"{name}.scale", scales)
        self._constant(f"{name}.zero", np.zeros(len(scales), dtype=np.int32))
        inputs = [f"{name}.int32", f"{name}.scale", f"{name}.zero"]
        self._node("DequantizeLinear", inputs, f"{name}.dequantized", axis=0)
        return f"{name}.dequantized"

    def _node(self, operator: str, inputs: list[str], output: str, *, axis: int | None = None) -> None:
        import onnx

        name = f"{'quantize' if operator == 'QuantizeLinear' else 'dequantize'}.{output}"
        self._target.node.append(onnx.helper.make_node(operator, inputs, [output], name=name, axis=axis))

    def _constant(self, name: str, values: NDArray[np.generic]) -> None:
        import onnx

        self._target.initializer.append(onnx.numpy_helper.from_array(values, name))
