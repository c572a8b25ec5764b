"""Mixed precision to a gate: the layers to keep in float so that enough bits stay, at the least latency.

Sensitivities nearly add up, so layers are ranked by what each saves over what it costs, and the sets that the ranking
proposes are built and measured. Keeping the first layers is tried too: one float run at the start has no borders
inside, where tensors change type. What is chosen was measured; predictions only say what to measure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

from admth_calibration.gates import Gates
from admth_calibration.latency import LatencyMeter
from admth_calibration.recipe import Candidate
from admth_calibration.scoring import Score, Scorer
from admth_calibration.sensitivity import LayerSensitivity

__all__ = ["FrontPoint", "MixedResult", "pareto_front", "search_layers"]

Family = Literal["all INT8", "ranked", "first layers", "chosen"]
"""What proposed a choice of layers."""


@dataclass(frozen=True, eq=False)
class FrontPoint:
    """One measured choice of layers.

    Attributes:
        kept: layers in float.
        score: against the FP32 model.
        latency_ratio: time over the FP32 model's on the CPU; None where the target is not the CPU.
        bytes: size of the model.
        family: what proposed it: the ranking, or the first layers.
    """

    kept: tuple[str, ...]
    score: Score
    latency_ratio: float | None
    bytes: int
    family: Family

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "kept": list(self.kept),
            "bit_parity": {str(length): share for length, share in self.score.bit_parity.items()},
            "latency_ratio": self.latency_ratio,
            "bytes": self.bytes,
            "family": self.family,
        }


@dataclass(frozen=True, eq=False)
class MixedResult:
    """What a search found.

    Attributes:
        chosen: the candidate that meets the gates, or None.
        point: its measurement, or that of the nearest miss.
        points: everything that was measured, in order.
    """

    chosen: Candidate | None
    point: FrontPoint
    points: tuple[FrontPoint, ...]


Build = Callable[[Sequence[str]], tuple[Candidate, "FrontPoint"]]
_MOST_FITS = 3


class Measure(Protocol):
    """Builds the model that keeps some layers in float, and measures it."""

    def __call__(self, kept: Sequence[str], family: Family) -> FrontPoint:
        """Measure a choice of layers."""


def measure_candidate(
    candidate: Candidate,
    scorer: Scorer,
    meter: LatencyMeter | None,
    family: Family,
) -> FrontPoint:
    """Measure a candidate's parity, latency and size."""
    ratio = None if meter is None else meter.ratio(candidate.model)
    return FrontPoint(candidate.kept, scorer.score(candidate.model), ratio, candidate.model.ByteSize(), family)


def search_layers(
    start: FrontPoint,
    layers: Sequence[str],
    sensitivities: Sequence[LayerSensitivity],
    costs: Mapping[str, float],
    gates: Gates,
    measure: Measure,
    refit: Build,
    rebuild: Build,
) -> MixedResult:
    """Find the layers to keep in float.

    Args:
        start: the measurement of the model with all layers in INT8.
        layers: its layers, in order.
        sensitivities: of every layer.
        costs: what keeping a layer in float costs, by layer, in any unit.
        gates: what the model must meet.
        measure: builds and measures a choice of layers to keep.
        refit: fits the integers anew for a choice, and measures it.
        rebuild: builds once more what ``measure`` measured.
    """
    points = [start]
    errors = {item.layer: item.error_alone**2 for item in sensitivities}
    least = max(
        sum(max(cost, 0.0) for cost in costs.values()) / 200, 1e-9
    )  # what costs nothing is not worth everything
    ranked = sorted(layers, key=lambda name: -errors[name] / max(costs[name], least))
    families: tuple[tuple[Family, list[str]], ...] = (("ranked", ranked), ("first layers", list(layers)))
    for family, order in families:
        points.extend(_climb(start, layers, order, errors, gates, partial(measure, family=family)))
    return _choose(points, gates, refit, rebuild)


def _climb(
    start: FrontPoint,
    layers: Sequence[str],
    order: Sequence[str],
    errors: Mapping[str, float],
    gates: Gates,
    measure: Callable[[Sequence[str]], FrontPoint],
) -> list[FrontPoint]:
    """Measure more and more layers of an order until the gate is met, and then fewer until it is not.

    The first number is predicted: flips go with the root of the sum of the squared errors that are left. Steps double
    from there, so that few models are built.
    """
    found: dict[int, FrontPoint] = {}

    def tried(count: int) -> FrontPoint:
        if count not in found:
            found[count] = measure([name for name in layers if name in order[:count]])
        return found[count]

    most = len(order) - 1
    count, step = _predicted(start, order, errors, gates), 1
    for shown in (count // 3, 2 * count // 3):  # for the picture: how parity grows on the way there
        if 0 < shown < count:
            tried(shown)
    while count < most and not gates.parity_met_by(tried(count)) and not gates.too_slow(found[count]):
        count, step = min(count + step, most), 2 * step
    if gates.parity_met_by(tried(count)):
        while step > 1 and count > step:
            step //= 2
            if gates.parity_met_by(tried(count - step)):
                count -= step
        while count > 1 and gates.parity_met_by(tried(count - 1)):
            count -= 1
    return [found[number] for number in sorted(found)]


def _predicted(start: FrontPoint, order: Sequence[str], errors: Mapping[str, float], gates: Gates) -> int:
    """Predict how many layers of an order must stay in float to meet the gate on parity; 1 at least."""
    if gates.min_bit_parity is None or start.score.least >= 1.0:
        return 1
    wanted = (1 - gates.min_bit_parity) / (1 - start.score.least)
    left = total = sum(errors.values())
    for count, name in enumerate(order, start=1):
        left -= errors[name]
        if left <= total * wanted**2:
            return min(count, len(order) - 1)
    return max(len(order) - 1, 1)


def _choose(points: list[FrontPoint], gates: Gates, refit: Build, rebuild: Build) -> MixedResult:
    """Fit the best measured choices anew, the cheapest first, and take the first that still meets the gates.

    A new fit is mostly better, but not always; where it misses the gates, the model that met them is taken.
    """
    promising = sorted((point for point in points if gates.met_by(point)), key=_price)
    for build, some in ((refit, promising[:_MOST_FITS]), (rebuild, promising[:1])):
        for point in some:
            candidate, measured = build(point.kept)
            points.append(measured)
            if gates.met_by(measured):
                return MixedResult(candidate, measured, tuple(points))
    nearest = max(points, key=lambda point: (not gates.too_slow(point), point.score.least))
    return MixedResult(None, nearest, tuple(points))


def _price(point: FrontPoint) -> tuple[float, float]:
    ratio = float(len(point.kept)) if point.latency_ratio is None else point.latency_ratio
    return ratio, -point.score.least


def pareto_front(points: Sequence[FrontPoint]) -> list[FrontPoint]:
    """Return the points that no other one beats in both parity and latency (or size), fastest first."""
    front: list[FrontPoint] = []
    for point in sorted(points, key=lambda item: (_speed(item), -item.score.least)):
        if not front or point.score.least > front[-1].score.least:
            front.append(point)
    return front


def _speed(point: FrontPoint) -> float:
    return float(point.bytes) if point.latency_ratio is None else point.latency_ratio
