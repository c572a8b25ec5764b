"""Seeded models for the benchmarks: speed does not depend on what a network has learned."""

from __future__ import annotations

import logging
from pathlib import Path

import onnx
import onnxruntime
import torch

from admth_export.onnx_export import OnnxOptions, build_model
from admth_runtime.manifest import Manifest
from admth_runtime.preprocessing import PreprocessingSpec
from admth_training.config import NetworkConfig
from admth_training.network import MultiLengthHashNetwork, build_network


def seeded_network(backbone: str, size: int, lengths: tuple[int, ...]) -> MultiLengthHashNetwork:
    """Make a network with the backbone's default widths and fresh weights."""
    return build_network(NetworkConfig(backbone=backbone, input_size=size, code_lengths=lengths), seed=0).eval()


def export_seeded(path: Path, backbone: str, size: int, lengths: tuple[int, ...]) -> Path:
    """Export a seeded network as the deployed graph."""
    manifest = Manifest(
        code_lengths=lengths, preprocessing=PreprocessingSpec(size, size), network={}, checkpoint_sha256="0" * 64
    )
    onnx.save(build_model(seeded_network(backbone, size, lengths), manifest, OnnxOptions()), path)
    return path


def export_plain(path: Path, network: MultiLengthHashNetwork) -> Path:
    """Export a network as it is trained, with PyTorch's exporter and its optimiser and nothing of admth."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # remarks on packages that the exporter looks for
    size = network.config.size
    torch.onnx.export(
        network.eval(),
        (torch.zeros((2, size, size, 3), dtype=torch.uint8),),
        path,
        dynamo=True,
        opset_version=20,
        input_names=["images"],
        output_names=[f"logits_{length}" for length in network.config.code_lengths],
        dynamic_shapes={"pixels": {0: torch.export.Dim("batch")}},
        external_data=False,
        verbose=False,
    )
    return path


def bare_session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """Open a model with the options that the runtime uses, and nothing of the runtime around it."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
