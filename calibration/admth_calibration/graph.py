"""Reading an ONNX graph: who makes a tensor and who takes it, which layers hold weights, and which parts are special.

Everything here looks at structure alone, so it works on any exporter's node names.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from admth_runtime.errors import ModelError, require

if TYPE_CHECKING:
    import onnx

__all__ = ["WEIGHTED_OPERATORS", "Graph", "load_graph", "matches_layer"]

WEIGHTED_OPERATORS = ("Conv", "Gemm", "MatMul")
"""Operators with weights; INT8 and FP16 are for their sake."""

_BLOCKED_PRODUCT = "MatMulNBits"  # of weights that are stored in blocks

# What engines compute once, on loading, to make weights that are stored in another type.
_WEIGHT_MAKERS = ("DequantizeLinear", "Cast", "Mul")

# Tensors up to this size are kept where types are inferred: they may be shapes, axes and splits.
_SMALL = 1024


@dataclass(eq=False)
class Graph:
    """An ONNX model with the look-ups that a rewrite needs; it does not notice later changes of the model.

    Attributes:
        model: the model.
        initializers: constant tensors by name.
        producers: the node that makes a tensor, by the tensor's name.
        consumers: the nodes that take a tensor, by the tensor's name.
        types: ``TensorProto`` element type of every tensor whose type is known, by name.
    """

    model: onnx.ModelProto
    initializers: dict[str, onnx.TensorProto] = field(init=False)
    producers: dict[str, onnx.NodeProto] = field(init=False)
    consumers: dict[str, list[onnx.NodeProto]] = field(init=False)
    types: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        graph = self.model.graph
        for node in graph.node:
            if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
                raise ModelError(
                    f"the node {node.name!r} ({node.op_type}) holds a subgraph, which no model of ours does: "
                    "export the checkpoint again with  admth-export onnx"
                )
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self.producers = {name: node for node in graph.node for name in node.output if name}
        self.consumers = {}
        for node in graph.node:
            for name in dict.fromkeys(node.input):
                if name:
                    self.consumers.setdefault(name, []).append(node)
        self.types = _types(self.model)

    @property
    def nodes(self) -> list[onnx.NodeProto]:
        """The nodes, in an order in which every tensor is made before it is taken."""
        return list(self.model.graph.node)

    @property
    def logits(self) -> list[str]:
        """Names of the outputs ``logits_L``."""
        return [output.name for output in self.model.graph.output if output.name.startswith("logits_")]

    def layer_name(self, node: onnx.NodeProto) -> str:
        """Name a node as a user knows it: by its weight without ``.weight``, or by its own name where it has none."""
        for name in node.input:
            if self.is_constant(name) and (stem := _stem(self.stored_weight(name))):
                return stem
        return node.name or (node.output[0] if node.output else node.op_type)

    def layers(self) -> dict[str, onnx.NodeProto]:
        """Return the nodes with weights by layer name, in order."""
        return {self.layer_name(node): node for node in self.nodes if self.is_weighted(node)}

    def is_weighted(self, node: onnx.NodeProto) -> bool:
        """Whether a node is a convolution or matrix product with constant weights."""
        return (
            node.op_type in (*WEIGHTED_OPERATORS, _BLOCKED_PRODUCT)
            and len(node.input) > 1
            and self.is_constant(node.input[1])
        )

    def is_constant(self, tensor: str) -> bool:
        """Whether a tensor is an initializer, or made of initializers alone by a change of type or scale."""
        if tensor in self.initializers:
            return True
        maker = self.producers.get(tensor)
        return maker is not None and maker.op_type in _WEIGHT_MAKERS and all(map(self.is_constant, maker.input))

    def stored_weight(self, tensor: str) -> str:
        """Return the initializer that a constant tensor is made of: itself, or what is dequantised or cast."""
        while tensor not in self.initializers:
            tensor = self.producers[tensor].input[0]
        return tensor

    def after(self, tensors: Collection[str]) -> list[onnx.NodeProto]:
        """Return every node that depends on one of the tensors, in order."""
        reached = set(tensors)
        found = []
        for node in self.nodes:
            if reached.intersection(node.input):
                found.append(node)
                reached.update(node.output)
        return found

    def packing(self) -> list[onnx.NodeProto]:
        """Return what turns logits into packed codes."""
        return self.after(self.logits)

    def normalisation(self) -> list[onnx.NodeProto]:
        """Return what turns the input's pixels into the first layer's input: everything before any weights."""
        weighted = self.after([name for node in self.nodes if self.is_weighted(node) for name in node.output])
        later = {id(node) for node in weighted}
        inputs = [item.name for item in self.model.graph.input]
        return [node for node in self.after(inputs) if id(node) not in later and not self.is_weighted(node)]

    def response_norms(self) -> list[list[onnx.NodeProto]]:
        """Return the nodes of every response normalisation, ``x / d(x^2)``, in order: one list for each.

        A square is a product of a tensor with itself. From there to the division is the normalisation, together with
        a scaling right before the square.
        """
        found = []
        for node in self.nodes:
            if node.op_type != "Mul" or len(set(node.input)) != 1:
                continue
            region = self._up_to_division(node)
            if region:
                scaling = self.producers.get(node.input[0])
                if scaling is not None and scaling.op_type == "Mul" and self._scales(scaling):
                    region.insert(0, scaling)
                found.append(region)
        return found

    def _scales(self, node: onnx.NodeProto) -> bool:
        return any(name in self.initializers and not list(self.initializers[name].dims) for name in node.input)

    def _up_to_division(self, square: onnx.NodeProto) -> list[onnx.NodeProto]:
        """Return the nodes from a square to the division by what comes of it; none where that does not follow."""
        region, reached = [square], set(square.output)
        for node in self.after(square.output):
            if not reached.intersection(node.input):
                continue
            region.append(node)
            if node.op_type == "Div":
                return region
            if node.op_type not in ("Conv", "Sqrt", "Mul", "Add", "Pow"):
                return []
            reached.update(node.output)
        return []


def load_graph(path: str) -> onnx.ModelProto:
    """Load a checked single-file model; other files are never opened.

    Args:
        path: a file that :func:`admth_runtime.onnx_file.read_onnx` has accepted.

    Raises:
        MissingExtraError: onnx is not installed.
        ModelError: onnx cannot parse it.
    """
    require("onnx", extra="calibrate", purpose="changing a model's precision")
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise ModelError(f"{path}: is not an ONNX model ({error}): export it again with  admth-export onnx") from error


def matches_layer(layer: str, pattern: str) -> bool:
    """Whether a layer's name is a pattern's: the name itself, a part of it from the left, or a glob.

    ``trunk.blocks.0`` matches ``trunk.blocks.0.project.conv`` and not ``trunk.blocks.01``.
    """
    return layer == pattern or layer.startswith(f"{pattern}.") or fnmatchcase(layer, pattern)


def _stem(name: str) -> str:
    # Of our FP32, INT8 and FP16 models, and of those with their weights alone in few bits.
    for ending in (".weight", ".weight.int8", ".weight.half", ".weight.int4"):
        if name.endswith(ending):
            return name[: -len(ending)]
    return ""


def _types(model: onnx.ModelProto) -> dict[str, int]:
    """Infer every tensor's element type, on a copy without the large weights."""
    import onnx
    import onnx.shape_inference

    light = onnx.ModelProto(ir_version=model.ir_version)
    light.opset_import.extend(model.opset_import)
    graph = light.graph
    graph.name = "types"
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    for tensor in model.graph.initializer:
        if _elements(tensor) <= _SMALL:
            graph.initializer.append(tensor)
        else:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    try:
        inferred = onnx.shape_inference.infer_shapes(light, check_type=True, strict_mode=True)
    except onnx.shape_inference.InferenceError as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"the graph fails ONNX's type inference ({reason[:300]}): export it again with  admth-export onnx"
        ) from error
    return dict(_typed(inferred.graph)) | {tensor.name: tensor.data_type for tensor in model.graph.initializer}


def _typed(graph: onnx.GraphProto) -> Iterator[tuple[str, int]]:
    for part in (graph.input, graph.output, graph.value_info):
        for item in part:
            yield item.name, item.type.tensor_type.elem_type


def _elements(tensor: onnx.TensorProto) -> int:
    count = 1
    for size in tensor.dims:
        count *= size
    return count
