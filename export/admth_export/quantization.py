"""What a model says of a quantised network that it came from: learned scales, and where the network came from."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from admth_training.checkpoint import TrainedRun
from admth_training.qat import float_network, quantization_tensors

__all__ = ["QUANTIZATION_KEY", "describe_reference", "qat_facts", "quantization_metadata", "reference_for"]

QUANTIZATION_KEY = "admth.quantization"
"""Where an FP32 model of a quantised network holds its learned scales, in ``metadata_props``."""

_FORMAT_VERSION = 1


def quantization_metadata(run: TrainedRun) -> dict[str, str]:
    """Return the metadata that carry a QAT run's learned quantisation; none for an FP32 run.

    The value is JSON: ``version``, ``target``, ``tensors`` (``<layer>.input`` and ``<layer>.output`` to ``scale`` and
    ``zero_point``) and ``source``. Weights need no entry: each channel's scale is its largest magnitude over 127.
    """
    facts = qat_facts(run)
    if facts is None:
        return {}
    values = {
        "version": _FORMAT_VERSION,
        "target": facts["target"],
        "tensors": quantization_tensors(run.network),
        "source": {"run": run.folder.resolve().name, "checkpoint_sha256": run.checkpoint_sha256, **facts},
    }
    return {QUANTIZATION_KEY: json.dumps(values, sort_keys=True, allow_nan=False)}


def qat_facts(run: TrainedRun) -> dict[str, Any] | None:
    """Return what a manifest says of quantisation-aware training; None for an FP32 run."""
    qat = run.config.qat
    if qat is None:
        return None
    return {
        "target": qat.target,
        "base_checkpoint_sha256": qat.base_sha256,
        "distillation_weight": qat.distillation_weight,
        "margin_weight": qat.margin_weight,
        "objective_weight": qat.objective_weight,
    }


def reference_for(run: TrainedRun, precision: str) -> TrainedRun:
    """Return the run with the network that a candidate of a precision is held to.

    An INT8 model of a QAT run is held to the network with its roundings, every other model to the same network
    without them. An FP32 run has one network for all.
    """
    if run.config.qat is None or precision == "int8":
        return run
    return replace(run, network=float_network(run.network))


def describe_reference(run: TrainedRun, precision: str) -> str:
    """Say in a few words which network :func:`reference_for` returns."""
    qat = run.config.qat
    if qat is None:
        return "FP32"
    return f"INT8 arithmetic of {qat.target}" if precision == "int8" else "FP32, without the roundings of QAT"
