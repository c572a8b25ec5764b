"""How a layer's integers are chosen from its inputs: which rounding, and the moments that it needs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from admth_calibration.affine import least_weight_scales, weight_scales
from admth_calibration.layers import Layer
from admth_calibration.lockstep import IntegerLayer, LayerInputs
from admth_calibration.rounding import gptq_columns, gptq_per_channel, inverse_factor, nearest, zero_sum

__all__ = ["LayerFitter"]

_SAMPLES = 6144  # of positions; moments of more change nothing that can be measured
_PATCH_SAMPLES = 2048
# GPTQ inverts a square matrix of the inputs; beyond this size zero-sum rounding takes its place. CNN-F's dense
# layers have 4,096 to 9,216 inputs, average their errors over all of them, and would take minutes.
_MOST_INPUTS = 2048
_FEW_INPUTS = 64
_SCALE_FACTORS = np.linspace(1.0, 0.8, 33)


@dataclass(frozen=True)
class LayerFitter:
    """Chooses a layer's integers.

    Attributes:
        rounding: one of :data:`admth_calibration.options.ROUNDINGS`.
        largest: bound of the weights' integers: 127, or 63 for processors whose products overflow 16 bits.
        half: scales are numbers that FP16 has.
        weights: float ``[n]``, how much each image of the block counts, or None for all alike.
        seed: of the positions that are drawn.
    """

    rounding: str = "gptq"
    largest: int = 127
    half: bool = False
    weights: NDArray[np.float32] | None = None
    seed: int = 0

    def __call__(self, inputs: LayerInputs) -> IntegerLayer:
        """Choose the integers of a layer."""
        layer = inputs.layer
        rows = layer.rows(inputs.weight)
        least = None if self.half else least_weight_scales(inputs.bias, inputs.affine.scale)
        first = weight_scales(rows, half=self.half, largest=self.largest, least=least)
        values, scales = self._rounded(inputs, rows, first)
        return IntegerLayer(layer.from_rows(values, inputs.weight.shape), scales, inputs.bias, inputs.bias)

    def _rounded(
        self, inputs: LayerInputs, rows: NDArray[np.float32], scales: NDArray[np.float32]
    ) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        if self.rounding == "nearest":
            return nearest(rows, scales, self.largest), scales
        own = inputs.layer.kind == "depthwise"
        samples = self._samples(inputs)
        if self.rounding == "zero-sum" or rows.shape[1] > _MOST_INPUTS:
            means = samples.mean(axis=2) if own else samples.mean(axis=0)
            return zero_sum(rows, scales, means, self.largest), scales
        if own:
            return self._best_scales(rows, scales, samples @ np.swapaxes(samples, 1, 2))
        moments = samples.T @ samples
        if rows.shape[1] <= _FEW_INPUTS:
            return self._best_scales(rows, scales, np.broadcast_to(moments, (len(rows), *moments.shape)))
        # Few positions say little of many inputs; a larger damping then keeps rounding nearer to the nearest.
        damping = 0.01 + 0.1 * rows.shape[1] / len(samples)
        return gptq_columns(rows, scales, moments, damping=damping, largest=self.largest), scales

    def _best_scales(
        self, rows: NDArray[np.float32], scales: NDArray[np.float32], moments: NDArray[np.float32]
    ) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        """Try finer scales for channels of few weights, and keep the one of least squared error for each.

        Nine roundings can hardly make good for each other. Another scale rounds them another way, so the best of many
        is several times better than the first.
        """
        best_values, best_scales = np.zeros(rows.shape, dtype=np.int8), scales.copy()
        best = np.full(len(rows), np.inf)
        upper = inverse_factor(moments)  # the same for every scale
        for factor in _SCALE_FACTORS:
            tried = scales * np.float32(factor)
            if self.half:
                tried = tried.astype(np.float16).astype(np.float32)
            values = gptq_per_channel(rows, tried, upper, largest=self.largest)
            wrong = values * tried[:, None] - rows
            error = np.einsum("ci,cij,cj->c", wrong, moments, wrong, optimize=True)
            better = (error < best) & (tried > 0)
            best[better] = error[better]
            best_values[better], best_scales[better] = values[better], tried[better]
        return best_values, best_scales

    def _samples(self, inputs: LayerInputs) -> NDArray[np.float32]:
        """Draw inputs: ``[positions, inputs]``, or ``[channels, inputs, positions]`` for a depthwise convolution.

        They are scaled by the root of what their image counts.
        """
        layer, values = inputs.layer, inputs.rounded
        rng = np.random.default_rng(self.seed)
        if layer.kind == "dense":
            return values if self.weights is None else values * np.sqrt(self.weights)[:, None]
        window = _Window(layer, inputs.weight.shape, values.shape)
        most = _PATCH_SAMPLES if layer.kind == "depthwise" else _SAMPLES
        chosen = np.sort(rng.permutation(window.positions)[:most])
        patches = window.patches(values, chosen)
        if self.weights is not None:
            patches *= np.sqrt(self.weights)[chosen // window.per_image]
        if layer.kind == "depthwise":
            return patches
        return np.ascontiguousarray(patches.reshape(-1, len(chosen)).T)


class _Window:
    """What a convolution sees at each of its positions."""

    def __init__(self, layer: Layer, weight: tuple[int, ...], values: tuple[int, ...]) -> None:
        attributes = layer.attributes()
        self._kernel = weight[2:]
        self._strides = attributes.get("strides", [1, 1])
        self._dilations = attributes.get("dilations", [1, 1])
        self._pads = attributes.get("pads", [0, 0, 0, 0])
        spans = [d * (k - 1) + 1 for k, d in zip(self._kernel, self._dilations, strict=True)]
        sizes = [values[2 + axis] + self._pads[axis] + self._pads[axis + 2] for axis in (0, 1)]
        steps = zip(sizes, spans, self._strides, strict=True)
        self._grid = [(size - span) // stride + 1 for size, span, stride in steps]
        self.per_image = self._grid[0] * self._grid[1]
        self.positions = values[0] * self.per_image

    def patches(self, values: NDArray[np.float32], chosen: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return ``[channels, kernel size, positions]`` at the chosen positions."""
        top, left, bottom, right = self._pads
        padded = np.pad(values.transpose(1, 0, 2, 3), ((0, 0), (0, 0), (top, bottom), (left, right)))
        channels, _, height, width = padded.shape
        flat = padded.reshape(channels, -1)
        image, place = np.divmod(chosen, self.per_image)
        row, column = np.divmod(place, self._grid[1])
        corner = (image * height + row * self._strides[0]) * width + column * self._strides[1]
        found = np.empty((channels, self._kernel[0] * self._kernel[1], len(chosen)), dtype=np.float32)
        for y in range(self._kernel[0]):
            for x in range(self._kernel[1]):
                offset = y * self._dilations[0] * width + x * self._dilations[1]
                found[:, y * self._kernel[1] + x] = flat[:, corner + offset]
        return found
