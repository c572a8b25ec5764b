"""Why an FP16 model differs: the first value that is no number, or the layers that add most of the error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from admth_calibration.graph import Graph
from admth_calibration.probing import activation_batches, open_probe
from admth_export.fp16 import Island, to_half
from admth_export.fp16_simulation import simulate_half
from admth_runtime.console import track

if TYPE_CHECKING:
    import onnx

__all__ = ["LayerShare", "first_non_finite", "layer_shares"]

_FLOAT = 1  # TensorProto.FLOAT


@dataclass(frozen=True)
class LayerShare:
    """One layer's part in the error of the logits.

    Attributes:
        layer: its name.
        share: its part in the sum of the squared errors that each layer causes alone, 0 to 1.
    """

    layer: str
    share: float

    def __str__(self) -> str:
        return f"{self.layer} ({100 * self.share:.0f} % of the error)"


def first_non_finite(model: onnx.ModelProto, pixels: NDArray[np.uint8], *, batch_size: int = 4) -> str | None:
    """Name the first layer, in the order of the graph, whose output is NaN or infinite on some image.

    Args:
        model: the FP16 model, or its simulation.
        pixels: uint8 ``[n, H, W, 3]``.
        batch_size: images at a time; the tensors of one batch are held.

    Returns:
        The layer, or None where every value of every tensor is finite.
    """
    model = simulate_half(model)
    graph = Graph(model)
    outputs = {item.name for item in model.graph.output}
    types = {
        name: kind
        for name, kind in graph.types.items()
        if kind == _FLOAT and name in graph.producers and name not in outputs
    }
    starts = range(0, len(pixels), batch_size)
    batches = (pixels[start : start + batch_size] for start in track(starts, "looking for the layer"))
    # Insertion order is the order of the graph.
    order = [name for node in graph.nodes for name in node.output if name in types]
    first = len(order)
    for values in activation_batches(model, types, batches):
        for place, name in enumerate(order[:first]):
            if not bool(np.isfinite(values[name]).all()):
                first = place
                break
        if first == 0:
            break
    if first == len(order):
        return None
    node = graph.producers[order[first]]
    while node.op_type == "Cast" and node.input[0] in graph.producers:  # the casts of the simulation
        node = graph.producers[node.input[0]]
    return graph.layer_name(node)


def layer_shares(model: onnx.ModelProto, islands: Sequence[Island], pixels: NDArray[np.uint8]) -> list[LayerShare]:
    """Measure how much each layer adds to the error of the logits, by converting one layer at a time.

    Rounding errors of different layers are nearly independent, so their squares add up.

    Args:
        model: the FP32 model.
        islands: what stays in FP32 anyway.
        pixels: uint8 ``[n, H, W, 3]``; a few images are enough.

    Returns:
        The layers, the largest share first.
    """
    graph = Graph(model)
    names = tuple(graph.logits)
    with open_probe(model, names) as probe:
        reference = probe.run(pixels)
    kept = {island.node for island in islands}
    errors: dict[str, float] = {}
    layers = {layer: node for layer, node in graph.layers().items() if node.name not in kept}
    for layer, node in track(layers.items(), "measuring layers", total=len(layers), unit="layers"):
        others = [Island(other.name, "", "") for other in graph.nodes if other.name != node.name]
        with open_probe(simulate_half(to_half(model, others).model), names) as probe:
            logits = probe.run(pixels)
        errors[layer] = sum(
            float(np.square(found.astype(np.float64) - wanted).mean())
            for found, wanted in zip(logits, reference, strict=True)
        )
    total = sum(errors.values()) or 1.0
    shares = [LayerShare(layer, error / total) for layer, error in errors.items()]
    return sorted(shares, key=lambda share: -share.share)
