"""How well a candidate keeps the signs of the FP32 model's logits, on images that no range was taken from.

Counting flips is the truth but a coarse measure: of two candidates on a few hundred images the luckier one wins. So
choices are made by the *flip risk*: the chance that a bit flips, smoothed over logits near zero by the size of the
logit error itself. A bit of wide margin then counts for nothing, as it should, and one that has just not flipped
counts nearly as much as one that just has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from admth_calibration.probing import open_probe
from admth_runtime.errors import ModelError

if TYPE_CHECKING:
    import onnx

__all__ = ["Score", "Scorer"]

_BATCH = 16


@dataclass(frozen=True)
class Score:
    """A candidate against the FP32 model.

    Attributes:
        bit_parity: share of equal bits by code length.
        exact_code_rate: share of images whose code is equal, by code length.
        risk: mean flip risk of a bit, 0 to 1, above that of the FP32 model itself.
        error: root mean square of the difference of the logits.
    """

    bit_parity: Mapping[int, float]
    exact_code_rate: Mapping[int, float]
    risk: float
    error: float

    @property
    def least(self) -> float:
        """Bit parity of the worst code length."""
        return min(self.bit_parity.values())

    @property
    def mean(self) -> float:
        """Mean bit parity of the code lengths."""
        return float(np.mean(list(self.bit_parity.values())))


class Scorer:
    """The FP32 model's logits on some images, to compare candidates with.

    Args:
        model: the FP32 model.
        pixels: uint8 ``[n, H, W, 3]``.
        threads: CPU threads; None takes one a usable core.
    """

    def __init__(self, model: onnx.ModelProto, pixels: NDArray[np.uint8], *, threads: int | None = None) -> None:
        self._pixels = pixels
        self._threads = threads
        self._names = [output.name for output in model.graph.output if output.name.startswith("logits_")]
        self.reference = self.logits(model)
        """The FP32 logits by code length, float32 ``[n, L]``."""
        self._width: float | None = None

    def logits(self, model: onnx.ModelProto) -> dict[int, NDArray[np.float32]]:
        """Run a model on the images.

        Raises:
            ModelError: a logit is not finite, or ONNX Runtime refuses the model.
        """
        starts = range(0, len(self._pixels), _BATCH)
        with open_probe(model, self._names, threads=self._threads) as probe:
            parts = [probe.run(self._pixels[start : start + _BATCH]) for start in starts]
        found = {
            int(name.removeprefix("logits_")): np.concatenate(values)
            for name, values in zip(self._names, zip(*parts, strict=True), strict=True)
        }
        for length, values in found.items():
            if not bool(np.isfinite(values).all()):
                raise ModelError(f"a value of logits_{length} is not finite: calibrate with more images")
        return found

    def score(self, model: onnx.ModelProto) -> Score:
        """Compare a candidate with the FP32 model. The first one sets the width of the flip risk."""
        return self.compare(self.logits(model))

    def compare(self, logits: Mapping[int, NDArray[np.float32]]) -> Score:
        """Compare logits, float32 ``[n, L]`` by code length, with those of the FP32 model."""
        wanted = self.reference
        equal = {length: (logits[length] > 0) == (wanted[length] > 0) for length in wanted}
        squares = [np.square(logits[length] - wanted[length], dtype=np.float64).mean() for length in wanted]
        error = float(np.sqrt(np.mean(squares)))
        if self._width is None:
            self._width = max(error, 1e-6)
        risks = [
            float(
                _risk(wanted[length], logits[length], self._width) - _risk(wanted[length], wanted[length], self._width)
            )
            for length in wanted
        ]
        return Score(
            {length: float(same.mean()) for length, same in equal.items()},
            {length: float(same.all(axis=1).mean()) for length, same in equal.items()},
            float(np.mean(risks)),
            error,
        )

    def image_weights(self) -> NDArray[np.float32]:
        """Return how much each image's errors matter: float32 ``[n]``, 1 on average.

        An image counts by its bits near the threshold, where an error flips them.
        """
        near = [np.exp(-np.abs(values) / np.median(np.abs(values))).mean(axis=1) for values in self.reference.values()]
        weights = np.mean(near, axis=0)
        return np.asarray(weights / max(float(weights.mean()), 1e-12), dtype=np.float32)


def _risk(reference: NDArray[np.float32], logits: NDArray[np.float32], width: float) -> float:
    """Return the mean chance of a wrong sign, if noise of this width were added once more."""
    signed = np.where(reference > 0, logits, -logits).astype(np.float64) / width
    return float(np.mean(1.0 / (1.0 + np.exp(np.clip(signed, -60, 60)))))
