"""One parity check from end to end: PyTorch's logits, the candidate in its own process, the measures, the gate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from admth_export.candidate_process import CandidateOutputs, EngineFacts, run_candidate
from admth_export.gate import Gate
from admth_export.gate_images import GateImages
from admth_export.parity import RetrievalEffect, compare_run, retrieval_effect
from admth_export.parity_report import ModelFacts, ParityReport
from admth_export.quantization import describe_reference, reference_for
from admth_runtime.packing import pack_logits
from admth_training.checkpoint import TrainedRun
from admth_training.encode import encode_split, reference_logits

__all__ = ["BATCH_SIZES", "SMALL_BATCH_IMAGES", "measure_parity"]

BATCH_SIZES = (32, 1, 3)
"""Batch sizes that the candidate runs: the first over all images, the others over a part of them."""

SMALL_BATCH_IMAGES = 96
"""How many images the small batches take."""

_NO_LIMITS = Gate(noise_threshold=None, minimum_bit_parity=0.0)


def measure_parity(
    trained: TrainedRun,
    images: GateImages,
    candidate: Path,
    facts: ModelFacts,
    gate: Gate,
    *,
    device: str = "cpu",
    threads: int | None = None,
    against: TrainedRun | None = None,
) -> ParityReport:
    """Compare a candidate with its PyTorch network on the same pixels.

    Args:
        trained: the run with the reference network; see :func:`admth_export.quantization.reference_for`.
        images: what to compare on.
        candidate: the model's file, which may still have a temporary name.
        facts: what the report and messages say of it.
        gate: the limits; they are judged for every batch size.
        device: where the candidate runs.
        threads: its CPU threads; None takes one a physical core.
        against: another run, whose network the candidate is also compared with, without limits.

    Raises:
        ParityError: an output has another shape or dtype than the deployed graph's.
        AdmthError: the candidate cannot be run, or the reference's logits are not finite.
    """
    count = len(images.pixels)
    runs = [(size, count if size == BATCH_SIZES[0] else min(count, SMALL_BATCH_IMAGES)) for size in BATCH_SIZES]
    # The candidate first: a model that cannot run is then known before the slower reference is computed.
    outputs, engine = run_candidate(candidate, images.pixels, runs, device=device, threads=threads, name=facts.file)

    def report(run: TrainedRun, limits: Gate, reference: str) -> ParityReport:
        return _compare(reference_for(run, facts.precision), images, outputs, engine, facts, limits, reference)

    own = report(trained, gate, describe_reference(trained, facts.precision))
    if against is None:
        return own
    name = f"{describe_reference(against, facts.precision)}, run {against.folder.resolve().name}"
    return replace(own, against=report(against, _NO_LIMITS, name))


def _compare(
    trained: TrainedRun,
    images: GateImages,
    outputs: Sequence[CandidateOutputs],
    engine: EngineFacts,
    facts: ModelFacts,
    gate: Gate,
    description: str,
) -> ParityReport:
    """Compare what a candidate put out with the network of a run."""
    reference = reference_logits(trained.network, images.pixels)
    counts = [len(next(iter(run.codes.values()))) for run in outputs]
    measured = tuple(
        compare_run(
            {length: values[:n] for length, values in reference.items()},
            run.logits,
            run.codes,
            batch_size=run.batch_size,
            names=images.names[:n],
            indices=images.indices[:n],
        )
        for run, n in zip(outputs, counts, strict=True)
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
        reference=description,
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
