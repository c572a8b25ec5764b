"""A model file and its manifest, checked against each other before an engine loads it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from admth_runtime.errors import ManifestError
from admth_runtime.files import sha256_of_file
from admth_runtime.manifest import INPUT_NAME, METADATA_KEY, Manifest
from admth_runtime.onnx_file import OnnxFile, TensorInfo, read_onnx

__all__ = ["ModelFile", "read_model"]


@dataclass(frozen=True)
class ModelFile:
    """One of our models, on disk.

    Attributes:
        onnx: facts of the ONNX file.
        manifest: what it says of itself.
    """

    onnx: OnnxFile
    manifest: Manifest

    @property
    def path(self) -> Path:
        """Where it was read from."""
        return self.onnx.path

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.onnx.size

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the file, 64 hexadecimal digits; computed when it is first asked for."""
        return sha256_of_file(self.path)


def read_model(path: str | Path) -> ModelFile:
    """Read a model file, without an engine, and check that it is the deployed graph that its manifest describes.

    Raises:
        ModelError: the file is missing, broken or unsafe; see :func:`admth_runtime.onnx_file.read_onnx`.
        ManifestError: the manifest is missing, malformed, too new, or disagrees with the graph's input or outputs.
    """
    onnx = read_onnx(path)
    text = onnx.metadata.get(METADATA_KEY)
    if text is None:
        raise ManifestError(f"{onnx.path} has no admth manifest: export your checkpoint with  admth-export onnx")
    try:
        manifest = Manifest.from_json(text)
        _check_input(onnx.inputs, manifest)
        manifest.check_outputs(tuple(tensor.name for tensor in onnx.outputs))
        _check_output_types(onnx.outputs)
    except ManifestError as error:
        raise ManifestError(f"{onnx.path}: {error}") from error
    return ModelFile(onnx, manifest)


def _check_input(inputs: tuple[TensorInfo, ...], manifest: Manifest) -> None:
    height, width, channels = manifest.preprocessing.shape
    wanted = f"{INPUT_NAME}: uint8 [batch, {height}, {width}, {channels}] with a dynamic batch"
    found = "; ".join(str(tensor) for tensor in inputs) or "none"
    if (
        len(inputs) != 1
        or inputs[0].name != INPUT_NAME
        or inputs[0].dtype != "uint8"
        or inputs[0].shape is None
        or inputs[0].shape[1:] != manifest.preprocessing.shape
        or isinstance(inputs[0].shape[0], int)
    ):
        raise ManifestError(
            f"the model's input is not what its manifest says, {wanted}; it is {found}: export it again"
        )


def _check_output_types(outputs: tuple[TensorInfo, ...]) -> None:
    for tensor in outputs:
        kind, _, length = tensor.name.rpartition("_")
        dtype, width = ("uint8", int(length) // 8) if kind == "code" else ("float32", int(length))
        # Shape inference may leave the width open behind a Reshape; a width that is given must be right.
        shape_fits = tensor.shape is None or (
            len(tensor.shape) == 2 and (not isinstance(tensor.shape[1], int) or tensor.shape[1] == width)
        )
        if tensor.dtype != dtype or not shape_fits:
            raise ManifestError(
                f"the model's output {tensor} is not {dtype} [batch, {width}] as its manifest says: export it again"
            )
