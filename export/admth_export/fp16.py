"""FP32 ONNX to FP16-typed ONNX, with the parts that need FP32 left in FP32.

TensorRT 11 and TensorRT-RTX compile the types that a model has and know no FP16 switch, so half precision is a step
from ONNX to ONNX. onnxruntime's converter is not used: it clamps weights that do not fit without a word, decides by
operator and not by layer, appends its casts unsorted, and computes the codes from other logits than those that leave
the network. Here the codes are always packed from the FP32 logits that are the model's output, each tensor is cast at
most once, right behind the node that makes it, and what stays in FP32 is named.

What is left in FP32, whatever is asked for:

- the packing of the codes, which takes the logits as they leave;
- the normalisation of the pixels: three channels, and means such as 123.68 that FP16 rounds;
- operators that half precision does not suit, such as LRN.

``auto`` adds the response normalisation of CNN-F, every layer whose values or weights come near FP16's largest number
on real images, and, where the parity gate asks for it, the layers that add most to the error of the logits.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING

import numpy as np

from admth_calibration.graph import Graph, matches_layer
from admth_runtime.errors import InputError, ModelError

if TYPE_CHECKING:
    import onnx

    from admth_calibration.probing import Range

__all__ = ["HALF_LIMIT", "HalfModel", "Island", "automatic_islands", "named_islands", "sensitive_islands", "to_half"]

HALF_LIMIT = 32752.0
"""Values beyond half of FP16's largest finite number, 65504, are not trusted to it: other images go further."""

_FLOAT, _HALF = 1, 10  # TensorProto.FLOAT and FLOAT16

# What TensorRT, ONNX Runtime and the meaning of the operator allow in FP16. Anything else stays in FP32.
_HALF_OPERATORS = frozenset({
    "Add", "AveragePool", "Cast", "Clip", "Concat", "Conv", "DequantizeLinear", "Div", "Flatten", "Gemm",
    "GlobalAveragePool", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "MatMul", "Max", "MaxPool", "Min", "Mul",
    "Pad", "QuantizeLinear", "ReduceMean", "Relu", "Reshape", "Sigmoid", "Slice", "Split", "Sqrt", "Squeeze", "Sub",
    "Tanh", "Transpose", "Unsqueeze",
})  # fmt: skip


@dataclass(frozen=True)
class Island:
    """A node that stays in FP32.

    Attributes:
        node: its name in the graph.
        layer: what a user calls it.
        reason: why.
    """

    node: str
    layer: str
    reason: str


@dataclass(frozen=True, eq=False)
class HalfModel:
    """An FP16-typed model.

    Attributes:
        model: the model, sorted, with the inputs and outputs of the one that it came from.
        islands: what stays in FP32.
    """

    model: onnx.ModelProto
    islands: tuple[Island, ...]

    @property
    def layers_kept(self) -> dict[str, str]:
        """``"fp32"`` by the name of each layer that was kept, for the sidecar."""
        return {island.layer: "fp32" for island in self.islands}


def to_half(model: onnx.ModelProto, islands: Iterable[Island] = ()) -> HalfModel:
    """Convert a model to FP16.

    Args:
        model: an FP32 model or one with Q/DQ nodes; it is left as it was.
        islands: nodes to leave in FP32, beside those that always are.

    Raises:
        ModelError: the graph has no consistent types, or a weight is beyond FP16.
    """
    graph = Graph(model)
    _check_names(graph)
    kept: dict[str, Island] = {}
    for island in (*_fixed_islands(graph), *islands):
        kept.setdefault(island.node, island)
    _follow_weights(graph, kept)
    return HalfModel(_Rewrite(graph, set(kept)).run(), tuple(kept.values()))


def automatic_islands(graph: Graph, ranges: Mapping[str, Range]) -> list[Island]:
    """Return what ``auto`` leaves in FP32 beside the fixed parts.

    Args:
        graph: the FP32 model.
        ranges: of its tensors on real images; without any, values are not judged.
    """
    islands = [
        Island(node.name, _region_name(graph, region), "response normalisation: roots of sums of squares")
        for region in graph.response_norms()
        for node in region
    ]
    for node in graph.nodes:
        name, layer = node.name, graph.layer_name(node)
        for tensor in (*node.input, *node.output):
            found = ranges.get(tensor)
            if found is not None and not found.largest <= HALF_LIMIT:
                islands.append(Island(name, layer, f"values up to {found.largest:.3g} on the images"))
        for tensor in node.input:
            if tensor in graph.initializers and graph.types[tensor] == _FLOAT:
                largest = _largest(graph.initializers[tensor])
                if largest > HALF_LIMIT:
                    islands.append(Island(name, layer, f"a constant of {largest:.3g}"))
    first: dict[str, Island] = {}
    for island in islands:
        first.setdefault(island.node, island)
    return list(first.values())


def named_islands(graph: Graph, patterns: Collection[str]) -> list[Island]:
    """Return the nodes that a user names: by layer, by the start of a layer's name, by glob, or by node.

    Raises:
        InputError: a pattern matches nothing.
    """
    names = {node.name: graph.layer_name(node) for node in graph.nodes}
    islands: dict[str, Island] = {}
    for pattern in patterns:
        matching = [node for node, layer in names.items() if matches_layer(layer, pattern) or node == pattern]
        if not matching:
            layers = list(graph.layers())
            close = get_close_matches(pattern, layers, n=3, cutoff=0.4) or layers[:3]
            raise InputError(
                f"--keep-fp32 {pattern!r} matches no layer: name one such as {', '.join(close)}, or a part of it "
                "from the left"
            )
        islands.update({node: Island(node, names[node], "asked for") for node in matching})
    return list(islands.values())


def sensitive_islands(graph: Graph, shares: Mapping[str, float]) -> list[Island]:
    """Return layers that add much to the error of the logits.

    Args:
        graph: the model.
        shares: the part of the error that each adds, 0 to 1, by layer.
    """
    return [
        Island(node.name, layer, f"adds {100 * shares[layer]:.0f} % of the error that FP16 makes")
        for layer, node in graph.layers().items()
        if layer in shares
    ]


def _fixed_islands(graph: Graph) -> list[Island]:
    islands = [Island(node.name, "packing", "packs the codes of the FP32 logits") for node in graph.packing()]
    islands += [
        Island(node.name, "pixels", "normalises the pixels")
        for node in graph.normalisation()
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear")
    ]
    islands += [
        Island(node.name, graph.layer_name(node), f"{node.op_type} is not for half precision")
        for node in graph.nodes
        if node.op_type not in _HALF_OPERATORS and _takes_float(graph, node)
    ]
    return islands


def _region_name(graph: Graph, region: list[onnx.NodeProto]) -> str:
    """Name a response normalisation by the convolution in it."""
    return next((graph.layer_name(node) for node in region if graph.is_weighted(node)), region[0].name)


def _follow_weights(graph: Graph, kept: dict[str, Island]) -> None:
    """Leave a dequantisation in FP32 where everything that takes it is: a cast between them would cost the fusion."""
    for node in reversed(graph.nodes):
        if node.op_type != "DequantizeLinear" or node.name in kept:
            continue
        takers = graph.consumers.get(node.output[0], [])
        if takers and all(taker.name in kept for taker in takers):
            owner = kept[takers[0].name]
            kept[node.name] = Island(node.name, owner.layer, owner.reason)


def _takes_float(graph: Graph, node: onnx.NodeProto) -> bool:
    return any(graph.types.get(name) == _FLOAT for name in (*node.input, *node.output))


def _check_names(graph: Graph) -> None:
    names = [node.name for node in graph.nodes]
    if not all(names) or len(set(names)) != len(names):
        raise ModelError(
            "the graph has nodes without a name or with the same one, so layers cannot be told apart: "
            "export the checkpoint again with  admth-export onnx"
        )


@dataclass(eq=False)
class _Rewrite:
    """One conversion: nodes are copied in order, and casts stand right behind what they cast."""

    graph: Graph
    kept: set[str]
    halves: dict[str, str] = field(default_factory=dict)  # FP32 tensor to its FP16 twin
    floats: set[str] = field(default_factory=set)  # initializers that FP32 nodes take
    nodes: list[onnx.NodeProto] = field(default_factory=list)

    def run(self) -> onnx.ModelProto:
        import onnx

        source = self.graph.model
        halved = {
            name
            for node in source.graph.node
            if node.name not in self.kept
            for name in node.output
            if self.graph.types.get(name) == _FLOAT
        }
        wanted = self._wanted(halved)
        for name in source.graph.input:  # no input of ours is FP32, but a foreign model's may be
            if name.name in wanted[_HALF] and self.graph.types[name.name] == _FLOAT:
                self._cast(name.name, f"{name.name}.half", _HALF)
                self.halves[name.name] = f"{name.name}.half"
        for node in source.graph.node:
            self._copy(node, wanted, halved)
        model = onnx.ModelProto(ir_version=source.ir_version)
        model.producer_name, model.producer_version = source.producer_name, source.producer_version
        model.opset_import.extend(source.opset_import)
        model.metadata_props.extend(source.metadata_props)
        model.graph.name = source.graph.name
        model.graph.node.extend(self.nodes)
        model.graph.input.extend(source.graph.input)
        model.graph.output.extend(source.graph.output)
        self._initializers(model)
        return model

    def _wanted(self, halved: set[str]) -> dict[int, set[str]]:
        """Which FP32 tensors are taken in FP16, and which in FP32 (the graph's outputs among them)."""
        wanted: dict[int, set[str]] = {_FLOAT: {item.name for item in self.graph.model.graph.output}, _HALF: set()}
        for node in self.graph.model.graph.node:
            wanted[_FLOAT if node.name in self.kept else _HALF].update(node.input)
        return wanted

    def _copy(self, node: onnx.NodeProto, wanted: dict[int, set[str]], halved: set[str]) -> None:
        import onnx

        copied = onnx.NodeProto()
        copied.CopyFrom(node)
        half = node.name not in self.kept
        for index, name in enumerate(node.input):
            if self.graph.types.get(name) != _FLOAT:
                continue
            if name in self.graph.initializers:
                if half:
                    self.halves.setdefault(name, f"{name}.half")
                    copied.input[index] = self.halves[name]
                else:
                    self.floats.add(name)
            elif half:
                copied.input[index] = self.halves[name]
        if half and node.op_type == "Cast" and self.graph.types.get(node.output[0]) == _FLOAT:
            _set_cast(copied, _HALF)
        self.nodes.append(copied)
        for index, name in enumerate(node.output):
            if self.graph.types.get(name) != _FLOAT:
                continue
            if half:
                self.halves[name] = copied.output[index] = f"{name}.half"
                if name in wanted[_FLOAT]:
                    self._cast(f"{name}.half", name, _FLOAT)
            elif name in wanted[_HALF]:
                self.halves[name] = f"{name}.half"
                self._cast(name, f"{name}.half", _HALF)

    def _cast(self, source: str, target: str, kind: int) -> None:
        import onnx

        self.nodes.append(onnx.helper.make_node("Cast", [source], [target], name=f"cast.{target}", to=kind))

    def _initializers(self, model: onnx.ModelProto) -> None:
        import onnx

        for name, tensor in self.graph.initializers.items():
            if name in self.halves:
                values = onnx.numpy_helper.to_array(tensor)
                if np.abs(values).max(initial=0.0) > np.finfo(np.float16).max:
                    takers = ", ".join(self.graph.layer_name(node) for node in self.graph.consumers[name])
                    raise ModelError(
                        f"the constant {name} has values up to {float(np.abs(values).max()):.3g}, beyond FP16: leave "
                        f"it in FP32 with  --keep-fp32 {takers}  or with  --keep-fp32 auto"
                    )
                model.graph.initializer.append(
                    onnx.numpy_helper.from_array(values.astype(np.float16), self.halves[name])
                )
            if name in self.floats or name not in self.halves:
                model.graph.initializer.append(tensor)


def _set_cast(node: onnx.NodeProto, kind: int) -> None:
    for attribute in node.attribute:
        if attribute.name == "to":
            attribute.i = kind


def _largest(tensor: onnx.TensorProto) -> float:
    import onnx

    return float(np.abs(onnx.numpy_helper.to_array(tensor)).max(initial=0.0))
