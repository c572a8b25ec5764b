"""Where a trunk's tensors are rounded, beside the inputs of its layers.

For the CPU every tensor between two layers is uint8, so every layer's output is, after its activation: as the next
layer's input, or as an operand of a residual sum, or on its way to what runs in float. For TensorRT only the inputs of
layers are rounded, and sums and everything else take the float tensor.

A tensor and what padding, pooling by maximum and flattening make of it are one tensor here: rounding before or after
is the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

from torch import fx

from admth_training.backbones import Trunk
from admth_training.qat.layers import ActivationQuantizer
from admth_training.qat.tracing import TracedTrunk

__all__ = ["TrunkPlaces", "place_quantizers"]


@dataclass
class TrunkPlaces:
    """What was placed.

    Attributes:
        trunk: the trunk with every rounding in place.
        outputs: the quantiser of every layer's output tensor that is rounded, by the layer's name.
        last: the quantiser of the trunk's own output, where its values are a rounded tensor's, or None.

    """

    trunk: Trunk
    outputs: dict[str, ActivationQuantizer] = field(default_factory=dict)
    last: ActivationQuantizer | None = None


def place_quantizers(traced: TracedTrunk, *, signed: bool) -> TrunkPlaces:
    """Round the tensors that no layer rounds as its input, and bound those that follow a ReLU6.

    Args:
        traced: its layers have the quantisers of their inputs; its graph is changed.
        signed: for TensorRT, else for the CPU.

    """
    places = TrunkPlaces(traced.trunk)
    if signed:
        return places
    for node in traced.layers:
        source = traced.origin(node.all_input_nodes[0])
        traced.layer(node).input.upper = 6.0 if traced.is_relu6(source) else None
    sums = traced.sums
    for node in traced.layers:
        tensor = traced.activated(node)
        target = _input_quantizer(traced, tensor) or _output_quantizer(traced, node, tensor)
        places.outputs[str(node.target)] = _quantizer(traced, target)
        _round_other_uses(traced, tensor, target)
    for node in sums:
        following = _input_quantizer(traced, node)
        if following is not None:
            _round_other_uses(traced, node, following)
    last = traced.origin(traced.output())
    module = traced.modules.get(str(last.target)) if last.op == "call_module" else None
    places.last = module if isinstance(module, ActivationQuantizer) else None
    rewritten = fx.GraphModule(traced.trunk, traced.graph)
    for name in ("channels", "grid", "mean", "std"):
        setattr(rewritten, name, getattr(traced.trunk, name))
    places.trunk = cast(Trunk, rewritten)
    return places


def _round_other_uses(traced: TracedTrunk, tensor: fx.Node, target: str) -> None:
    """Give every use of a tensor that leads to no layer the rounded tensor; layers round their input themselves."""
    uses = [user for user in tensor.users if not traced.layers_after(user)]
    if not uses:
        return
    with traced.graph.inserting_after(tensor):
        rounded = traced.graph.call_module(target, (tensor,))
    for user in uses:
        user.replace_input_with(tensor, rounded)


def _input_quantizer(traced: TracedTrunk, tensor: fx.Node) -> str | None:
    """Return the name of the quantiser of a tensor that is the input of a layer; None where it is not."""
    layers = [layer for user in tensor.users for layer in traced.layers_after(user)]
    if not layers:
        return None
    first = traced.layer(layers[0])
    for other in layers[1:]:
        traced.layer(other).quantize_input_with(first.input, owner=False)
    name = f"{layers[0].target}.input_quantizer"
    traced.modules[name] = first.input
    return name


def _output_quantizer(traced: TracedTrunk, node: fx.Node, tensor: fx.Node) -> str:
    """Make a quantiser for a layer's output tensor, and return its name."""
    quantizer = ActivationQuantizer(signed=False)
    quantizer.upper = 6.0 if traced.is_relu6(tensor) else None
    traced.layer(node).output_quantizer = quantizer
    name = f"{node.target}.output_quantizer"
    traced.modules[name] = quantizer
    return name


def _quantizer(traced: TracedTrunk, name: str) -> ActivationQuantizer:
    module = traced.modules[name]
    assert isinstance(module, ActivationQuantizer)
    return module
