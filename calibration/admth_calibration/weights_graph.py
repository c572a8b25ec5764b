"""Rewriting a graph so that its weights are stored in few bits: MatMulNBits for matrices, casts for convolutions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from admth_calibration.blocks import BlockedMatrix, Rows
from admth_calibration.graph import Graph
from admth_calibration.stored_weights import StoredWeight
from admth_runtime.errors import ModelError

if TYPE_CHECKING:
    import onnx

__all__ = ["LayerPlan", "WeightSource", "rewrite"]

_DOMAIN = "com.microsoft"
# The kernel rounds activations to 8 bits and multiplies integers. Its exact mode makes FP32 weights anew in every run,
# at 25 times the time of FP32.
_ACCURACY_LEVEL = 4
_LARGEST_HALF = 65504.0


@dataclass(frozen=True)
class LayerPlan:
    """How one layer's weights are stored.

    Attributes:
        kind: ``"int8"`` or ``"int4"`` in blocks for a matrix; ``"fp16"`` or ``"int8"`` by channel for a convolution.
        block_size: weights a block, for a matrix; else 0.
    """

    kind: str
    block_size: int = 0


@dataclass(frozen=True, eq=False)
class WeightSource:
    """An FP32 graph whose large weights are in its file.

    Attributes:
        graph: the graph.
        stored: where the large weights are, by name.
    """

    graph: Graph
    stored: Mapping[str, StoredWeight]

    def matrix(self, node: onnx.NodeProto, layer: str) -> Rows:
        """Return a fully connected layer's weight as ``[outputs, inputs]``.

        Raises:
            ModelError: the layer has a form that MatMulNBits does not have.
        """
        tensors = self.graph.initializers
        attributes = {attribute.name: attribute for attribute in node.attribute}
        plain = all(name not in attributes or attributes[name].f == 1.0 for name in ("alpha", "beta"))
        turned = "transA" in attributes and attributes["transA"].i
        by_output = node.op_type == "Gemm" and "transB" in attributes and attributes["transB"].i
        shape = list(tensors[node.input[1]].dims)
        outputs = shape[0] if by_output else shape[-1]
        biased = len(node.input) > 2 and node.input[2]
        fits = not biased or (node.input[2] in tensors and list(tensors[node.input[2]].dims) == [outputs])
        if len(shape) != 2 or not plain or turned or not fits:
            raise ModelError(
                f"the layer {layer} is a {node.op_type} with alpha, beta, transA or a bias that is no constant vector, "
                f"which has no form with weights in blocks: pass --keep-fp32 {layer}"
            )
        if by_output and node.input[1] in self.stored:
            return self.stored[node.input[1]]
        weight = self.array(node.input[1])
        return weight if by_output else weight.T

    def array(self, name: str) -> NDArray[np.float32]:
        """Return a whole weight."""
        from onnx import numpy_helper

        if name in self.stored:
            return self.stored[name][:]
        weight: NDArray[np.float32] = numpy_helper.to_array(self.graph.initializers[name])
        return weight

    def tensor(self, name: str) -> onnx.TensorProto:
        """Return an initializer with its values."""
        from onnx import numpy_helper

        return numpy_helper.from_array(self.array(name), name) if name in self.stored else self.graph.initializers[name]


def rewrite(
    source: WeightSource,
    plans: Mapping[str, LayerPlan],
    quantized: Callable[[str, onnx.NodeProto, LayerPlan], BlockedMatrix],
) -> onnx.ModelProto:
    """Return a model whose layers store their weights as planned.

    Args:
        source: the FP32 model; it is left as it was.
        plans: by layer name; layers without a plan stay in FP32.
        quantized: rounds a matrix, when its layer's turn comes.

    Raises:
        ModelError: a layer has a form that cannot be rewritten, or weights that are not finite.
    """
    import onnx

    graph, model = source.graph, source.graph.model
    result = onnx.ModelProto()
    result.ir_version = model.ir_version
    result.producer_name, result.producer_version = model.producer_name, model.producer_version
    result.opset_import.extend(opset for opset in model.opset_import if opset.domain != _DOMAIN)
    result.opset_import.append(onnx.helper.make_opsetid(_DOMAIN, 1))
    result.metadata_props.extend(model.metadata_props)
    result.graph.name = model.graph.name
    result.graph.input.extend(model.graph.input)
    result.graph.output.extend(model.graph.output)
    planned = {node.name: layer for layer, node in graph.layers().items() if layer in plans}
    for node in model.graph.node:
        layer = planned.get(node.name)
        if layer is None:
            result.graph.node.append(node)
        elif node.op_type == "Conv":
            _append_convolution(source, result.graph, node, layer, plans[layer])
        else:
            _append_product(result.graph, node, plans[layer], quantized(layer, node, plans[layer]))
    used = {name for node in result.graph.node for name in node.input}
    result.graph.initializer.extend(source.tensor(name) for name in graph.initializers if name in used)
    return result


def _append_product(target: onnx.GraphProto, node: onnx.NodeProto, plan: LayerPlan, matrix: BlockedMatrix) -> None:
    from onnx import TensorProto, helper

    weight = node.input[1]
    values, scales = f"{weight}.{plan.kind}", f"{weight}.scale"
    _constant(target, values, matrix.values)
    _constant(target, scales, matrix.scales)
    bias = node.input[2] if len(node.input) > 2 else ""
    outputs = len(matrix.values)
    target.node.append(
        helper.make_node(
            "MatMulNBits",
            [node.input[0], values, scales, "", "", bias] if bias else [node.input[0], values, scales],
            list(node.output),
            name=node.name,
            domain=_DOMAIN,
            K=matrix.inputs,
            N=outputs,
            bits=matrix.bits,
            block_size=matrix.block_size,
            accuracy_level=_ACCURACY_LEVEL,
        )
    )
    # ONNX's own type inference does not know the operator, so the type of its output is stated.
    if node.output[0] not in {item.name for item in target.output}:
        target.value_info.append(helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, [None, outputs]))


def _append_convolution(
    source: WeightSource, target: onnx.GraphProto, node: onnx.NodeProto, layer: str, plan: LayerPlan
) -> None:
    """Store a convolution's weight in fewer bits, with nodes of constants that an engine computes once, on loading.

    ONNX Runtime folds a Cast and a Mul of constants, and does not fold a DequantizeLinear.
    """
    from onnx import TensorProto, helper

    name = node.input[1]
    weight = source.array(name)
    largest = np.abs(weight).max(axis=tuple(range(1, weight.ndim)), keepdims=True)
    if not bool(np.isfinite(largest).all()):
        raise ModelError(f"the weights of {layer} are not finite: train again")
    if plan.kind == "fp16" and largest.max() > _LARGEST_HALF:
        raise ModelError(f"the weights of {layer} reach {largest.max():.3g}, beyond FP16: pass --keep-fp32 {layer}")
    if plan.kind == "fp16":
        _constant(target, f"{name}.half", weight.astype(np.float16))
        _node(target, helper.make_node("Cast", [f"{name}.half"], [f"{name}.float"], to=TensorProto.FLOAT))
    else:
        scales = np.where(largest > 0, largest / np.float32(127), np.float32(1)).astype(np.float32)
        _constant(target, f"{name}.int8", np.rint(weight / scales).astype(np.int8))
        _constant(target, f"{name}.scale", scales)
        _node(target, helper.make_node("Cast", [f"{name}.int8"], [f"{name}.cast"], to=TensorProto.FLOAT))
        _node(target, helper.make_node("Mul", [f"{name}.cast", f"{name}.scale"], [f"{name}.float"]))
    copied = target.node.add()
    copied.CopyFrom(node)
    copied.input[1] = f"{name}.float"


def _node(target: onnx.GraphProto, node: onnx.NodeProto) -> None:
    node.name = f"{node.op_type.lower()}.{node.output[0]}"
    target.node.append(node)


def _constant(target: onnx.GraphProto, name: str, values: NDArray[np.generic]) -> None:
    import onnx

    target.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(values), name))
