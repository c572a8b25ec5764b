"""One parity check from end to end: PyTorch's logits, the candidate in its own process, the measures, the gate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from admth_export.candidate_process import CandidateOutputs, run_candidate
from admth_export.gate import Gate
from admth_export.gate_images import GateImages
from admth_export.parity import RetrievalEffect, compare_run, retrieval_effect
from admth_export.parity_report import ModelFacts, ParityReport
from admth_runtime.packing import pack_logits
from admth_training.checkpoint import TrainedRun
from admth_training.encode import encode_split, reference_logits

__all__ = ["BATCH_SIZES", "SMALL_BATCH_IMAGES", "measure_parity"]

BATCH_SIZES = (32, 1, 3)
"""Batch sizes that the candidate runs: the first over all images, the others over a part of them."""

SMALL_BATCH_IMAGES = 96
"""How many images the small batches take."""


def measure_parity(
    trained: TrainedRun,
    images: GateImages,
    candidate: Path,
    facts: ModelFacts,
    gate: Gate,
    *,
    device: str = "cpu",
    threads: int | None = None,
) -> ParityReport:
    """Compare a candidate with the FP32 PyTorch network on the same pixels.

    Args:
        trained: the run with the reference network.
        images: what to compare on.
        candidate: the model's file, which may still have a temporary name.
        facts: what the report and messages say of it.
        gate: the limits; they are judged for every batch size.
        device: where the candidate runs.
        threads: its CPU threads; None takes one a physical core.

    Raises:
        ParityError: an output has another shape or dtype than the deployed graph's.
        AdmthError: the candidate cannot be run, or the reference's logits are not finite.
    """
    count = len(images.pixels)
    runs = [(size, count if size == BATCH_SIZES[0] else min(count, SMALL_BATCH_IMAGES)) for size in BATCH_SIZES]
    # The candidate first: a model that cannot run is then known before the slower reference is computed.
    outputs, engine = run_candidate(candidate, images.pixels, runs, device=device, threads=threads, name=facts.file)
    reference = reference_logits(trained.network, images.pixels)
    measured = tuple(
        compare_run(
            {length: values[:n] for length, values in reference.items()},
            run.logits,
            run.codes,
            batch_size=run.batch_size,
            names=images.names[:n],
            indices=images.indices[:n],
        )
        for run, (_, n) in zip(outputs, runs, strict=True)
    )
    return ParityReport(
        model=facts,
        checkpoint_sha256=trained.checkpoint_sha256,
        engine=engine,
        torch_version=torch.__version__,
        images=images.facts,
        gate=gate,
        failures=gate.judge(measured),
        runs=measured,
        retrieval=_retrieval(trained, images, reference, outputs[0]),
    )


def _retrieval(
    trained: TrainedRun,
    images: GateImages,
    reference: Mapping[int, NDArray[np.float32]],
    candidate: CandidateOutputs,
) -> dict[int, RetrievalEffect] | None:
    if images.database is None:
        return None
    database = encode_split(trained.network, images.database, description="PyTorch database")
    return retrieval_effect(
        {length: pack_logits(values) for length, values in reference.items()},
        candidate.codes,
        database.codes,
        query_labels=images.labels,
        database_labels=database.labels,
    )
