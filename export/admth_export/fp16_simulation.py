"""FP16 arithmetic on a CPU: the same function as an FP16-typed model, computed in FP32 and rounded where FP16 rounds.

ONNX Runtime has no FP16 kernels for x86. It computes FP16 nodes in FP32 and drops the casts between them, so a chain of
FP16 layers loses nothing and never overflows there: a parity measured that way promises too much. Here every tensor
that an engine stores in FP16 goes through an explicit cast to FP16 and back, which ONNX Runtime keeps. Sums inside a
layer stay in FP32, as they do in TensorRT's kernels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from admth_calibration.graph import Graph

if TYPE_CHECKING:
    import onnx

__all__ = ["simulate_half"]

_FLOAT, _HALF = 1, 10  # TensorProto.FLOAT and FLOAT16

# What comes out of these is one of the values that went in, so there is nothing to round. A dequantised tensor is not
# stored either: TensorRT fuses its scale into the layer that takes it.
_EXACT = frozenset({
    "Clip", "Concat", "DequantizeLinear", "Flatten", "Identity", "Max", "MaxPool", "Min", "Pad", "Relu", "Reshape",
    "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze",
})  # fmt: skip


def simulate_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model without FP16 kernels that computes what an FP16-typed model does, rounding by rounding.

    Args:
        model: a typed model; it is left as it was. One without FP16 tensors comes back unchanged.

    Returns:
        A model with the same inputs, outputs and tensor names, in FP32.
    """
    import onnx

    types = Graph(model).types
    result = onnx.ModelProto(ir_version=model.ir_version)
    result.producer_name, result.producer_version = model.producer_name, model.producer_version
    result.opset_import.extend(model.opset_import)
    result.metadata_props.extend(model.metadata_props)
    result.graph.name = model.graph.name
    result.graph.input.extend(model.graph.input)
    result.graph.output.extend(model.graph.output)
    for node in model.graph.node:
        _add_node(result.graph, node, types)
    for tensor in model.graph.initializer:
        if tensor.data_type == _HALF:
            values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            result.graph.initializer.append(onnx.numpy_helper.from_array(values, tensor.name))
        else:
            result.graph.initializer.append(tensor)
    return result


def _add_node(graph: onnx.GraphProto, node: onnx.NodeProto, types: dict[str, int]) -> None:
    import onnx

    copied = graph.node.add()
    copied.CopyFrom(node)
    halves = [index for index, name in enumerate(node.output) if types.get(name) == _HALF]
    if not halves or node.op_type in _EXACT:
        return
    for index in halves:
        name = node.output[index]
        rounded = f"{name}.rounded"
        if node.op_type == "Cast":  # rounds by itself
            copied.output[index] = rounded
        else:
            copied.output[index] = f"{name}.exact"
            graph.node.append(
                onnx.helper.make_node("Cast", [f"{name}.exact"], [rounded], name=f"round.{name}", to=_HALF)
            )
        graph.node.append(onnx.helper.make_node("Cast", [rounded], [name], name=f"widen.{name}", to=_FLOAT))
