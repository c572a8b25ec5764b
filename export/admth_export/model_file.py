"""The model file: the graph is written once, and the manifest is the file's tail, which can be replaced.

In protobuf's wire format a message may be written in parts, one behind the other, and the metadata come after the
graph in any case. So a model of 900 MB is written and checked without its manifest, run by the gate, and gets the
manifest that holds the gate's result without being written, or held in memory, a second time.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from admth_runtime.errors import ModelError
from admth_runtime.manifest import METADATA_KEY, Manifest

if TYPE_CHECKING:
    import onnx

__all__ = ["check_file", "write_graph", "write_manifest"]


def write_graph(path: Path, model: onnx.ModelProto) -> int:
    """Write a model without its metadata and return the file's size in bytes; the model loses its metadata."""
    del model.metadata_props[:]
    return path.write_bytes(model.SerializeToString())


def write_manifest(path: Path, graph_size: int, manifest: Manifest, *, others: Mapping[str, str] | None = None) -> None:
    """Put a manifest behind the graph, in place of the metadata that are there.

    Args:
        path: a file that :func:`write_graph` wrote.
        graph_size: what it returned.
        manifest: the manifest.
        others: other metadata, by key.
    """
    import onnx
    import onnx.helper

    tail = onnx.ModelProto()
    onnx.helper.set_model_props(tail, {METADATA_KEY: manifest.to_json(), **(others or {})})
    with path.open("rb+") as file:
        file.truncate(graph_size)
        file.seek(graph_size)
        file.write(tail.SerializeToString())


def check_file(path: Path) -> None:
    """Run ONNX's full checker, strict shape inference with type checks included, on a file.

    Raises:
        ModelError: it finds a fault.
    """
    import onnx.checker
    import onnx.shape_inference

    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"the exported graph fails the ONNX checker ({reason[:300]}): please report it") from error
