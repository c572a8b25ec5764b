"""Thresholds by flipped bits: the range of a tensor is right where the fewest signs change, not the least error.

Least squares spends steps on values that no bit depends on. Here the tensors that flip most bits get their ranges
tuned one after the other, each to the factor of least flip risk of the whole INT8 network; roundings are fitted with
every image weighted by its bits near the threshold (:meth:`admth_calibration.scoring.Scorer.image_weights`).
"""

from __future__ import annotations

from admth_calibration.recipe import Candidate, Recipe
from admth_calibration.scoring import Scorer
from admth_runtime.console import progress

__all__ = ["tune_ranges"]

_FACTORS = (0.85, 0.93, 1.08)
_MOST_TENSORS = 24
_WORTH_WHILE = 0.005  # of the risk; less is the luck of these images


def tune_ranges(recipe: Recipe, everything: Candidate, scorer: Scorer) -> Recipe:
    """Return the recipe with the ranges that flip the fewest bits.

    Args:
        recipe: how models are made.
        everything: the model with all layers in INT8, whose integers are kept meanwhile.
        scorer: compares with FP32 on images of the calibration.
    """
    risk = scorer.score(everything.model).risk
    places = recipe.places({name: recipe.layers[name] for name in everything.layers})
    tensors = _by_harm(recipe, everything, scorer, places.ranged)[:_MOST_TENSORS]
    with progress("tuning ranges", len(tensors) * len(_FACTORS), unit="models") as advance:
        for tensor in tensors:
            for factor in _FACTORS:
                tried = recipe.with_factor(tensor, factor)
                found = scorer.score(tried.reuse(everything.integers).model).risk
                if found < risk * (1 - _WORTH_WHILE):
                    recipe, risk = tried, found
                advance(1)
    return recipe


def _by_harm(recipe: Recipe, everything: Candidate, scorer: Scorer, tensors: list[str]) -> list[str]:
    """Sort tensors by what a range half as wide again would do: the ones that matter move the risk most."""
    with progress("ranking tensors", len(tensors), unit="tensors") as advance:
        harm = {}
        for tensor in tensors:
            wide = recipe.with_factor(tensor, 1.5)
            harm[tensor] = scorer.score(wide.reuse(everything.integers).model).risk
            advance(1)
    return sorted(tensors, key=lambda tensor: -harm[tensor])
