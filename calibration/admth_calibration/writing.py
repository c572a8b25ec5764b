"""What an INT8 model says of itself, and writing it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from admth_calibration.learned import LearnedQuantization
from admth_calibration.making import Made
from admth_calibration.options import CalibrationOptions
from admth_runtime.errors import ModelError
from admth_runtime.manifest import METADATA_KEY, Manifest
from admth_runtime.model import ModelFile
from admth_runtime.runtime import HashRuntime
from admth_runtime.self_test import golden_vectors_of

if TYPE_CHECKING:
    import onnx

__all__ = ["int8_manifest", "with_golden", "write_model"]

_ACTIVATIONS = {
    "cpu": "uint8, asymmetric, one scale a tensor",
    "trt": "int8, symmetric, one scale a tensor",
}


def int8_manifest(
    source: ModelFile,
    made: Made,
    data: Mapping[str, object],
    options: CalibrationOptions,
    learned: LearnedQuantization | None,
) -> Manifest:
    """Return the manifest of a model that met its gates."""
    calibration: dict[str, Any] = {
        "method": "learned in training" if learned is not None else options.method,
        "target": made.target,
        **data,
        "source_sha256": source.sha256,
        "activations": _ACTIVATIONS[made.target],
        "weights": "int8, symmetric, one scale a channel",
        "layers": len(made.candidate.layers),
        "kept_fp32": list(made.candidate.kept),
    }
    if learned is None:
        calibration |= {
            "seed": options.seed,
            "rounding": options.rounding,
            "bias_correction": options.correct_bias,
            "equalisation": options.equalise,
        }
    else:
        calibration["training"] = dict(learned.source)
    if made.target == "cpu":
        calibration["reduce_range"] = made.reduced
    if options.gates.any and made.point is not None:
        calibration["gates"] = options.gates.to_dict()
    if made.point is not None:
        calibration["predicted"] = _predicted(made)
    target = "cpu" if made.target == "cpu" else "tensorrt"
    return replace(source.manifest, precision="int8", target=target, calibration=calibration, parity=None)


def _predicted(made: Made) -> dict[str, Any]:
    """Return the parity with the FP32 model, measured on the CPU: for TensorRT a prediction and no proof."""
    point = made.point
    assert point is not None
    found: dict[str, Any] = {
        "reference": "the FP32 model, on the CPU",
        "images": made.compared,
        "bit_parity": {str(length): share for length, share in point.score.bit_parity.items()},
        "exact_code_rate": {str(length): share for length, share in point.score.exact_code_rate.items()},
        "logit_error": point.score.error,
        "images_blended": made.blended,
        "images_seen_in_calibration": made.seen,
    }
    if point.latency_ratio is not None:
        found["latency_ratio"] = point.latency_ratio
    if made.map_ratio is not None:
        found["map_ratio"] = {str(length): ratio for length, ratio in made.map_ratio.items()}
    return found


def with_golden(path: Path, manifest: Manifest) -> Manifest:
    """Return a manifest with the codes that a written model gives for the golden pictures of the self-test."""
    with HashRuntime(path, device="cpu") as runtime:
        return replace(manifest, golden=golden_vectors_of(runtime))


def write_model(path: Path, model: onnx.ModelProto, manifest: Manifest) -> None:
    """Write a model with its manifest, strictly checked.

    Raises:
        ModelError: ONNX's checker refuses it.
    """
    import onnx
    import onnx.checker
    import onnx.shape_inference

    others = [item for item in model.metadata_props if item.key not in (METADATA_KEY, "admth.quantization")]
    kept = {item.key: item.value for item in others}
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, {**kept, METADATA_KEY: manifest.to_json()})
    path.write_bytes(model.SerializeToString())
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"the INT8 graph fails the ONNX checker ({reason[:300]}): please report it") from error
