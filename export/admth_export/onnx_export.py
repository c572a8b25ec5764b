"""From a trained network to one self-describing ONNX file."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from admth_export.deployed import DeployedNetwork
from admth_export.options import OnnxOptions
from admth_export.quantization import qat_facts
from admth_runtime._version import __version__
from admth_runtime.errors import ModelError, require
from admth_runtime.manifest import INPUT_NAME, METADATA_KEY, Manifest, output_names
from admth_training.checkpoint import TrainedRun
from admth_training.network import MultiLengthHashNetwork

if TYPE_CHECKING:
    import onnx

__all__ = ["OnnxOptions", "build_graph", "build_model", "check_model", "manifest_of", "set_manifest"]


def manifest_of(run: TrainedRun) -> Manifest:
    """Describe a run as its FP32 model's manifest, with no parity result yet."""
    network = run.config.network
    trunk = run.network.trunk
    facts = qat_facts(run)
    return Manifest(
        code_lengths=network.code_lengths,
        preprocessing=run.config.preprocessing,
        network={
            "backbone": network.backbone,
            "split": network.split,
            "hidden": network.hidden,
            "attention": network.attention,
            "mean": list(trunk.mean),
            "std": list(trunk.std),
            **({} if facts is None else {"qat": facts}),
        },
        checkpoint_sha256=run.checkpoint_sha256,
    )


def build_model(network: MultiLengthHashNetwork, manifest: Manifest, options: OnnxOptions) -> onnx.ModelProto:
    """Convert a trained network to the deployed graph, with its manifest, in memory.

    Args:
        network: the trained network, on the CPU; it is left as it was.
        manifest: what goes into the file's metadata.
        options: format versions.

    Returns:
        A checked model: input ``images`` uint8 ``[batch, H, W, 3]``, outputs ``code_L`` uint8 ``[batch, L / 8]`` and
        ``logits_L`` float32 ``[batch, L]``. It holds no source paths, stack traces or host names.

    Raises:
        MissingExtraError: onnx or onnxscript is not installed.
        ModelError: the exporter fails, or the result fails the checker.
    """
    model = build_graph(network, manifest.preprocessing.shape, options)
    set_manifest(model, manifest)
    return check_model(model)


def build_graph(network: MultiLengthHashNetwork, shape: tuple[int, int, int], options: OnnxOptions) -> onnx.ModelProto:
    """Convert a trained network to the deployed graph, without a manifest and unchecked; see :func:`build_model`.

    Args:
        network: the trained network, on the CPU; it is left as it was.
        shape: of one image, ``(H, W, 3)``.
        options: format versions.

    Raises:
        MissingExtraError: onnx or onnxscript is not installed.
        ModelError: the exporter fails, for example because an operator is not in this opset.
    """
    require("onnxscript", extra="export", purpose="exporting to ONNX")
    require("onnx", extra="export", purpose="exporting to ONNX")
    deployed = DeployedNetwork(network).eval()
    # Two images: the exporter would take a batch of one for a constant.
    example = torch.zeros((2, *shape), dtype=torch.uint8)
    try:
        with _quiet_exporter():
            program = torch.onnx.export(
                deployed,
                (example,),
                dynamo=True,
                opset_version=options.opset,
                input_names=[INPUT_NAME],
                output_names=list(output_names(network.config.code_lengths)),
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
                external_data=False,
                optimize=True,
                verbose=False,
            )
    except (torch.onnx.OnnxExporterError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"torch {torch.__version__} cannot export this network with opset {options.opset} ({reason[:300]}): "
            "leave --opset out, or run  pip install -U 'admth[export]'"
        ) from error
    assert program is not None
    model = program.model_proto
    _clean(model, options)
    return model


def set_manifest(model: onnx.ModelProto, manifest: Manifest) -> None:
    """Write a manifest into a model's metadata, in place of the one that was there."""
    import onnx.helper

    onnx.helper.set_model_props(model, {METADATA_KEY: manifest.to_json()})


def check_model(model: onnx.ModelProto) -> onnx.ModelProto:
    """Run the full checker and strict shape inference, and return the model with its inferred shapes.

    Raises:
        ModelError: either finds a fault.
    """
    import onnx.checker
    import onnx.shape_inference

    try:
        onnx.checker.check_model(model, full_check=True)
        return onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"the exported graph fails the ONNX checker ({reason[:300]}): please report it") from error


def _clean(model: onnx.ModelProto, options: OnnxOptions) -> None:
    """Drop what the exporter tells about the machine and its source files, and name the producer."""
    model.ir_version = options.ir_version
    model.producer_name, model.producer_version = "admth", __version__
    model.doc_string = ""
    del model.metadata_props[:]
    graph = model.graph
    graph.name = "admth"
    for item in _documented_parts(graph):
        item.doc_string = ""
        del item.metadata_props[:]


def _documented_parts(graph: onnx.GraphProto) -> Iterator[Any]:
    yield graph
    for part in (graph.node, graph.input, graph.output, graph.value_info, graph.initializer):
        yield from part


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep the exporter's remarks on packages it looks for off the terminal; errors still raise."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
