"""What a file is: an ONNX model or a TensorRT engine, from its own header, manifest and sidecar.

An engine is executable code, so it is only hashed and held against its sidecar; nothing of it is run. The layers of an
ONNX model are read from its graph. Those of an engine only TensorRT knows, so they are listed on request, on a machine
with the engine's GPU, by a process of its own.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from admth_runtime.engine_kind import is_engine
from admth_runtime.info import describe_model

__all__ = ["inspect_file", "lines_of", "model_layers"]

_WORKER = "admth_export.tensorrt.layers_worker"
_TYPES = {1: "fp32", 10: "fp16", 16: "bf16", 3: "int8"}


def inspect_file(path: str | Path, *, layers: bool = False) -> dict[str, Any]:
    """Describe an ONNX model or an engine, as JSON values.

    Args:
        path: the file.
        layers: add ``layers``, a list with ``name``, ``operator`` and ``precision`` of each layer; for an engine that
            takes the GPU that it was built for.

    Raises:
        ModelError: the file is missing, broken, unsafe, altered, or not the one of its sidecar.
        ManifestError: it has no usable manifest or sidecar.
        DeviceError: an engine's layers were asked for, and there is no GPU or TensorRT that may load it.
    """
    path = Path(path)
    engine = is_engine(path)
    facts = {"kind": "engine" if engine else "onnx", **describe_model(path)}
    if layers:
        facts["layers"] = _engine_layers(path) if engine else model_layers(path)
    return facts


def model_layers(path: Path) -> list[dict[str, str]]:
    """List the layers with weights of an ONNX model, each with the precision that its types say.

    Raises:
        MissingExtraError: onnx is not installed.
        ModelError: the graph's types are not consistent.
    """
    from admth_calibration.graph import Graph, load_graph

    graph = Graph(load_graph(str(path)))
    return [
        {"name": layer, "operator": node.op_type, "precision": _precision(graph, node)}
        for layer, node in graph.layers().items()
    ]


def lines_of(facts: dict[str, Any]) -> list[str]:
    """Return the description as lines for people."""
    network = facts["network"]
    rows = [
        ("file", f"{facts['model']} ({facts['bytes']:,} bytes)"),
        ("kind", f"{facts['header']} engine" if facts["kind"] == "engine" else "ONNX model"),
        ("precision", f"{facts['precision']}, for {facts['target']}"),
        ("code lengths", ", ".join(str(length) for length in facts["code_lengths"])),
        ("network", ", ".join(f"{key} {network[key]}" for key in ("backbone", "split") if key in network)),
        ("SHA-256", facts["sha256"]),
        ("checkpoint", facts["checkpoint_sha256"]),
    ]
    if facts["kind"] == "engine":
        rows += _engine_rows(facts)
    else:
        opsets = ", ".join(f"{name} {version}" for name, version in facts["opsets"].items())
        rows += [
            ("format", f"IR version {facts['ir_version']}, opset {opsets}"),
            ("inputs", "; ".join(facts["inputs"])),
            ("outputs", "; ".join(facts["outputs"])),
            ("operators", ", ".join(f"{name} {count}" for name, count in sorted(facts["operators"].items()))),
        ]
    rows += _parity_rows(facts)
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {text}" for name, text in rows if text]
    table = [f"  {entry['precision']:<8} {entry['operator']:<12} {entry['name']}" for entry in facts.get("layers", [])]
    return [*lines, *table]


def _engine_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    source = facts["source"]
    profiles = "; ".join(f"{entry['min']} to {entry['max']}, tuned for {entry['opt']}" for entry in facts["profiles"])
    reasons = facts["build_options"].get("kept_because", {})
    kept = "; ".join(
        f"{name} ({precision}{': ' + reasons[name] if name in reasons else ''})"
        for name, precision in facts["layers_kept"].items()
    )
    return [
        ("runs on", f"{', '.join(facts['compute_capabilities'])}, with {facts['flavour']} {facts['tensorrt_version']}"),
        ("batch", profiles),
        ("built from", f"{source['name']} ({source['bytes']:,} bytes, {source['sha256']})"),
        ("built in", f"{facts['build_seconds']:,.1f} s by {facts['built_by']}"),
        ("kept out", kept),
        ("later versions", "may run it" if facts["version_compatible"] else "may not run it"),
    ]


def _parity_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    engine = facts["kind"] == "engine"
    for name, parity in (
        ("predicted", facts["predicted_parity"] if engine else facts["parity"]),
        ("measured", facts["measured_parity"] if engine else None),
    ):
        if parity is not None:
            shares = ", ".join(f"{length}: {100 * share:.3f} %" for length, share in parity["bit_parity"].items())
            rows.append((f"{name} parity", f"{shares} of the bits equal PyTorch's, on {parity['images']:,} images"))
    calibrated = (facts["calibration"] or {}).get("predicted")
    if not rows and calibrated is not None:
        shares = ", ".join(f"{length}: {100 * share:.3f} %" for length, share in calibrated["bit_parity"].items())
        rows.append(("calibration", f"{shares} of the bits equal the FP32 model's, on {calibrated['images']:,} images"))
    elif not rows:
        rows.append(("parity", "not measured: the gate was left out"))
    elif engine and facts["measured_parity"] is None:
        rows.append(("measured parity", "none: the engine itself was not run where it was built"))
    return rows


def _precision(graph: Any, node: Any) -> str:
    if node.op_type == "MatMulNBits":
        return next(f"int{attribute.i}" for attribute in node.attribute if attribute.name == "bits")
    kind = graph.types.get(graph.stored_weight(node.input[1]), 0)
    return _TYPES.get(kind, f"type {kind}")


def _engine_layers(path: Path) -> list[dict[str, str]]:
    from admth_export.worker_process import crash_error, same_error, started_worker

    with tempfile.TemporaryFile() as complaints, started_worker(_WORKER, complaints) as process:
        answer, _ = process.communicate(str(path).encode())
        if not answer.strip():
            raise crash_error(process.wait(), complaints, f"loaded {path}", "run  admth-run doctor")
    message = json.loads(answer)
    if "error" in message:
        raise same_error(message["error"], str(path), None)
    layers: list[dict[str, str]] = message["layers"]
    return layers
