"""``admth-calibrate`` as a function: an FP32 model and images to an INT8 model, with its predicted parity."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from admth_calibration.graph import Graph, load_graph
from admth_calibration.images import CalibrationImages, PixelBatches, open_images
from admth_calibration.options import LEAST_IMAGES, CalibrationOptions, check_out, default_out
from admth_calibration.predicting import predict_parity
from admth_calibration.probing import collect_ranges
from admth_calibration.quantizing import QuantizedModel, layers_to_quantize, quantize, tensors_to_range
from admth_runtime.console import progress
from admth_runtime.errors import DataError, ModelError, require
from admth_runtime.files import atomic_path, sha256_of_file
from admth_runtime.manifest import METADATA_KEY, Manifest
from admth_runtime.model import ModelFile, read_model

if TYPE_CHECKING:
    import onnx

__all__ = ["CalibrationResult", "calibrate"]


@dataclass(frozen=True)
class CalibrationResult:
    """What a calibration made.

    Attributes:
        model: the INT8 ONNX file.
        bytes: its size.
        sha256: its SHA-256.
        manifest: its manifest; ``calibration`` holds the facts and the predicted parity.
        layers: names of the layers in INT8.
        kept: names of the layers with weights that stay in FP32.
    """

    model: Path
    bytes: int
    sha256: str
    manifest: Manifest
    layers: tuple[str, ...]
    kept: tuple[str, ...]


def calibrate(
    model: str | Path,
    data: str,
    out: str | Path | None = None,
    *,
    options: CalibrationOptions | None = None,
    root: Path | None = None,
    strip_prefix: str | None = None,
) -> CalibrationResult:
    """Calibrate an FP32 model to INT8.

    Images are decoded one batch at a time, and ranges are reduced inside the graph, so memory does not grow with them.

    Args:
        model: the FP32 ONNX model.
        data: images, such as ``folder:pictures``; labels are not needed.
        out: the file to write; None is ``model.int8.trt.onnx`` beside ``model.onnx``.
        options: how; None is min-max ranges of 512 images for TensorRT.
        root: for a list, the folder that relative paths start from.
        strip_prefix: for a list, a text that is cut from the start of each path.

    Raises:
        ModelError: the model is missing, broken, or not FP32.
        DataError: the images are missing, broken, or fewer than 128.
        InputError: an option is out of range, or a layer to keep does not exist.
        OutputError: the file cannot be written.
    """
    options = options or CalibrationOptions()
    path = Path(model)
    target = Path(out) if out is not None else default_out(path)
    source = _source(path)
    check_out(path, target)
    images = open_images(data, root=root, strip_prefix=strip_prefix)
    chosen, checked = _draw(images, options)
    require("onnxruntime", extra="calibrate", purpose="calibrating")
    with atomic_path(target) as temporary:
        graph = load_graph(str(path))
        layers = layers_to_quantize(Graph(graph), options.keep_fp32)
        if not layers:
            raise ModelError(f"{path}: no layer is left to quantise: keep fewer in FP32")
        batches = PixelBatches(images, chosen, source.manifest.preprocessing)
        ranges = collect_ranges(graph, tensors_to_range(layers), _shown(batches, "calibrating"))
        _check_count(batches, images)
        with progress("quantising", None):
            quantized = quantize(graph, ranges, layers)
        manifest = _manifest(source, quantized, batches, options)
        _write(temporary, quantized.model, manifest)
        del graph
        check = PixelBatches(images, checked, source.manifest.preprocessing)
        predicted = predict_parity(path, temporary, _shown(check, "comparing"))
        seen = not len(np.setdiff1d(checked, chosen))
        predicted["images_are_those_of_the_calibration"] = bool(seen)
        manifest = replace(manifest, calibration={**(manifest.calibration or {}), "predicted": predicted})
        _write(temporary, quantized.model, manifest)
        size, digest = temporary.stat().st_size, sha256_of_file(temporary)
    return CalibrationResult(target, size, digest, manifest, quantized.layers, quantized.kept)


def _source(path: Path) -> ModelFile:
    source = read_model(path)
    if source.manifest.precision != "fp32":
        raise ModelError(f"{path} is {source.manifest.precision} already: pass the FP32 model of  admth-export onnx")
    return source


def _draw(images: CalibrationImages, options: CalibrationOptions) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw the images of the calibration, and others to compare on; the same ones where there are no others."""
    count = len(images)
    if count < LEAST_IMAGES:
        raise DataError(
            f"{images.name} holds {count} images and a calibration takes {LEAST_IMAGES} or more: add images"
        )
    order = np.random.default_rng(options.seed).permutation(count)
    taken = min(options.images, max(LEAST_IMAGES, count * 3 // 4))
    chosen, others = order[:taken], order[taken : taken + options.check_images]
    return chosen, others if len(others) else chosen[: options.check_images]


def _shown(batches: PixelBatches, description: str) -> Iterator[NDArray[np.uint8]]:
    with progress(description, len(batches.indices), unit="images") as advance:
        for pixels in batches:
            yield pixels
            advance(len(pixels))


def _check_count(batches: PixelBatches, images: CalibrationImages) -> None:
    if batches.done < LEAST_IMAGES - len(batches.broken):
        raise DataError(f"only {batches.done} images of {images.name} are readable: add images")


def _manifest(
    source: ModelFile, quantized: QuantizedModel, batches: PixelBatches, options: CalibrationOptions
) -> Manifest:
    calibration: dict[str, Any] = {
        "method": "min-max",
        "target": options.target,
        "data": batches.images.name,
        "images": batches.done,
        "broken": len(batches.broken),
        "seed": options.seed,
        "data_sha256": batches.digest,
        "source_sha256": source.sha256,
        "activations": "int8, symmetric, one scale a tensor",
        "weights": "int8, symmetric, one scale a channel",
        "layers": len(quantized.layers),
        "kept_fp32": list(quantized.kept),
    }
    return replace(source.manifest, precision="int8", target="tensorrt", calibration=calibration, parity=None)


def _write(path: Path, model: onnx.ModelProto, manifest: Manifest) -> None:
    """Write a model with its manifest, strictly checked."""
    import onnx
    import onnx.checker
    import onnx.shape_inference

    onnx.helper.set_model_props(model, {METADATA_KEY: manifest.to_json()})
    path.write_bytes(model.SerializeToString())
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"the INT8 graph fails the ONNX checker ({reason[:300]}): please report it") from error
