"""Where a target wants quantised tensors, and how wide each is.

ONNX Runtime's CPU kernels take uint8 in and give uint8 out, so the input of every INT8 layer is a place and so is the
output of every INT8 convolution. TensorRT fuses for itself: it wants the inputs alone (Developer Guide, "Explicit
quantisation"). Logits are never quantised.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from admth_calibration.affine import Affine, asymmetric_u8, symmetric_s8
from admth_calibration.graph import Graph
from admth_calibration.layers import MOVING_OPERATORS, Layer
from admth_calibration.pixels import pixel_grid

__all__ = ["Places", "affine_for", "find_places"]


@dataclass(frozen=True)
class Places:
    """The tensors to quantise.

    Attributes:
        target: ``"cpu"`` or ``"trt"``.
        tensors: every one of them, in no order.
        roots: of each, the tensor whose range it takes: itself, or the one before operators that only move values.
    """

    target: str
    tensors: frozenset[str]
    roots: Mapping[str, str]

    @property
    def ranged(self) -> list[str]:
        """The tensors whose ranges are needed, each once, sorted."""
        return sorted({self.roots[name] for name in self.tensors})


def find_places(graph: Graph, layers: Mapping[str, Layer], target: str) -> Places:
    """Return the places for a choice of INT8 layers.

    Args:
        graph: the FP32 graph.
        layers: the layers in INT8.
        target: ``"cpu"`` or ``"trt"``.
    """
    wanted = {layer.source for layer in layers.values()}
    if target == "trt":
        return Places(target, frozenset(wanted), {name: name for name in wanted})
    # A matrix product is merged with a ReLU that nothing quantises, and its weight is then dequantised in every run.
    wanted |= {layer.result for layer in layers.values() if layer.kind != "dense" or layer.activation is not None}
    roots: dict[str, str] = {}
    for name in list(wanted):
        root = _unmoved(graph, name)
        chain = name
        while chain != root:  # one scale from end to end, so that the operators between move bytes
            roots[chain] = root
            chain = graph.producers[chain].input[0]
        roots[root] = root
    return Places(target, frozenset(roots), roots)


def affine_for(graph: Graph, tensor: str, low: float, high: float, target: str) -> Affine:
    """Return how a tensor of this range is quantised; normalised pixels get the grid that holds them exactly."""
    grid = pixel_grid(graph, tensor)
    if grid is not None:
        return Affine(grid.scale, 0, signed=True) if target == "trt" else Affine(grid.scale, grid.mean, signed=False)
    return symmetric_s8(low, high) if target == "trt" else asymmetric_u8(low, high)


def _unmoved(graph: Graph, tensor: str) -> str:
    """Walk up through operators that only move values."""
    maker = graph.producers.get(tensor)
    while maker is not None and maker.op_type in MOVING_OPERATORS and maker.input[0] not in graph.initializers:
        if pixel_grid(graph, tensor) is not None or graph.types.get(maker.input[0]) != graph.types.get(tensor):
            break
        tensor = maker.input[0]
        maker = graph.producers.get(tensor)
    return tensor
