"""Which layers cost bits: every layer alone in INT8, and every layer alone left out of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from admth_calibration.recipe import Candidate, Recipe
from admth_calibration.scoring import Scorer

__all__ = ["LayerSensitivity", "measure_sensitivity", "sensitivity_rows"]


@dataclass(frozen=True)
class LayerSensitivity:
    """What one layer does to the bits.

    Attributes:
        layer: its name.
        kind: ``"depthwise"``, ``"conv"`` or ``"dense"``.
        flips_alone: share of bits that flip when it alone is in INT8.
        error_alone: root mean square logit error then. Squares of errors nearly add up over layers.
        flips_without: share of bits that flip when all the others are in INT8 and it is not; None where that was not
            measured.
    """

    layer: str
    kind: str
    flips_alone: float
    error_alone: float
    flips_without: float | None


def measure_sensitivity(
    recipe: Recipe,
    everything: Candidate,
    scorer: Scorer,
    block: NDArray[np.uint8] | None = None,
    *,
    advance: Callable[[int], None] = lambda layers: None,
) -> list[LayerSensitivity]:
    """Measure every layer of a model that is INT8 throughout.

    Args:
        recipe: how models are made.
        everything: the model with all layers in INT8.
        scorer: compares with FP32.
        block: images to correct biases on, uint8 ``[n, H, W, 3]``, to measure each layer left out too; that takes
            several times as long.
        advance: called with 1 after each layer.
    """
    found = []
    for name in everything.layers:
        only = scorer.score(recipe.reuse({name: everything.integers[name].alone()}).model)
        without = None
        if block is not None:
            without = 1 - scorer.score(recipe.rebias(everything.integers, block, keep=[name]).model).mean
        found.append(LayerSensitivity(name, recipe.layers[name].kind, 1 - only.mean, only.error, without))
        advance(1)
    return found


def sensitivity_rows(found: Sequence[LayerSensitivity]) -> list[dict[str, Any]]:
    """Return the measurements as plain values, the most harmful layer first."""
    return [asdict(item) for item in sorted(found, key=lambda item: -item.error_alone)]
