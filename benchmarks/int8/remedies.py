"""What every remedy against flipped bits gives: one left out, or one put in another's place, all layers in INT8."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from admth_calibration.equalising import Equalisation, equalise, tensors_to_equalise
from admth_calibration.fitting_layers import LayerFitter
from admth_calibration.graph import Graph, load_graph
from admth_calibration.layers import find_layers
from admth_calibration.observing import channel_extremes, observe
from admth_calibration.pixels import with_exact_pixels
from admth_calibration.places import find_places
from admth_calibration.recipe import Recipe
from admth_calibration.scoring import Scorer
from admth_calibration.sign_aware import tune_ranges
from admth_runtime.console import track
from int8.networks import prepare_network
from int8.reference import prepare_reference
from int8.settings import CASES, Settings

__all__ = ["measure_remedies"]

_BLOCK = 128
_BATCH = 16

# name: rounding, bias correction, ranges, equalisation of depthwise inputs, of the residual stream, of dense inputs
_VARIANTS: dict[str, tuple[str, bool, str, float, float, float]] = {
    "rounded to nearest, min-max": ("nearest", False, "min-max", 0.0, 0.0, 0.0),
    "+ ranges of least squares": ("nearest", False, "mse", 0.0, 0.0, 0.0),
    "+ bias correction in layer order": ("nearest", True, "mse", 0.0, 0.0, 0.0),
    "+ zero-sum rounding in place of nearest": ("zero-sum", True, "mse", 0.0, 0.0, 0.0),
    "+ GPTQ in place of zero-sum rounding": ("gptq", True, "mse", 0.0, 0.0, 0.0),
    "+ equalisation before depthwise convolutions": ("gptq", True, "mse", 0.5, 0.0, 0.0),
    "+ equalisation of the residual stream: the default": ("gptq", True, "mse", 0.5, 0.5, 0.0),
    "the default, and SmoothQuant before fully connected layers": ("gptq", True, "mse", 0.5, 0.5, 0.5),
    "the default with min-max ranges": ("gptq", True, "min-max", 0.5, 0.5, 0.0),
    "the default with percentile ranges": ("gptq", True, "percentile", 0.5, 0.5, 0.0),
    "the default with entropy ranges": ("gptq", True, "entropy", 0.5, 0.5, 0.0),
    "the default with sign-aware ranges and roundings": ("gptq", True, "sign-aware", 0.5, 0.5, 0.0),
}


def measure_remedies(settings: Settings) -> dict[str, Any]:
    """Return the bits equal to FP32 on the test images of EfficientNet-Lite0 and Fashion-MNIST, by variant."""
    network = prepare_network(CASES["efficientnet-fashion"], settings)
    reference = prepare_reference(network, settings)
    with np.load(reference.pixels) as arrays:
        calibration, test = arrays["calibration"], arrays["test"]
    graph = Graph(with_exact_pixels(load_graph(str(network.onnx))))
    scorer = Scorer(graph.model, test, threads=settings.threads)
    found: dict[str, Any] = {}
    prepared: dict[Equalisation, tuple[Graph, Any]] = {}
    for name in track(list(_VARIANTS), "remedies"):
        rounding, correct, method, depthwise, stream, dense = _VARIANTS[name]
        options = Equalisation(depthwise, stream, dense)
        if options not in prepared:
            prepared = {options: _prepared(graph, options, calibration)}  # one at a time: histograms are large
        equal, observations = prepared[options]
        signs = method == "sign-aware"
        weights = Scorer(graph.model, calibration[:_BLOCK]).image_weights() if signs else None
        recipe = Recipe(
            equal, "cpu", observations, "mse" if signs else method, LayerFitter(rounding, weights=weights), correct
        )
        candidate = recipe.fit(calibration[:_BLOCK])
        if signs:
            recipe = tune_ranges(recipe, candidate, Scorer(graph.model, calibration[: 2 * _BLOCK]))
            candidate = recipe.fit(calibration[:_BLOCK])
        score = scorer.score(candidate.model)
        found[name] = {**asdict(score), "bit_parity": {str(n): share for n, share in score.bit_parity.items()}}
    return found


def _prepared(graph: Graph, options: Equalisation, pixels: Any) -> tuple[Graph, Any]:
    def batches() -> Any:
        return (pixels[start : start + _BATCH] for start in range(0, len(pixels), _BATCH))

    wanted = tensors_to_equalise(graph, options)
    equal = graph
    if wanted:
        equal = Graph(equalise(graph, channel_extremes(graph.model, wanted, batches()), options))
    places = find_places(equal, find_layers(equal), "cpu")
    return equal, observe(equal.model, places.ranged, batches, histograms=True)
