"""What a model, or a file of encoded images, says of itself, as JSON values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from admth_runtime.codes_file import read_codes
from admth_runtime.engine_file import EngineFile, read_engine_file
from admth_runtime.engine_kind import is_engine
from admth_runtime.model import ModelFile, read_model
from admth_runtime.sidecar import Sidecar

__all__ = ["describe_codes", "describe_corpus", "describe_model"]


def describe_model(path: str | Path) -> dict[str, Any]:
    """Describe a model without loading it into an engine; a TensorRT engine by its header and its sidecar.

    Raises:
        ModelError: it is missing, broken, unsafe, altered, or has no usable manifest or sidecar.
    """
    if is_engine(path):
        engine = read_engine_file(path)
        assert engine.sidecar is not None
        return {**_common(path, engine), **_engine_facts(engine, engine.sidecar)}
    model = read_model(path)
    onnx = model.onnx
    return {
        **_common(path, model),
        "inputs": [str(tensor) for tensor in onnx.inputs],
        "outputs": [str(tensor) for tensor in onnx.outputs],
        "ir_version": onnx.ir_version,
        "opsets": {domain or "ai.onnx": version for domain, version in onnx.opsets.items()},
        "operators": dict(onnx.operators),
    }


def _engine_facts(engine: EngineFile, sidecar: Sidecar) -> dict[str, Any]:
    return {
        "flavour": sidecar.flavour,
        "tensorrt_version": sidecar.tensorrt_version,
        "header": str(engine.header),
        "compute_capabilities": list(sidecar.compute_capabilities),
        "profiles": [profile.to_dict() for profile in sidecar.profiles],
        "version_compatible": sidecar.version_compatible,
        "layers_kept": dict(sidecar.layers_kept),
        "predicted_parity": None if sidecar.predicted_parity is None else dict(sidecar.predicted_parity),
        "measured_parity": None if sidecar.measured_parity is None else dict(sidecar.measured_parity),
        "source": {
            "name": sidecar.source_name,
            "sha256": sidecar.source_sha256,
            "bytes": sidecar.source_bytes,
        },
        "build_seconds": sidecar.build_seconds,
        "build_options": dict(sidecar.build_options),
        "built_by": sidecar.created_by,
    }


def _common(path: str | Path, model: ModelFile | EngineFile) -> dict[str, Any]:
    manifest = model.manifest
    return {
        "model": str(path),
        "sha256": model.sha256,
        "bytes": model.size,
        "code_lengths": list(manifest.code_lengths),
        "precision": manifest.precision,
        "target": manifest.target,
        "preprocessing": manifest.preprocessing.to_dict(),
        "preprocessing_sha256": manifest.preprocessing.digest(),
        "network": dict(manifest.network),
        "parity": None if manifest.parity is None else dict(manifest.parity),
        "calibration": None if manifest.calibration is None else dict(manifest.calibration),
        "golden_vectors": None if manifest.golden is None else manifest.golden.get("recipe"),
        "checkpoint_sha256": manifest.checkpoint_sha256,
        "created_by": manifest.created_by,
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


def describe_corpus(folder: str | Path) -> dict[str, Any]:
    """Describe a corpus, finished or not.

    Raises:
        InputError: it is no corpus, or a part is damaged.
    """
    from admth_runtime.corpus import read_corpus

    corpus = read_corpus(folder, allow_incomplete=True)
    plan = corpus.plan
    return {
        "corpus": str(folder),
        "images": plan.images,
        "encoded": len(corpus),
        "errors": sum(facts.errors for facts in corpus.parts_facts),
        "parts": f"{len(corpus.parts_facts):,} of {plan.shards:,}",
        "complete": corpus.complete,
        "sources": [source.path for source in plan.sources],
        "code_lengths": list(plan.code_lengths),
        "logits": plan.logits,
        "batch": plan.batch,
        "shard_size": plan.shard_size,
        "model_sha256": plan.model_sha256,
        "preprocessing": plan.preprocessing.to_dict(),
        "preprocessing_sha256": plan.preprocessing.digest(),
        "listing_sha256": plan.listing_sha256,
        "created_by": plan.created_by,
    }
