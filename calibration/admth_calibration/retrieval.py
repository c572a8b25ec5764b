"""What INT8 does to retrieval: mAP of INT8 queries over that of FP32 queries, both against FP32 codes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from admth_calibration.images import PixelBatches
from admth_calibration.scoring import Scorer
from admth_runtime.errors import InputError
from admth_runtime.packing import hamming_matrix

if TYPE_CHECKING:
    import onnx

    from admth_calibration.drawing import Sample

__all__ = ["map_ratios", "mean_average_precision", "relevance"]

_MOST_DATABASE = 2000


def map_ratios(exact: onnx.ModelProto, rounded: onnx.ModelProto, sample: Sample) -> dict[int, float]:
    """Return the ratio by code length.

    The images that give the ranges are the database, up to 2,000 of them, and those to compare on are the queries.

    Args:
        exact: the FP32 model.
        rounded: the INT8 model.
        sample: the images; they must have labels.

    Raises:
        InputError: the data has no labels.
    """
    database = PixelBatches(sample.images, sample.chosen[:_MOST_DATABASE], sample.spec)
    stored = Scorer(exact, np.concatenate(list(database))).reference
    pixels, asked = sample.check_images()
    relevant = relevance(sample, asked, np.array(database.read, dtype=np.int64))
    queries = Scorer(exact, pixels)
    rounded_logits = queries.logits(rounded)
    found = {}
    for length, logits in queries.reference.items():
        codes = _packed(stored[length])
        reference = mean_average_precision(_packed(logits), codes, relevant)
        found[length] = mean_average_precision(_packed(rounded_logits[length]), codes, relevant) / max(reference, 1e-12)
    return found


def relevance(
    sample: Sample, queries: NDArray[np.int64] | None = None, database: NDArray[np.int64] | None = None
) -> NDArray[np.bool_]:
    """Return which images share a label: ``[queries, database]``.

    Args:
        sample: the images.
        queries: which of those to compare on; None takes all.
        database: which of those that give the ranges; None takes the first 2,000.

    Raises:
        InputError: the data has no labels, or the queries share none with the database.
    """
    labels, wanted = sample.images.labels, sample.compared.labels
    if labels is None or wanted is None:
        name = sample.images.name if labels is None else sample.compared.name
        raise InputError(
            f"--min-map-ratio needs labels and {name} has none: pass a folder with one folder a class, a list with "
            "labels, or fashion-mnist:DIR"
        )
    queries = sample.checked if queries is None else queries
    database = sample.chosen[:_MOST_DATABASE] if database is None else database
    relevant = np.array([[bool(wanted[q] & labels[d]) for d in database] for q in queries])
    if not bool(relevant.any()):
        raise InputError(
            f"--min-map-ratio needs queries with relevant images, and {sample.compared.name} shares no label with "
            f"{sample.images.name}: pass data with the same classes"
        )
    return relevant


def mean_average_precision(
    queries: NDArray[np.uint8], database: NDArray[np.uint8], relevant: NDArray[np.bool_]
) -> float:
    """Return mAP@all in Hamming order, ties in the database's order, over the queries that have a relevant image.

    Args:
        queries: packed codes ``[q, L / 8]``.
        database: packed codes ``[n, L / 8]``.
        relevant: ``[q, n]``.
    """
    order = np.argsort(hamming_matrix(queries, database), axis=1, kind="stable")
    hits = np.take_along_axis(relevant, order, axis=1)
    precision = np.cumsum(hits, axis=1) / np.arange(1, hits.shape[1] + 1)
    counts = hits.sum(axis=1)
    some = counts > 0
    if not bool(some.any()):
        return 0.0
    return float(((precision * hits).sum(axis=1)[some] / counts[some]).mean())


def _packed(logits: NDArray[np.float32]) -> NDArray[np.uint8]:
    return np.packbits(logits > 0, axis=1)
