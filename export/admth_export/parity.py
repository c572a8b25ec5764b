"""Sign parity in numbers: how far a candidate's codes are from the reference codes of the same images.

Pure NumPy. The reference is the FP32 PyTorch network, the candidate any engine that runs an exported model. A bit of
the reference is 1 where its logit is > 0; a bit of the candidate is what its packed code says. A flip is a bit in
which they differ, and its margin is |z|, the absolute reference logit: a flip at a margin of the order of rounding
error is noise, a flip at a large margin is a fault.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from admth_runtime.errors import InputError, ParityError
from admth_runtime.packing import pack_logits, unpack_bits

__all__ = [
    "LISTED_FLIPS",
    "MARGIN_EDGES",
    "Flip",
    "LengthParity",
    "RetrievalEffect",
    "RunParity",
    "compare_length",
    "compare_run",
    "retrieval_effect",
]

LISTED_FLIPS = 100
"""How many flips of each length the JSON form lists, the largest margins first; all are counted."""

MARGIN_EDGES: tuple[float, ...] = tuple(float(edge) for edge in np.logspace(-7, 3, 51))
"""Edges of the margin histogram, five bins a decade from 1e-7 to 1e3; what lies outside counts in the end bins."""

Codes = Mapping[int, NDArray[np.uint8]]
Logits = Mapping[int, NDArray[np.float32]]


@dataclass(frozen=True)
class Flip:
    """One bit that differs.

    Attributes:
        image: what the data set calls the image.
        index: the image's number in the data set.
        bit: the bit's place in the code, from 0.
        reference: the reference logit.
        candidate: the candidate's logit; it may be NaN or infinite.
    """

    image: str
    index: int
    bit: int
    reference: float
    candidate: float

    @property
    def margin(self) -> float:
        """|z|: how far the reference logit is from changing its sign."""
        return abs(self.reference)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form; a candidate value that is not finite becomes text."""
        candidate: float | str = self.candidate if np.isfinite(self.candidate) else str(self.candidate)
        return {
            "image": self.image,
            "index": self.index,
            "bit": self.bit,
            "reference": self.reference,
            "candidate": candidate,
            "margin": self.margin,
        }


@dataclass(frozen=True)
class LengthParity:
    """Agreement of one code length over n images.

    Attributes:
        code_length: L, in bits.
        image_count: n.
        flips: every bit that differs, the largest margins first.
        exact_codes: images whose whole code agrees.
        max_hamming_distance: the largest number of differing bits in one code.
        max_logit_error: largest |reference - candidate| among finite candidate logits.
        faults: what is wrong whatever the margins are, each a line: logits that are not finite, and codes that are
            not the packed signs of the candidate's own logits.
        margin_counts: bits by margin, in the bins of :data:`MARGIN_EDGES`.
        flip_counts: flips by margin, in the same bins.
    """

    code_length: int
    image_count: int
    flips: tuple[Flip, ...]
    exact_codes: int
    max_hamming_distance: int
    max_logit_error: float
    faults: tuple[str, ...]
    margin_counts: tuple[int, ...]
    flip_counts: tuple[int, ...]

    @property
    def bit_count(self) -> int:
        """Bits compared: images times code length."""
        return self.image_count * self.code_length

    @property
    def bit_parity(self) -> float:
        """Share of equal bits."""
        return 1.0 - len(self.flips) / self.bit_count

    @property
    def exact_code_rate(self) -> float:
        """Share of images whose whole code agrees."""
        return self.exact_codes / self.image_count

    @property
    def mean_hamming_distance(self) -> float:
        """Differing bits a code, on average."""
        return len(self.flips) / self.image_count

    @property
    def max_flip_margin(self) -> float | None:
        """The largest margin of a flip, or None where there is none."""
        return self.flips[0].margin if self.flips else None

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, with at most :data:`LISTED_FLIPS` flips."""
        return {
            "images": self.image_count,
            "bits": self.bit_count,
            "bit_parity": self.bit_parity,
            "exact_code_rate": self.exact_code_rate,
            "mean_hamming_distance": self.mean_hamming_distance,
            "max_hamming_distance": self.max_hamming_distance,
            "max_logit_error": self.max_logit_error,
            "flip_count": len(self.flips),
            "max_flip_margin": self.max_flip_margin,
            "flips": [flip.to_dict() for flip in self.flips[:LISTED_FLIPS]],
            "faults": list(self.faults),
            "margins": {
                "edges": list(MARGIN_EDGES),
                "bits": list(self.margin_counts),
                "flips": list(self.flip_counts),
            },
        }


@dataclass(frozen=True)
class RunParity:
    """Agreement of every length over some images that the candidate ran in batches of one size.

    Attributes:
        batch_size: images an inference call.
        image_count: images compared.
        lengths: by code length.
    """

    batch_size: int
    image_count: int
    lengths: Mapping[int, LengthParity]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "batch_size": self.batch_size,
            "images": self.image_count,
            "lengths": {str(length): parity.to_dict() for length, parity in self.lengths.items()},
        }


@dataclass(frozen=True)
class RetrievalEffect:
    """What the candidate's codes do to retrieval: its queries against the database that PyTorch coded.

    Attributes:
        reference_map: mAP@all of the reference's queries.
        candidate_map: mAP@all of the candidate's queries.
    """

    reference_map: float
    candidate_map: float

    @property
    def difference(self) -> float:
        """Candidate minus reference; negative where retrieval gets worse."""
        return self.candidate_map - self.reference_map

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "reference_map": self.reference_map,
            "candidate_map": self.candidate_map,
            "difference": self.difference,
        }


def compare_run(
    reference: Logits,
    logits: Logits,
    codes: Codes,
    *,
    batch_size: int,
    names: Sequence[str],
    indices: NDArray[np.int64],
) -> RunParity:
    """Compare every code length of the same images.

    Args:
        reference: float32 ``[n, L]`` by code length L.
        logits: the candidate's, of the same form.
        codes: the candidate's packed codes, uint8 ``[n, L / 8]`` by code length.
        batch_size: images in each of the candidate's inference calls.
        names: what the data set calls the n images.
        indices: int64 ``[n]``, their numbers in the data set.

    Raises:
        InputError: there is nothing to compare, or the arguments disagree on the number of images.
        ParityError: the candidate lacks a length, or an output has another shape or dtype than the deployed graph's.
    """
    if not reference or len(names) == 0:
        raise InputError("there is nothing to compare: pass at least one code length and one image")
    if set(logits) != set(reference) or set(codes) != set(reference):
        raise ParityError(
            f"the candidate has logits of {sorted(logits)} and codes of {sorted(codes)} bits, PyTorch has "
            f"{sorted(reference)}: export the model again"
        )
    lengths = {
        length: compare_length(reference[length], logits[length], codes[length], names=names, indices=indices)
        for length in sorted(reference)
    }
    return RunParity(batch_size, len(names), lengths)


def compare_length(
    reference: NDArray[np.float32],
    logits: NDArray[np.float32],
    codes: NDArray[np.uint8],
    *,
    names: Sequence[str],
    indices: NDArray[np.int64],
) -> LengthParity:
    """Compare one code length; see :func:`compare_run`.

    Raises:
        InputError: a reference logit is not finite, or the arguments disagree on the number of images.
        ParityError: a candidate's output has another shape or dtype than the deployed graph's.
    """
    count, length = reference.shape
    if not len(names) == len(indices) == count:
        raise InputError(f"{count} reference rows have {len(names)} names and {len(indices)} indices: pass one of each")
    if not bool(np.isfinite(reference).all()):
        raise InputError("a reference logit is not finite: train again with a lower learning rate")
    _check_output(f"logits_{length}", logits, np.dtype(np.float32), (count, length))
    _check_output(f"code_{length}", codes, np.dtype(np.uint8), (count, length // 8))
    different = (reference > 0) != unpack_bits(codes).astype(np.bool_)
    distances = different.sum(axis=1)
    rows, bits = np.nonzero(different)
    margins = np.abs(reference)
    order = np.argsort(-margins[rows, bits], kind="stable")
    flips = tuple(
        Flip(names[row], int(indices[row]), bit, float(reference[row, bit]), float(logits[row, bit]))
        for row, bit in zip(rows[order].tolist(), bits[order].tolist(), strict=True)
    )
    finite = np.isfinite(logits)
    # In double precision, since the difference of two large float32 values of opposite sign may overflow.
    errors = np.abs(reference[finite].astype(np.float64) - logits[finite])
    return LengthParity(
        code_length=length,
        image_count=count,
        flips=flips,
        exact_codes=int((distances == 0).sum()),
        max_hamming_distance=int(distances.max()),
        max_logit_error=float(errors.max()) if errors.size else 0.0,
        faults=(*_non_finite(logits, finite, length, names), *_wrong_packing(logits, codes, length, names)),
        margin_counts=_histogram(margins.ravel()),
        flip_counts=_histogram(margins[different]),
    )


def retrieval_effect(
    reference: Codes,
    candidate: Codes,
    database: Codes,
    *,
    query_labels: NDArray[np.uint8],
    database_labels: NDArray[np.uint8],
) -> dict[int, RetrievalEffect]:
    """Search the PyTorch-coded database with both sets of query codes and compare mAP@all.

    Args:
        reference: PyTorch's packed query codes, uint8 ``[q, L / 8]`` by code length L.
        candidate: the candidate's, of the same images.
        database: PyTorch's packed database codes, uint8 ``[d, L / 8]`` by code length.
        query_labels: multi-hot, uint8 ``[q, classes]``.
        database_labels: multi-hot, uint8 ``[d, classes]``.

    Returns:
        The effect by code length. Equal codes have equal figures, so no time is spent on them twice.
    """
    from admth_training.metrics import evaluate_codes

    def mean_average_precision(queries: NDArray[np.uint8], length: int) -> float:
        found = evaluate_codes(queries, database[length], query_labels, database_labels, precision_at=())
        return found.mean_average_precision[None]

    effects = {}
    for length in sorted(reference):
        expected = mean_average_precision(reference[length], length)
        same = np.array_equal(reference[length], candidate[length])
        effects[length] = RetrievalEffect(
            expected, expected if same else mean_average_precision(candidate[length], length)
        )
    return effects


def _check_output(name: str, array: NDArray[Any], dtype: np.dtype[Any], shape: tuple[int, int]) -> None:
    if array.dtype != dtype or array.shape != shape:
        raise ParityError(
            f"the candidate's {name} is {array.dtype} {list(array.shape)}, not {dtype} {list(shape)}: "
            "export the model again"
        )


def _non_finite(
    logits: NDArray[np.float32], finite: NDArray[np.bool_], length: int, names: Sequence[str]
) -> tuple[str, ...]:
    places = np.argwhere(~finite)
    if len(places) == 0:
        return ()
    row, bit = places[0].tolist()
    return (
        f"{len(places):,} of {logits.size:,} values of logits_{length} are not finite, first bit {bit} of image "
        f"{names[row]}, which is {logits[row, bit]}",
    )


def _wrong_packing(
    logits: NDArray[np.float32], codes: NDArray[np.uint8], length: int, names: Sequence[str]
) -> tuple[str, ...]:
    wrong = np.flatnonzero((pack_logits(logits) != codes).any(axis=1))
    if len(wrong) == 0:
        return ()
    row = int(wrong[0])
    return (
        f"{len(wrong):,} of {len(codes):,} codes of code_{length} are not the packed signs of logits_{length}, first "
        f"that of image {names[row]}, which is {codes[row].tobytes().hex()} instead of "
        f"{pack_logits(logits[row : row + 1]).tobytes().hex()}",
    )


def _histogram(margins: NDArray[np.float32]) -> tuple[int, ...]:
    inside = np.clip(margins, MARGIN_EDGES[0], MARGIN_EDGES[-1])
    counts, _ = np.histogram(inside, bins=MARGIN_EDGES)
    return tuple(int(count) for count in counts)
