"""What a model, or a file of encoded images, says of itself, as JSON values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from admth_runtime.codes_file import read_codes
from admth_runtime.model import read_model

__all__ = ["describe_codes", "describe_model"]


def describe_model(path: str | Path) -> dict[str, Any]:
    """Describe a model without loading it into an engine.

    Raises:
        ModelError: it is missing, broken, unsafe, or has no usable manifest.
    """
    model = read_model(path)
    onnx, manifest = model.onnx, model.manifest
    return {
        "model": str(path),
        "sha256": model.sha256,
        "bytes": onnx.size,
        "code_lengths": list(manifest.code_lengths),
        "precision": manifest.precision,
        "target": manifest.target,
        "preprocessing": manifest.preprocessing.to_dict(),
        "preprocessing_sha256": manifest.preprocessing.digest(),
        "network": dict(manifest.network),
        "parity": None if manifest.parity is None else dict(manifest.parity),
        "calibration": None if manifest.calibration is None else dict(manifest.calibration),
        "checkpoint_sha256": manifest.checkpoint_sha256,
        "created_by": manifest.created_by,
        "inputs": [str(tensor) for tensor in onnx.inputs],
        "outputs": [str(tensor) for tensor in onnx.outputs],
        "ir_version": onnx.ir_version,
        "opsets": {domain or "ai.onnx": version for domain, version in onnx.opsets.items()},
        "operators": dict(onnx.operators),
    }


def describe_codes(path: str | Path) -> dict[str, Any]:
    """Describe a file of encoded images.

    Raises:
        InputError: it is missing, damaged or of another format.
    """
    encoded = read_codes(path)
    return {
        "file": str(path),
        "bytes": Path(path).stat().st_size,
        "images": len(encoded),
        "code_lengths": list(encoded.code_lengths),
        "logits": bool(encoded.codes.logits),
        "model_sha256": encoded.model_sha256,
        "preprocessing_sha256": encoded.preprocessing_sha256,
        "created_by": encoded.created_by,
    }
