"""Golden vectors of what is exported: PyTorch's own codes for FP32, the model's own on a CPU for other precisions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from admth_runtime.errors import AdmthError
from admth_runtime.manifest import Manifest
from admth_runtime.self_test import golden_pixels, golden_vectors

if TYPE_CHECKING:
    from admth_training.network import MultiLengthHashNetwork

__all__ = ["with_golden_of_file", "with_golden_of_network"]


def with_golden_of_network(manifest: Manifest, network: MultiLengthHashNetwork) -> Manifest:
    """Return the manifest of an FP32 model with the codes that PyTorch gives for the golden pictures.

    Raises:
        TrainingError: a logit is not finite.
    """
    from admth_training.encode import reference_logits

    pixels = golden_pixels(manifest.preprocessing.shape)
    logits = reference_logits(network, pixels, description="golden pictures")
    return replace(manifest, golden=golden_vectors(logits, manifest))


def with_golden_of_file(manifest: Manifest, path: Path) -> Manifest:
    """Return a manifest with the codes that a model's file gives for the golden pictures on this machine's CPU.

    Where it cannot be run, for want of ONNX Runtime or because its values overflow, the manifest is returned without:
    the self-test is one proof more, and the gate answers such a model with what is wrong with it.

    Args:
        manifest: says the precision, and so the noise.
        path: an ONNX model of ours; its own manifest need not be the one that is completed.
    """
    from admth_runtime.runtime import HashRuntime

    try:
        with HashRuntime(path, device="cpu") as runtime:
            codes = runtime.encode_pixels(golden_pixels(manifest.preprocessing.shape))
        return replace(manifest, golden=golden_vectors(codes.logits, manifest))
    except AdmthError:
        return replace(manifest, golden=None)
