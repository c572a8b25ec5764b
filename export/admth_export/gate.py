"""The gate: how much a candidate's bits may differ from PyTorch's before it is refused."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from admth_export.parity import LengthParity, RunParity
from admth_runtime.errors import InputError
from admth_runtime.manifest import PRECISIONS, Manifest

__all__ = ["GATES", "Gate"]

_NAMED_FLIPS = 5


@dataclass(frozen=True)
class Gate:
    """What a candidate must fulfil at every code length and every batch size.

    Beside the two limits, every logit must be finite and every code must be the packed signs of its own logits.

    Attributes:
        noise_threshold: tau. A flip whose margin |z| is at most tau is noise: it is counted, and allowed as far as
            ``minimum_bit_parity`` goes. A flip above tau fails the candidate. None judges no single flip.
        minimum_bit_parity: least share of equal bits. Of n bits, ``ceil((1 - minimum) n)`` may differ, so that one
            flip at noise level does not fail a run over few images; with 1.0 none may.
    """

    noise_threshold: float | None
    minimum_bit_parity: float

    def __post_init__(self) -> None:
        tau = self.noise_threshold
        if tau is not None and (isinstance(tau, bool) or not isinstance(tau, (int, float)) or not 0 <= tau < math.inf):
            raise InputError(f"noise threshold {tau!r} is not a number from 0: use for example 0.001")
        share = self.minimum_bit_parity
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise InputError(f"minimum bit parity {share!r} is not from 0 to 1: use for example 0.9999")

    @classmethod
    def of_precision(
        cls, precision: str, *, noise_threshold: float | None = None, minimum_bit_parity: float | None = None
    ) -> Gate:
        """Return the gate of a precision, with what is given in place of its own limits.

        Raises:
            InputError: the precision is unknown, or a limit is out of range.
        """
        if precision not in GATES:
            raise InputError(f"precision {precision!r} is unknown: use one of {', '.join(PRECISIONS)}")
        gate = GATES[precision]
        return cls(
            gate.noise_threshold if noise_threshold is None else noise_threshold,
            gate.minimum_bit_parity if minimum_bit_parity is None else minimum_bit_parity,
        )

    @classmethod
    def of_model(
        cls, manifest: Manifest, *, noise_threshold: float | None = None, minimum_bit_parity: float | None = None
    ) -> Gate:
        """Return the gate of a model by its manifest, with what is given in place of its own limits.

        An INT8 model of a network that was trained with that target's arithmetic computes the same integers, and is
        held to that. Where the rest of it is FP16 it does not.

        Raises:
            InputError: a limit is out of range.
        """
        qat = manifest.network.get("qat")
        same = manifest.precision == "int8" and isinstance(qat, Mapping) and qat.get("target") == manifest.target
        half = (manifest.calibration or {}).get("rest") == "fp16"
        kind = "qat" if same and not half else manifest.precision
        return cls.of_precision(kind, noise_threshold=noise_threshold, minimum_bit_parity=minimum_bit_parity)

    def judge(self, runs: Iterable[RunParity]) -> tuple[str, ...]:
        """Return a line for each thing that fails, naming image, bit and value; none means that it passes."""
        return tuple(
            f"batch {run.batch_size}, {length} bits: {line}"
            for run in runs
            for length, parity in run.lengths.items()
            for line in self._judge_length(parity)
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {"noise_threshold": self.noise_threshold, "minimum_bit_parity": self.minimum_bit_parity}

    def allowed_flips(self, bits: int) -> int:
        """Return how many of so many bits may differ."""
        # The small subtraction undoes the rounding of 1 - minimum: of 10,000 bits, 0.9999 allows 1 and not 2.
        return math.ceil((1.0 - self.minimum_bit_parity) * bits - 1e-6)

    def _judge_length(self, parity: LengthParity) -> Iterator[str]:
        yield from parity.faults
        tau = self.noise_threshold
        if tau is not None:
            above = [flip for flip in parity.flips if flip.margin > tau]
            for flip in above[:_NAMED_FLIPS]:
                yield (
                    f"bit {flip.bit} of image {flip.image} flipped from {flip.reference:.6g} to {flip.candidate:.6g}, "
                    f"a margin above the noise threshold {tau:g}"
                )
            if len(above) > _NAMED_FLIPS:
                yield f"{len(above) - _NAMED_FLIPS:,} more flips have margins above the noise threshold {tau:g}"
        allowed = self.allowed_flips(parity.bit_count)
        if len(parity.flips) > allowed:
            yield (
                f"bit parity {parity.bit_parity:.6f} is below {self.minimum_bit_parity:g}: {len(parity.flips):,} of "
                f"{parity.bit_count:,} bits differ and {allowed:,} may"
            )


GATES: Mapping[str, Gate] = {
    # Engines add the same products in another order: errors are some 1e-6 of logits that are 1 to 10.
    "fp32": Gate(noise_threshold=1e-3, minimum_bit_parity=0.9999),
    # Half precision keeps 11 bits, so logits are off by a few thousandths of their own spread. Of 160,000 bits of a
    # Fashion-MNIST network with logits up to 30, 78 flipped, with margins up to 0.1; the largest error was 0.2.
    "fp16": Gate(noise_threshold=0.25, minimum_bit_parity=0.998),
    # Rounding to 8 bits moves logits by a good part of their own size, so no margin separates noise from fault: a
    # threshold would either pass everything or fail every model. What is left to ask for is a floor for the share of
    # equal bits. Post-training recipes reach 0.96 to 0.98; below 0.95 something is wrong with the calibration.
    "int8": Gate(noise_threshold=None, minimum_bit_parity=0.95),
    # The same integers but for a few values that lie on the edge between two, on which sums in another order disagree.
    "qat": Gate(noise_threshold=None, minimum_bit_parity=0.999),
    # The products round activations to 8 bits, so a margin is no limit here either. 8 bits reach 0.999 with a well
    # trained network and 0.995 with one whose logits lie near zero; 4 bits, rounded with images, 0.997 and 0.992.
    "int8-weights": Gate(noise_threshold=None, minimum_bit_parity=0.99),
    "int4-weights": Gate(noise_threshold=None, minimum_bit_parity=0.97),
}
"""The limits of each precision, and of INT8 after quantisation-aware training, unless others are asked for."""
