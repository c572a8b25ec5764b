"""An FP32 model with its weights stored in 8 or 4 bits, and everything else as it was.

Fully connected layers hold nearly all weights of the paper's network, and at batch 1 the time goes into reading them.
They become ONNX Runtime's MatMulNBits, which keeps the integers in memory and multiplies with them: a DequantizeLinear
before a Gemm would be computed anew in every run, at ten times the kernel's time and with the FP32 weights in memory.
The kernel rounds the activations of one image to 8 bits, with a scale for each block of a row, inside the product; so
there is nothing to calibrate, and no image's code depends on the others in its batch.

Convolutions hold few weights, and rounding those to 8 bits flips more bits than all else: they are stored in FP16 and
become FP32 again when the model is loaded, or in 8 bits with one scale a channel where size counts more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from admth_calibration.blocks import BlockedMatrix, error_feedback, fitting_block_size, quantize_blocks
from admth_calibration.drawing import Sample, draw
from admth_calibration.graph import Graph, matches_layer
from admth_calibration.images import open_images
from admth_calibration.layers import check_layer_names
from admth_calibration.options import CalibrationOptions, check_out
from admth_calibration.predicting import predict_parity
from admth_calibration.probing import activation_batches
from admth_calibration.stored_weights import load_without_weights
from admth_calibration.weights_graph import LayerPlan, WeightSource, rewrite
from admth_calibration.weights_options import WeightsOnlyOptions, default_weights_out
from admth_calibration.writing import with_golden, write_model
from admth_runtime.console import progress
from admth_runtime.errors import InputError, ModelError, require
from admth_runtime.files import atomic_path, sha256_of_file
from admth_runtime.manifest import Manifest
from admth_runtime.model import ModelFile, read_model
from admth_runtime.runtime import HashRuntime

if TYPE_CHECKING:
    import onnx

__all__ = ["WeightsOnlyResult", "weights_only"]

# 4 bits are for layers with this share of all weights or more: in others they flip bits and save nothing.
_LARGE = 0.05
_FLOAT = 1  # onnx.TensorProto.FLOAT
_BATCH = 16


@dataclass(frozen=True)
class WeightsOnlyResult:
    """What a weights-only compression made.

    Attributes:
        model: the ONNX file.
        bytes: its size.
        source_bytes: size of the FP32 model.
        sha256: its SHA-256.
        manifest: its manifest; ``calibration`` holds the facts, and the predicted parity where there were images.
        layers: how each layer's weights are stored, by layer name: ``"int8"``, ``"int4"`` or ``"fp16"``.
        kept: names of the layers with weights that stay in FP32.
    """

    model: Path
    bytes: int
    source_bytes: int
    sha256: str
    manifest: Manifest
    layers: Mapping[str, str]
    kept: tuple[str, ...]


def weights_only(
    model: str | Path,
    out: str | Path | None = None,
    *,
    options: WeightsOnlyOptions | None = None,
    data: str | None = None,
    root: Path | None = None,
    strip_prefix: str | None = None,
    check_data: str | None = None,
) -> WeightsOnlyResult:
    """Store an FP32 model's weights in 8 or 4 bits.

    The FP32 weights are read from the file a few rows at a time. Memory holds the compressed model, and where there are
    images, the inputs of the fully connected layers for each of them and one matrix of second moments at a time (340 MB
    for the paper's first fully connected layer).

    Args:
        model: the FP32 ONNX model.
        out: the file to write; None is ``model.w8.onnx`` or ``model.w4.onnx`` beside ``model.onnx``.
        options: how; None is 8 bits.
        data: images to choose the roundings with and to compare the codes on, such as ``folder:pictures``; labels are
            not needed. None rounds to nearest and compares nothing.
        root: for a list, the folder that relative paths start from.
        strip_prefix: for a list, a text that is cut from the start of each path.
        check_data: images to compare on, best such as the network has not been trained on; None takes others of
            ``data``.

    Raises:
        ModelError: the model is missing, broken, not FP32, has a layer of a form that cannot be compressed, or the
            result does not run on the installed ONNX Runtime.
        DataError: the images are missing, broken, or fewer than 128.
        InputError: an option is out of range, or a layer to keep does not exist.
        OutputError: the file cannot be written.
    """
    options = options or WeightsOnlyOptions()
    path = Path(model)
    target = Path(out) if out is not None else default_weights_out(path, options.weights)
    source = _source(path)
    check_out(path, target)
    sample = _sample(source, options, data, root, strip_prefix, check_data)
    require("onnxruntime", extra="calibrate", purpose="compressing a model")
    with atomic_path(target) as temporary:
        light, stored = load_without_weights(path)
        weights = WeightSource(Graph(light), stored)
        plans = _plan(weights, options)
        compressed = _compressed(path, weights, plans, sample)
        others = tuple(layer for layer in weights.graph.layers() if layer not in plans)
        manifest = _manifest(source, plans, others, sample, options)
        write_model(temporary, compressed, manifest)
        if sample is None:
            _check_it_runs(temporary, manifest)
        else:
            manifest = _compared(path, temporary, manifest, sample)
        manifest = with_golden(temporary, manifest)
        write_model(temporary, compressed, manifest)
        size, digest = temporary.stat().st_size, sha256_of_file(temporary)
    layers = {layer: plan.kind for layer, plan in plans.items()}
    return WeightsOnlyResult(target, size, source.size, digest, manifest, layers, others)


def _source(path: Path) -> ModelFile:
    source = read_model(path)
    if source.manifest.precision != "fp32":
        raise ModelError(f"{path} is {source.manifest.precision} already: pass the FP32 model of  admth-export onnx")
    return source


def _sample(
    source: ModelFile,
    options: WeightsOnlyOptions,
    data: str | None,
    root: Path | None,
    strip_prefix: str | None,
    check_data: str | None,
) -> Sample | None:
    if data is None:
        given = {"--root": root, "--strip-prefix": strip_prefix, "--check-data": check_data}
        for name, value in given.items():
            if value is not None:
                raise InputError(f"{name} means nothing without --data: pass --data too")
        return None
    images = open_images(data, root=root, strip_prefix=strip_prefix)
    compared = None if check_data is None else open_images(check_data)
    wanted = CalibrationOptions(images=options.images, check_images=options.check_images, seed=options.seed)
    return draw(images, wanted, source.manifest.preprocessing, compared)


def _plan(weights: WeightSource, options: WeightsOnlyOptions) -> dict[str, LayerPlan]:
    """Say how the weights of each layer are stored; the sums of squares in a response normalisation stay exact."""
    graph = weights.graph
    norms = {node.name for region in graph.response_norms() for node in region}
    layers = {layer: node for layer, node in graph.layers().items() if node.name not in norms}
    check_layer_names(layers, options.keep_fp32)
    sizes = {layer: int(np.prod(graph.initializers[node.input[1]].dims)) for layer, node in layers.items()}
    total = sum(sizes.values())
    plans = {}
    for layer, node in layers.items():
        if any(matches_layer(layer, pattern) for pattern in options.keep_fp32):
            continue
        if node.op_type == "Conv":
            plans[layer] = LayerPlan(options.convolutions)
        else:
            bits = options.bits if sizes[layer] >= _LARGE * total else 8
            inputs = weights.matrix(node, layer).shape[1]
            plans[layer] = LayerPlan(f"int{bits}", fitting_block_size(inputs, options.largest_block))
    if not plans:
        raise ModelError("no layer is left to compress: keep fewer in FP32")
    return plans


def _inputs(graph: Graph, path: Path, plans: Mapping[str, LayerPlan], sample: Sample) -> dict[str, NDArray[np.float32]]:
    """Return the inputs of the fully connected layers, float32 ``[images, inputs]``, by tensor."""
    layers = graph.layers()
    wanted = list(dict.fromkeys(layers[layer].input[0] for layer, plan in plans.items() if plan.block_size))
    found: dict[str, list[NDArray[np.float32]]] = {name: [] for name in wanted}
    for values in activation_batches(path, dict.fromkeys(wanted, _FLOAT), sample.batches("looking at images")):
        for name in wanted:
            found[name].append(values[name].reshape(len(values[name]), -1))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def _compressed(
    path: Path, weights: WeightSource, plans: Mapping[str, LayerPlan], sample: Sample | None
) -> onnx.ModelProto:
    try:
        return _compress(weights, plans, {} if sample is None else _inputs(weights.graph, path, plans, sample))
    except MemoryError as error:
        mend = "fewer --images, or leave --data out" if sample is not None else "a computer with more, or --keep-fp32"
        raise ModelError(f"{path}: there is too little memory to compress it: use {mend}") from error


def _compress(
    weights: WeightSource, plans: Mapping[str, LayerPlan], inputs: Mapping[str, NDArray[np.float32]]
) -> onnx.ModelProto:
    products = {
        layer: node for layer, node in weights.graph.layers().items() if layer in plans and node.op_type != "Conv"
    }
    rows = sum(weights.matrix(node, layer).shape[0] for layer, node in products.items())
    with progress("compressing", rows, unit="rows") as advance:

        def quantized(layer: str, node: onnx.NodeProto, plan: LayerPlan) -> BlockedMatrix:
            seen = inputs.get(node.input[0])
            if seen is not None and not bool(np.isfinite(seen).all()):
                raise ModelError(f"the inputs of {layer} are not finite on the images: train again")
            feedback = None if seen is None else error_feedback(seen)
            bits = int(plan.kind.removeprefix("int"))
            matrix = quantize_blocks(weights.matrix(node, layer), bits, plan.block_size, feedback, advance)
            if not bool(np.isfinite(matrix.scales).all()):
                raise ModelError(f"the weights of {layer} are not finite: train again")
            return matrix

        return rewrite(weights, plans, quantized)


def _manifest(
    source: ModelFile,
    plans: Mapping[str, LayerPlan],
    others: tuple[str, ...],
    sample: Sample | None,
    options: WeightsOnlyOptions,
) -> Manifest:
    kinds = [plan.kind for plan in plans.values()]
    facts: dict[str, Any] = {
        "method": "weights only, rounded to nearest" if sample is None else "weights only, GPTQ",
        "target": "cpu",
        "activations": "fp32, rounded to int8 by block inside the products",
        "weights": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
        "block_size": options.largest_block,
        "convolutions": options.convolutions,
        "source_sha256": source.sha256,
        "layers": len(plans),
        "kept_fp32": list(others),
        "needs": "onnxruntime 1.22, on ARM 1.23, or newer",
    }
    if sample is not None:
        facts |= {**sample.facts, "seed": options.seed}
    return replace(source.manifest, precision=options.precision, target="cpu", calibration=facts, parity=None)


def _compared(path: Path, temporary: Path, manifest: Manifest, sample: Sample) -> Manifest:
    """Return the manifest with the parity of the compressed model with the FP32 one."""
    predicted = predict_parity(path, temporary, _batches(sample.check_pixels()))
    predicted["images_seen_in_calibration"] = sample.seen
    return replace(manifest, calibration={**(manifest.calibration or {}), "predicted": predicted})


def _check_it_runs(path: Path, manifest: Manifest) -> None:
    with progress("running it once", None), HashRuntime(path, device="cpu") as runtime:
        runtime.encode_pixels(np.zeros((1, *manifest.preprocessing.shape), dtype=np.uint8))


def _batches(pixels: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    with progress("comparing", len(pixels), unit="images") as advance:
        for start in range(0, len(pixels), _BATCH):
            yield pixels[start : start + _BATCH]
            advance(len(pixels[start : start + _BATCH]))
