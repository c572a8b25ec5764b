"""Making the INT8 model of one target: observe, equalise, fit, measure, and keep layers in float to meet a gate."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from admth_calibration.equalising import Equalisation, equalise, tensors_to_equalise
from admth_calibration.fitting_layers import LayerFitter
from admth_calibration.graph import Graph
from admth_calibration.latency import LatencyMeter, layer_times
from admth_calibration.layers import find_layers, select_layers
from admth_calibration.learned import LearnedQuantization, learned_affines
from admth_calibration.mixed import Family, FrontPoint, MixedResult, measure_candidate, search_layers
from admth_calibration.observing import Observation, channel_extremes, observe
from admth_calibration.pixels import with_exact_pixels
from admth_calibration.places import find_places
from admth_calibration.recipe import Candidate, Recipe
from admth_calibration.scoring import Scorer
from admth_calibration.sensitivity import LayerSensitivity, measure_sensitivity
from admth_calibration.sign_aware import tune_ranges
from admth_runtime.console import progress
from admth_runtime.cpu import cpu_flags
from admth_runtime.errors import ModelError

if TYPE_CHECKING:
    from admth_calibration.drawing import Sample
    from admth_calibration.options import CalibrationOptions
    from admth_runtime.model import ModelFile

__all__ = ["Made", "Maker", "needs_reduced_range"]

_VNNI = {"avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm"}
_LATENCY_IMAGES = 16
_REBIAS_IMAGES = 48  # means need few images: each has hundreds of positions


@dataclass(frozen=True, eq=False)
class Made:
    """A model that met its gates.

    Attributes:
        target: ``"cpu"`` or ``"trt"``.
        candidate: the model.
        point: its measurement, or None where there were no images to measure on.
        points: everything that was measured on the way.
        sensitivities: of every layer, where they were measured.
        compared: images that it was compared on.
        seen: they gave the ranges too.
        blended: each of them with a tenth of another, so that the network has not seen them.
        map_ratio: mAP over that of FP32, by code length, where a gate asked for it.
        reduced: weights take 7 bits.
    """

    target: str
    candidate: Candidate
    point: FrontPoint | None
    points: tuple[FrontPoint, ...]
    sensitivities: tuple[LayerSensitivity, ...]
    compared: int
    seen: bool
    blended: bool
    map_ratio: Mapping[int, float] | None
    reduced: bool


class Maker:
    """Makes INT8 models of one FP32 model; what its images show is looked at once for all targets.

    Args:
        graph: the FP32 graph.
        source: its file.
        sample: the images, or None for a model with learned scales.
        options: how.
        learned: what training has learned, or None.
    """

    def __init__(
        self,
        graph: Graph,
        source: ModelFile,
        sample: Sample | None,
        options: CalibrationOptions,
        learned: LearnedQuantization | None,
    ) -> None:
        self.graph = graph
        self.source = source
        self.sample = sample
        self.options = options
        self.learned = learned

    def make(self, target: str) -> Made:
        """Make the model of a target.

        Raises:
            ModelError: a gate is missed; the message says by how much.
        """
        reduced = target == "cpu" and self._reduced()
        fitter = LayerFitter(self.options.rounding, largest=63 if reduced else 127, half=target == "trt")
        recipe = Recipe(
            self.prepared,
            target,
            {} if self.sample is None else self.observations,
            "mse" if self.options.method == "sign-aware" else self.options.method,
            fitter,
            correct_bias=self.options.correct_bias,
            learned={} if self.learned is None else learned_affines(self.prepared, self.learned),
        )
        fixed = self._fixed(recipe)
        if self.sample is None:
            none = np.zeros((1, *self._size()), dtype=np.uint8)
            return Made(target, recipe.fit(none, fixed), None, (), (), 0, False, False, None, reduced)
        if self.options.method == "sign-aware":
            recipe = replace(recipe, fitter=replace(fitter, weights=self.block_weights))
        everything = self._fit(recipe, fixed, f"fitting layers for {target}")
        if self.options.method == "sign-aware":
            recipe = tune_ranges(recipe, everything, self.block_scorer)
            everything = self._fit(recipe, fixed, "fitting layers again")
        return self._measured(target, recipe, everything, fixed, reduced)

    def _measured(
        self, target: str, recipe: Recipe, everything: Candidate, fixed: Sequence[str], reduced: bool
    ) -> Made:
        meter = self.meter if target == "cpu" else None
        start = measure_candidate(everything, self.scorer, meter, "all INT8")
        sensitivities: list[LayerSensitivity] = []
        gates = self.options.gates
        if self.options.sensitivity or not gates.met_by(start):
            block = self.block[:_REBIAS_IMAGES] if self.options.sensitivity else None
            with progress("measuring layers", len(everything.layers), unit="layers") as advance:
                sensitivities = measure_sensitivity(recipe, everything, self.scorer, block, advance=advance)
        result = MixedResult(everything, start, (start,))
        if not gates.met_by(start):
            costs = self._costs(recipe, everything) if target == "cpu" else self._weights(everything)
            with progress("searching layers", None, unit="models") as advance:

                def built(kept: Sequence[str], family: Family) -> tuple[Candidate, FrontPoint]:
                    keep = {*kept, *fixed}
                    candidate = recipe.rebias(everything.integers, self.block[:_REBIAS_IMAGES], keep)
                    advance(1)
                    return candidate, measure_candidate(candidate, self.scorer, meter, family)

                def measure(kept: Sequence[str], family: Family) -> FrontPoint:
                    return built(kept, family)[1]

                def rebuild(kept: Sequence[str]) -> tuple[Candidate, FrontPoint]:
                    return built(kept, "chosen")

                def refit(kept: Sequence[str]) -> tuple[Candidate, FrontPoint]:
                    candidate = recipe.fit(self.block, {*kept, *fixed})
                    advance(1)
                    return candidate, measure_candidate(candidate, self.scorer, meter, "chosen")

                result = search_layers(start, everything.layers, sensitivities, costs, gates, measure, refit, rebuild)
        ratios = self._map_ratios(result)
        misses = gates.misses(result.point, None if ratios is None else min(ratios.values()))
        if result.chosen is None or misses:
            raise ModelError(
                f"no INT8 model for {target} meets the gates, and nothing is written: the best of {len(result.points)} "
                f"with {len(result.point.kept)} layers in float: {'; '.join(misses) or 'its fit misses them'}: lower a "
                "gate, pass more --images, or train with  admth-train fit --qat"
            )
        compared = len(self.check_pixels)
        assert self.sample is not None
        measured = (result.point, result.points, tuple(sensitivities))
        looks = (compared, self.sample.seen, self.sample.blended)
        return Made(target, result.chosen, *measured, *looks, ratios, reduced)

    @cached_property
    def prepared(self) -> Graph:
        """The FP32 graph with exact pixels and equalised channels."""
        graph = Graph(with_exact_pixels(self.graph.model))
        wanted = tensors_to_equalise(graph, Equalisation()) if self.options.equalise and self.sample else []
        if not wanted:
            return graph
        assert self.sample is not None
        largest = channel_extremes(graph.model, wanted, self.sample.batches("looking at channels"))
        return Graph(equalise(graph, largest, Equalisation()))

    @cached_property
    def observations(self) -> Mapping[str, Observation]:
        """What every tensor is like that some target quantises."""
        assert self.sample is not None
        sample, graph = self.sample, self.prepared
        layers = find_layers(graph)
        tensors = {name for target in self.options.targets for name in find_places(graph, layers, target).ranged}
        # Layers that stay in float change where places are; their neighbours' tensors are observed as well.
        tensors |= {name for layer in layers.values() for name in (layer.source, layer.result)}
        outputs = {output.name for output in graph.model.graph.output}
        counting = self.options.method != "min-max"
        return observe(
            graph.model,
            sorted(tensors - outputs),
            lambda: sample.batches("looking at values"),
            histograms=counting,
        )

    @cached_property
    def block(self) -> NDArray[np.uint8]:
        """Pixels to fit layers on."""
        assert self.sample is not None
        return self.sample.block(min(self.options.block_images, len(self.sample.chosen)))

    @cached_property
    def check_pixels(self) -> NDArray[np.uint8]:
        """Pixels to compare on."""
        assert self.sample is not None
        return self.sample.check_pixels()

    @cached_property
    def scorer(self) -> Scorer:
        """Compares with the FP32 model on the images to compare on."""
        return Scorer(self.graph.model, self.check_pixels)

    @cached_property
    def block_scorer(self) -> Scorer:
        """Compares with the FP32 model on images of the calibration itself, so that tuning sees no others."""
        assert self.sample is not None
        return Scorer(self.graph.model, self.sample.block(min(256, len(self.sample.chosen))))

    @cached_property
    def block_weights(self) -> NDArray[np.float32]:
        """How much each image of the block counts where flips and not errors are counted."""
        return Scorer(self.graph.model, self.block).image_weights()

    @cached_property
    def meter(self) -> LatencyMeter:
        """Measures latency against the FP32 model."""
        return LatencyMeter(self.graph.model, self.check_pixels[:_LATENCY_IMAGES])

    def _fixed(self, recipe: Recipe) -> list[str]:
        """Return the layers that the user keeps in float."""
        chosen = select_layers(recipe.layers, self.options.keep_fp32)
        return [name for name in recipe.layers if name not in chosen]

    def _fit(self, recipe: Recipe, keep: Sequence[str], description: str) -> Candidate:
        kept = {*keep, *self._fixed(recipe)}
        with progress(description, len(recipe.layers) - len(kept), unit="layers") as advance:
            return recipe.fit(self.block, sorted(kept), advance=advance)

    def _costs(self, recipe: Recipe, everything: Candidate) -> dict[str, float]:
        """Return what keeping each layer in float costs in microseconds, by both models' profiles."""
        pixels = self.check_pixels[:_LATENCY_IMAGES]
        norms = len([node for region in self.graph.response_norms() for node in region if node.op_type == "Conv"])
        count = len(recipe.layers) + norms
        exact = layer_times(self.graph.model, pixels, count)
        rounded = layer_times(everything.model, pixels, count)
        if exact is None or rounded is None or norms:
            return self._weights(everything)
        pairs = zip(recipe.layers, exact, rounded, strict=True)
        return {name: slow - fast for name, slow, fast in pairs if name in everything.layers}

    def _weights(self, everything: Candidate) -> dict[str, float]:
        """Return the number of each layer's weights, a stand-in where time is not known."""
        return {name: float(values.values.size) for name, values in everything.integers.items()}

    def _map_ratios(self, result: MixedResult) -> dict[int, float] | None:
        if self.options.gates.min_map_ratio is None or result.chosen is None:
            return None
        from admth_calibration.retrieval import map_ratios

        assert self.sample is not None
        return map_ratios(self.graph.model, result.chosen.model, self.sample)

    def _reduced(self) -> bool:
        return {"yes": True, "no": False}.get(self.options.reduce_range, needs_reduced_range())

    def _size(self) -> tuple[int, int, int]:
        spec = self.source.manifest.preprocessing
        return spec.height, spec.width, 3


def needs_reduced_range(machine: str | None = None, flags: Sequence[str] | None = None) -> bool:
    """Whether this processor's products of uint8 and int8 overflow: x86-64 without VNNI adds two in 16 bits.

    Args:
        machine: its architecture; None asks the system.
        flags: its vector instructions; None asks the system.
    """
    machine = platform.machine() if machine is None else machine
    flags = cpu_flags() if flags is None else flags
    return machine.lower() in ("x86_64", "amd64") and not _VNNI & set(flags)
