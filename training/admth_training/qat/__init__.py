"""Quantisation-aware training: a trained network, fine-tuned with the integers that an INT8 model computes with."""

from __future__ import annotations

from admth_training.qat.network import (
    equalising,
    float_network,
    freeze_quantization,
    observing,
    quantization_tensors,
    quantize_network,
    quantized_layers,
    quantizers,
)

__all__ = [
    "equalising",
    "float_network",
    "freeze_quantization",
    "observing",
    "quantization_tensors",
    "quantize_network",
    "quantized_layers",
    "quantizers",
]
