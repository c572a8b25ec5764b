"""Retrieval figures of every code length under one stated protocol: as JSON, and as a table for the console."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from admth_runtime.console import progress
from admth_runtime.errors import InputError
from admth_runtime.packing import check_code_lengths
from admth_training.leakage import LeakageReport
from admth_training.metrics import AP_DEFINITIONS, RetrievalMetrics, evaluate_codes

__all__ = ["FORMAT_VERSION", "Evaluation", "evaluate_lengths"]

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Evaluation:
    """The metrics of every code length, and what a reader has to know to compare them.

    Attributes:
        metrics: the metrics by code length, all on the same queries and database.
        dataset: name of the data set, or None.
        splits: one line that describes the splits, or None.
        leakage: what the leakage check found, or None where there was none.
    """

    metrics: dict[int, RetrievalMetrics]
    dataset: str | None = None
    splits: str | None = None
    leakage: LeakageReport | None = None

    def __post_init__(self) -> None:
        check_code_lengths(tuple(self.metrics))

    @property
    def code_lengths(self) -> tuple[int, ...]:
        """The code lengths, increasing."""
        return tuple(self.metrics)

    def protocol(self) -> dict[str, Any]:
        """Return the facts that all lengths share, in JSON form."""
        first = next(iter(self.metrics.values()))
        return {
            "dataset": self.dataset,
            "splits": self.splits,
            "query_size": first.query_size,
            "database_size": first.database_size,
            "relevance": "labels share at least one class",
            "map_cutoffs": ["all" if k is None else k for k in first.mean_average_precision],
            "ap_definition": first.ap_definition,
            "ap_definition_text": AP_DEFINITIONS[first.ap_definition],
            "queries_without_hit": "count 0",
            "tie_order": first.tie_order,
            "hamming_radius": first.hamming_radius,
            "empty_ball": "counts 0",
            "random_baseline": first.random_baseline,
            "queries_without_relevant": first.queries_without_relevant,
            "leakage": self.leakage.to_dict() if self.leakage is not None else None,
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form: the protocol, and the metrics by code length."""
        return {
            "format_version": FORMAT_VERSION,
            "protocol": self.protocol(),
            "code_lengths": list(self.metrics),
            "metrics": {str(length): metrics.to_dict() for length, metrics in self.metrics.items()},
        }

    def table(self) -> str:
        """Return a table of the main figures, a line a code length, and the protocol below it."""
        first = next(iter(self.metrics.values()))
        radius = first.hamming_radius
        names = ["bits", *(_map_name(k) for k in first.mean_average_precision), "tie-aware"]
        shown = [n for n in (100, 1000) if n in first.precision_at] or list(first.precision_at)[-1:]
        names += [f"P@H<={radius}", f"R@H<={radius}", *(f"P@{n}" for n in shown)]
        rows = [names]
        for length, metrics in self.metrics.items():
            values = [*metrics.mean_average_precision.values(), metrics.tie_aware_map]
            values += [metrics.precision_within_radius, metrics.recall_within_radius]
            values += [metrics.precision_at[n] for n in shown]
            rows.append([str(length), *(f"{value:.4f}" for value in values)])
        return "\n".join([*_aligned(rows), *self._notes()])

    def _notes(self) -> list[str]:
        first = next(iter(self.metrics.values()))
        lines = [
            f"{first.query_size:,} queries, {first.database_size:,} database images; a random ranking has precision "
            f"{first.random_baseline:.4f}",
            f"AP denominator: {first.ap_definition}; ties: {first.tie_order}",
        ]
        if first.queries_without_relevant:
            lines.append(
                f"{first.queries_without_relevant:,} queries have no relevant image in the database and count 0"
            )
        if self.leakage is not None:
            lines += [*self.leakage.facts(), *(f"warning: {line}" for line in self.leakage.warnings())]
        return lines


def evaluate_lengths(
    codes: Mapping[int, tuple[NDArray[np.uint8], NDArray[np.uint8]]],
    query_labels: NDArray[np.uint8],
    database_labels: NDArray[np.uint8],
    *,
    map_cutoffs: Sequence[int | None] = (None,),
    precision_at: Sequence[int] | None = None,
    hamming_radius: int = 2,
    ap_definition: str = "found",
    dataset: str | None = None,
    splits: str | None = None,
    leakage: LeakageReport | None = None,
) -> Evaluation:
    """Measure every code length, with a progress bar.

    Args:
        codes: packed (query codes uint8 ``[q, L / 8]``, database codes uint8 ``[d, L / 8]``) by code length L.
        query_labels: multi-hot, uint8 ``[q, classes]``.
        database_labels: multi-hot, uint8 ``[d, classes]``.
        map_cutoffs: see :func:`admth_training.metrics.evaluate_codes`.
        precision_at: see there.
        hamming_radius: see there.
        ap_definition: see there.
        dataset: name of the data set, for the record.
        splits: what :meth:`admth_training.splits.Splits.describe` says, for the record.
        leakage: the leakage check of these splits, for the record.

    Raises:
        InputError: there are no codes, a length disagrees with its codes, or an argument is out of range.
    """
    lengths = check_code_lengths(sorted(codes))
    for length in lengths:
        for name, array in zip(("query", "database"), codes[length], strict=True):
            if array.ndim != 2 or 8 * array.shape[1] != length:
                raise InputError(
                    f"{name} codes of shape {list(array.shape)} are not of {length} bits: pass [n, {length // 8}]"
                )
    metrics = {}
    with progress("evaluating", len(lengths) * len(query_labels), unit="queries") as advance:
        for length in lengths:
            metrics[length] = evaluate_codes(
                *codes[length],
                query_labels,
                database_labels,
                map_cutoffs=map_cutoffs,
                precision_at=precision_at,
                hamming_radius=hamming_radius,
                ap_definition=ap_definition,
                advance=advance,
            )
    return Evaluation(metrics, dataset, splits, leakage)


def _map_name(cutoff: int | None) -> str:
    return f"mAP@{'all' if cutoff is None else cutoff}"


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]
