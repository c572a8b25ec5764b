"""What an INT8 model must meet, and by how much it misses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from admth_runtime.errors import InputError

if TYPE_CHECKING:
    from admth_calibration.mixed import FrontPoint

__all__ = ["Gates"]


@dataclass(frozen=True)
class Gates:
    """Conditions on an INT8 model; None is no condition.

    Attributes:
        min_bit_parity: least share of bits equal to the FP32 model's, at every code length.
        min_map_ratio: least mAP of INT8 queries over that of FP32 queries, against FP32 codes, at every code length.
        max_latency_ratio: most time over the FP32 model's, one image a call, on this machine's CPU.

    Raises:
        InputError: a value is out of range.
    """

    min_bit_parity: float | None = None
    min_map_ratio: float | None = None
    max_latency_ratio: float | None = None

    def __post_init__(self) -> None:
        for name, largest in (("min_bit_parity", 1.0), ("min_map_ratio", 1.0), ("max_latency_ratio", 10.0)):
            value = getattr(self, name)
            option = f"--{name.replace('_', '-')}"
            if value is not None and not 0.0 < value <= largest:
                hint = "; write a share such as 0.995" if largest == 1.0 else ""
                raise InputError(f"{option} {value:g} is not above 0 and at most {largest:g}{hint}")
        if self.min_bit_parity is not None and self.min_bit_parity < 0.5:
            raise InputError(f"--min-bit-parity {self.min_bit_parity:g} is no better than chance: ask for 0.9 or more")

    @property
    def any(self) -> bool:
        """Whether there is a condition."""
        return any(value is not None for value in (self.min_bit_parity, self.min_map_ratio, self.max_latency_ratio))

    def parity_met_by(self, point: FrontPoint) -> bool:
        """Whether enough bits are equal."""
        return self.min_bit_parity is None or point.score.least >= self.min_bit_parity

    def too_slow(self, point: FrontPoint) -> bool:
        """Whether it takes too long."""
        ratio = point.latency_ratio
        return self.max_latency_ratio is not None and ratio is not None and ratio > self.max_latency_ratio

    def met_by(self, point: FrontPoint) -> bool:
        """Whether parity and latency are met; mAP is measured last, on the model that these choose."""
        return self.parity_met_by(point) and not self.too_slow(point)

    def misses(self, point: FrontPoint, map_ratio: float | None = None) -> list[str]:
        """Say by how much each condition is missed."""
        found = []
        if not self.parity_met_by(point):
            assert self.min_bit_parity is not None
            found.append(
                f"bit parity {100 * point.score.least:.3f} % misses {100 * self.min_bit_parity:.3f} % by "
                f"{100 * (self.min_bit_parity - point.score.least):.3f} points"
            )
        if self.too_slow(point):
            assert self.max_latency_ratio is not None and point.latency_ratio is not None
            found.append(
                f"latency {point.latency_ratio:.3f} of FP32 misses {self.max_latency_ratio:.3f} by "
                f"{point.latency_ratio - self.max_latency_ratio:.3f}"
            )
        if self.min_map_ratio is not None and map_ratio is not None and map_ratio < self.min_map_ratio:
            found.append(
                f"mAP {map_ratio:.4f} of FP32's misses {self.min_map_ratio:.4f} by {self.min_map_ratio - map_ratio:.4f}"
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return the conditions that there are."""
        values = {
            "min_bit_parity": self.min_bit_parity,
            "min_map_ratio": self.min_map_ratio,
            "max_latency_ratio": self.max_latency_ratio,
        }
        return {name: value for name, value in values.items() if value is not None}
