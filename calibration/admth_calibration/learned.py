"""Quantisation that was learned in training, carried by an FP32 model as ``metadata_props["admth.quantization"]``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from admth_calibration.affine import Affine
from admth_calibration.graph import Graph
from admth_calibration.layers import Layer, find_layers
from admth_calibration.places import find_places
from admth_runtime.errors import ModelError

__all__ = ["QUANTIZATION_KEY", "LearnedQuantization", "learned_affines", "read_learned"]

QUANTIZATION_KEY = "admth.quantization"
_VERSION = 1
_TARGETS = {"cpu": "cpu", "tensorrt": "trt", "trt": "trt"}


@dataclass(frozen=True)
class LearnedQuantization:
    """What training has learned.

    Attributes:
        target: ``"cpu"`` or ``"trt"``: the integers that the network was trained with.
        tensors: scale and zero point by ``<layer>.input`` or ``<layer>.output``.
        source: facts of the training.
    """

    target: str
    tensors: Mapping[str, tuple[float, int]]
    source: Mapping[str, Any]


def read_learned(graph: Graph) -> LearnedQuantization | None:
    """Return what training has learned; None for a model that was trained without quantisation.

    Raises:
        ModelError: the metadata is broken, or of a newer version.
    """
    texts = [item.value for item in graph.model.metadata_props if item.key == QUANTIZATION_KEY]
    if not texts:
        return None
    try:
        fields = json.loads(texts[0])
        version, target = fields["version"], _TARGETS[fields["target"]]
        tensors = {
            str(name): (float(value["scale"]), int(value["zero_point"])) for name, value in fields["tensors"].items()
        }
        source = dict(fields.get("source", {}))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"the model's learned quantisation cannot be read ({type(error).__name__}: {error}): export it again"
        ) from error
    if version != _VERSION:
        raise ModelError(f"the model's learned quantisation has version {version}, and this admth reads {_VERSION}")
    if not all(scale > 0 for scale, _ in tensors.values()):
        raise ModelError("a learned scale is not above zero: train again with  admth-train fit --qat")
    return LearnedQuantization(target, tensors, source)


def learned_affines(graph: Graph, learned: LearnedQuantization) -> dict[str, Affine]:
    """Return how every quantised tensor of the graph is quantised.

    Raises:
        ModelError: a tensor's numbers are missing, or two of its users have learned different ones.
    """
    layers = find_layers(graph)
    places = find_places(graph, layers, learned.target)
    found: dict[str, Affine] = {}
    for key, (scale, zero_point) in learned.tensors.items():
        layer, _, side = key.rpartition(".")
        tensor = _tensor(layers, layer, side)
        if tensor is None or tensor not in places.tensors:
            continue
        affine = Affine(scale, zero_point, signed=learned.target == "trt")
        if found.setdefault(places.roots[tensor], affine) != affine:
            raise ModelError(
                f"{key} has learned another scale than a tensor that it shares its bytes with: train again with "
                "admth-train fit --qat"
            )
    missing = [name for name in places.ranged if name not in found]
    if missing:
        raise ModelError(f"no scale was learned for the tensor {missing[0]}: train again with  admth-train fit --qat")
    return found


def _tensor(layers: Mapping[str, Layer], name: str, side: str) -> str | None:
    layer = layers.get(name)
    if layer is None:
        return None
    return layer.source if side == "input" else layer.result
