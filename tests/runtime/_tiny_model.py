"""A small ONNX model that keeps the deployed graph's contract, built with onnx.helper for the runtime's own tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from admth_runtime.manifest import METADATA_KEY, Manifest
from admth_runtime.preprocessing import PreprocessingSpec

LENGTHS = (16, 32, 48, 64)
SIZE = 12


def tiny_manifest(lengths=LENGTHS, size=SIZE, **changes) -> Manifest:
    fields = {
        "code_lengths": lengths,
        "preprocessing": PreprocessingSpec(size, size),
        "network": {"backbone": "tiny"},
        "checkpoint_sha256": "ab" * 32,
    }
    return Manifest(**{**fields, **changes})


def tiny_weights(length: int, size: int = SIZE, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Weights [L, 3 * 4 * 4] and bias [L] of one head over average-pooled 4x4 cells."""
    generator = np.random.default_rng([seed, length])
    return generator.normal(size=(length, 48)).astype(np.float32), generator.normal(size=length).astype(np.float32)


def tiny_model(lengths=LENGTHS, size=SIZE, *, seed=0, manifest: Manifest | str | None = None) -> onnx.ModelProto:
    """Cast, Transpose, AveragePool to 4x4, Flatten, then a Gemm, a threshold and packing for every length."""
    step = size // 4
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["pixels"], ["planar"], perm=[0, 3, 1, 2]),
        helper.make_node("Sub", ["planar", "middle"], ["centred"]),
        helper.make_node("AveragePool", ["centred"], ["cells"], kernel_shape=[step, step], strides=[step, step]),
        helper.make_node("Flatten", ["cells"], ["features"]),
    ]
    constants = {
        "middle": np.float32(127.5),
        "zero": np.float32(0),
        "powers": np.float32([128, 64, 32, 16, 8, 4, 2, 1]),
        "last": np.int64([2]),
    }
    outputs = []
    for length in lengths:
        weight, bias = tiny_weights(length, size, seed)
        constants |= {f"w{length}": weight, f"b{length}": bias, f"cut{length}": np.int64([0, length // 8, 8])}
        nodes += [
            helper.make_node("Gemm", ["features", f"w{length}", f"b{length}"], [f"logits_{length}"], transB=1),
            helper.make_node("Greater", [f"logits_{length}", "zero"], [f"sign{length}"]),
            helper.make_node("Cast", [f"sign{length}"], [f"bit{length}"], to=TensorProto.FLOAT),
            helper.make_node("Reshape", [f"bit{length}", f"cut{length}"], [f"byte{length}"]),
            helper.make_node("Mul", [f"byte{length}", "powers"], [f"weighed{length}"]),
            helper.make_node("ReduceSum", [f"weighed{length}", "last"], [f"sum{length}"], keepdims=0),
            helper.make_node("Cast", [f"sum{length}"], [f"code_{length}"], to=TensorProto.UINT8),
        ]
        outputs += [
            helper.make_tensor_value_info(f"code_{length}", TensorProto.UINT8, ["batch", length // 8]),
            helper.make_tensor_value_info(f"logits_{length}", TensorProto.FLOAT, ["batch", length]),
        ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", size, size, 3])],
        outputs,
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10, producer_name="tests")
    if manifest is None:
        manifest = tiny_manifest(lengths, size)
    if manifest != "":
        text = manifest if isinstance(manifest, str) else manifest.to_json()
        helper.set_model_props(model, {METADATA_KEY: text})
    return model


def save_tiny_model(path: Path, *args, **kwargs) -> Path:
    path.write_bytes(tiny_model(*args, **kwargs).SerializeToString())
    return path


def expected_logits(pixels: np.ndarray, length: int, size: int = SIZE, seed: int = 0) -> np.ndarray:
    """The tiny network in NumPy, float64."""
    weight, bias = tiny_weights(length, size, seed)
    step = size // 4
    planar = pixels.astype(np.float64).transpose(0, 3, 1, 2) - 127.5
    cells = planar.reshape(len(pixels), 3, 4, step, 4, step).mean(axis=(3, 5))
    return cells.reshape(len(pixels), -1) @ weight.T.astype(np.float64) + bias
