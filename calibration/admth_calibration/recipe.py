"""From an FP32 graph and what was observed to INT8 models, for any choice of layers: the steps in one place."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from admth_calibration.affine import Affine
from admth_calibration.emitting import emit
from admth_calibration.fitting_layers import LayerFitter
from admth_calibration.graph import Graph
from admth_calibration.layers import Layer, constant_of, find_layers
from admth_calibration.lockstep import IntegerLayer, LayerInputs, fit_layers
from admth_calibration.observing import Observation
from admth_calibration.places import Places, affine_for, find_places
from admth_calibration.thresholds import choose_range

if TYPE_CHECKING:
    import onnx

__all__ = ["Candidate", "Recipe"]


@dataclass(frozen=True, eq=False)
class Candidate:
    """An INT8 model and what it is made of.

    Attributes:
        model: the model.
        layers: names of the layers in INT8.
        kept: names of those in float.
        affines: how each quantised tensor is quantised.
        integers: weights and biases by layer.
    """

    model: onnx.ModelProto
    layers: tuple[str, ...]
    kept: tuple[str, ...]
    affines: Mapping[str, Affine]
    integers: Mapping[str, IntegerLayer]


@dataclass(frozen=True, eq=False)
class Recipe:
    """How INT8 models of one FP32 graph are made for one target.

    Attributes:
        graph: the FP32 graph.
        target: ``"cpu"`` or ``"trt"``.
        observations: of every tensor that may be quantised; empty where every tensor is in ``learned``.
        method: how ranges are chosen.
        fitter: how weights are rounded.
        correct_bias: correct biases in layer order.
        factors: by tensor, a factor on its chosen range.
        learned: how tensors are quantised where training has learned it.
    """

    graph: Graph
    target: str
    observations: Mapping[str, Observation]
    method: str
    fitter: LayerFitter
    correct_bias: bool = True
    factors: Mapping[str, float] = field(default_factory=dict)
    learned: Mapping[str, Affine] = field(default_factory=dict)

    @cached_property
    def layers(self) -> dict[str, Layer]:
        """Every layer that has an INT8 form, by name, in order."""
        return find_layers(self.graph)

    def places(self, layers: Mapping[str, Layer]) -> Places:
        """Return the quantised tensors of a choice of layers."""
        return find_places(self.graph, layers, self.target)

    def affines(self, places: Places) -> dict[str, Affine]:
        """Return how each of the places is quantised."""
        for root in places.ranged:  # a search asks for the same ones for every candidate
            if root not in self._affines:
                self._affines[root] = self._affine(root)
        chosen = {root: self._affines[root] for root in places.ranged}
        return {name: chosen[places.roots[name]] for name in places.tensors}

    def fit(
        self,
        pixels: NDArray[np.uint8],
        keep: Collection[str] = (),
        *,
        advance: Callable[[int], None] = lambda layers: None,
    ) -> Candidate:
        """Make the INT8 model with these layers kept in float, with integers fitted for this very choice.

        Args:
            pixels: images to fit on, uint8 ``[n, H, W, 3]``.
            keep: names of layers.
            advance: called with 1 after each layer.
        """
        layers = {name: layer for name, layer in self.layers.items() if name not in keep}
        places = self.places(layers)
        affines = self.affines(places)
        integers = fit_layers(
            self.graph, layers, places, affines, pixels, self.fitter, correct_bias=self.correct_bias, advance=advance
        )
        return self._candidate(layers, places, affines, integers)

    def reuse(self, integers: Mapping[str, IntegerLayer], keep: Collection[str] = ()) -> Candidate:
        """Make the INT8 model with these layers kept in float, from integers that were fitted for another choice."""
        layers = {name: layer for name, layer in self.layers.items() if name in integers and name not in keep}
        places = self.places(layers)
        return self._candidate(layers, places, self.affines(places), integers)

    def rebias(
        self, integers: Mapping[str, IntegerLayer], pixels: NDArray[np.uint8], keep: Collection[str] = ()
    ) -> Candidate:
        """Make the INT8 model with these layers kept in float, with known weights and biases corrected anew.

        Biases make good what is rounded before them, so those of another choice would do harm.

        Args:
            integers: fitted for another choice.
            pixels: images to correct biases on, uint8 ``[n, H, W, 3]``.
            keep: names of layers.
        """
        layers = {name: layer for name, layer in self.layers.items() if name in integers and name not in keep}
        places = self.places(layers)
        affines = self.affines(places)

        def known(inputs: LayerInputs) -> IntegerLayer:
            return replace(integers[inputs.layer.name], bias=inputs.bias)

        corrected = fit_layers(self.graph, layers, places, affines, pixels, known, correct_bias=self.correct_bias)
        return self._candidate(layers, places, affines, corrected)

    def with_factor(self, tensor: str, factor: float) -> Recipe:
        """Return the recipe with another factor on a tensor's range."""
        return replace(self, factors={**self.factors, tensor: factor})

    @cached_property
    def _affines(self) -> dict[str, Affine]:
        return {}

    def _affine(self, tensor: str) -> Affine:
        if tensor in self.learned:
            return self.learned[tensor]
        observation = self.observations[tensor]

        def make(low: float, high: float) -> Affine:
            return affine_for(self.graph, tensor, low, high, self.target)

        low, high = choose_range(observation, self.method, make)
        factor = self.factors.get(tensor, 1.0)
        # Steps beyond ReLU6's bound would be wasted, and its kernel would be a float one.
        return make(low * factor, min(high * factor, _upper_bound(self.graph, tensor)))

    def _candidate(
        self,
        layers: Mapping[str, Layer],
        places: Places,
        affines: Mapping[str, Affine],
        integers: Mapping[str, IntegerLayer],
    ) -> Candidate:
        model = emit(self.graph, layers, places, affines, integers)
        kept = tuple(name for name in self.layers if name not in layers)
        return Candidate(model, tuple(layers), kept, affines, {name: integers[name] for name in layers})


def _upper_bound(graph: Graph, tensor: str) -> float:
    """Return what a Clip that makes the tensor cuts off at."""
    maker = graph.producers.get(tensor)
    if maker is None or maker.op_type != "Clip" or len(maker.input) < 3 or maker.input[2] not in graph.initializers:
        return float("inf")
    return float(constant_of(graph, maker.input[2]))
