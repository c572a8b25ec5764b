"""A quantised run is exported with its learned scales, and the INT8 model made of them computes its integers."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from admth_calibration.calibrating import calibrate
from admth_calibration.options import CalibrationOptions
from admth_export import export_onnx
from admth_export.gate import GATES, Gate
from admth_export.options import ImageChoice
from admth_export.quantization import QUANTIZATION_KEY
from admth_export.verification import verify
from admth_runtime.errors import CheckpointError
from admth_runtime.files import sha256_of_file
from admth_runtime.manifest import METADATA_KEY, Manifest
from admth_training.checkpoint import load_run, load_run_config, save_network, save_run_config
from admth_training.config import NetworkConfig, QatConfig
from admth_training.encode import inference, reference_logits
from admth_training.qat import freeze_quantization, observing, quantize_network
from admth_training.qat.names import deployed_layer_names

LITE = NetworkConfig(input_size=32, hidden=16, code_lengths=(8, 16))
CNNF = NetworkConfig(backbone="cnnf", input_size=67, hidden=16, code_lengths=(8, 16))


def quantised_run(folder, base, make_pixels, target):
    """Write a run as ``fit --qat`` does after no step: ranges and corrected biases of the FP32 run, frozen."""
    run = load_run(base)
    network = quantize_network(copy.deepcopy(run.network), target)
    with observing(network), inference(network):
        network(torch.from_numpy(make_pixels(48, network.config.size, seed=99)))
    freeze_quantization(network)
    folder.mkdir()
    shutil.copy(base / "splits.json", folder) if (base / "splits.json").exists() else None
    qat = QatConfig(str(base), run.checkpoint_sha256, target)
    save_run_config(folder, replace(run.config, qat=qat))
    save_network(folder / "model.safetensors", network)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, make_network, make_run, make_pixels, pictures):
    """Give exported quantised runs by backbone and target, with the FP32 run beside them; each is made once."""
    root = tmp_path_factory.mktemp("qat")
    bases, made = {}, {}

    def get(config, target):
        if config not in bases:
            bases[config] = make_run(root / f"{config.backbone}-fp32", make_network(config), f"folder:{pictures}")
        key = config, target
        if key not in made:
            made[key] = quantised_run(root / f"{config.backbone}-{target}", bases[config], make_pixels, target)
            export_onnx(made[key], verify=key == (LITE, "cpu"), images=ImageChoice(images=24, database_images=0))
        return made[key]

    return get


def metadata(path):
    return {item.key: item.value for item in onnx.load(path).metadata_props}


def int8_model(run):
    """Make the INT8 model from what the exported one says, and nothing else."""
    model = onnx.load(run / "model.onnx")
    values = metadata(run / "model.onnx")
    learned = json.loads(values[QUANTIZATION_KEY])
    made = plain_qdq(model, learned["tensors"], learned["target"])
    manifest = replace(
        Manifest.from_json(values[METADATA_KEY]),
        precision="int8",
        target=learned["target"],
        calibration={"method": "learned"},
        parity=None,
    )
    onnx.helper.set_model_props(made, {METADATA_KEY: manifest.to_json()})
    onnx.checker.check_model(made, full_check=True)
    path = run / "model.int8.onnx"
    onnx.save(made, path)
    return path


def logits(path, pixels):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_outputs()]
    outputs = dict(zip(names, session.run(None, {"images": pixels}), strict=True))
    return {int(name.removeprefix("logits_")): outputs[name] for name in names if name.startswith("logits_")}


@pytest.mark.parametrize("config", [LITE, CNNF], ids=["lite", "cnnf"])
@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_onnx_runtime_computes_the_integers_of_the_quantised_network(runs, make_pixels, config, target):
    run = runs(config, target)
    pixels = make_pixels(120, config.size, seed=3)
    expected = reference_logits(load_run(run).network, pixels)
    found = logits(int8_model(run), pixels)
    bits, equal, same = 0, 0, []
    for length, values in expected.items():
        bits += values.size
        equal += int(((values > 0) == (found[length] > 0)).sum())
        same.append((np.abs(values - found[length]) < 1e-4 * values.std()).all(axis=1).mean())
    # Sums of integers are exact for TensorRT; on the CPU a residual sum may fall on the edge between two integers.
    least_bits, least_same = (1.0, 0.99) if target == "tensorrt" else (0.999, 0.85)
    assert equal / bits >= least_bits
    assert min(same) >= least_same
    assert np.mean([(expected[n] > 0).mean() for n in expected]) == pytest.approx(0.5, abs=0.25)


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_calibrating_takes_the_learned_scales(runs, make_pixels, tmp_path, target):
    run = runs(LITE, target)
    option = "trt" if target == "tensorrt" else "cpu"
    (made,) = calibrate(run / "model.onnx", out=tmp_path / "int8.onnx", options=CalibrationOptions(target=option))
    assert (made.manifest.precision, made.manifest.target) == ("int8", target)
    pixels = make_pixels(100, LITE.size, seed=4)
    expected, found = reference_logits(load_run(run).network, pixels), logits(made.model, pixels)
    for length, values in expected.items():
        assert ((values > 0) == (found[length] > 0)).mean() >= (1.0 if target == "tensorrt" else 0.997)


def test_the_exported_model_holds_scales_and_weights_that_give_the_integers_back(runs):
    run = runs(LITE, "cpu")
    values = metadata(run / "model.onnx")
    learned = json.loads(values[QUANTIZATION_KEY])
    assert (learned["version"], learned["target"]) == (1, "cpu")
    config = load_run_config(run)
    assert learned["source"]["base_checkpoint_sha256"] == config.qat.base_sha256
    assert learned["source"]["checkpoint_sha256"] == sha256_of_file(run / "model.safetensors")
    manifest = Manifest.from_json(values[METADATA_KEY])
    assert (manifest.precision, manifest.target) == ("fp32", "any")
    assert manifest.network["qat"]["target"] == "cpu"
    assert manifest.parity["passed"]
    graph = onnx.load(run / "model.onnx").graph
    weights = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer}
    layers = {name.removesuffix(".weight") for name in weights if name.endswith(".weight")}
    assert layers == {name.rpartition(".")[0] for name in learned["tensors"]}
    assert layers == set(deployed_layer_names(load_run(run).network).values())
    for layer in layers:
        weight = weights[f"{layer}.weight"]
        scale = np.abs(weight).max(axis=tuple(range(1, weight.ndim)), keepdims=True) / np.float32(127)
        integers = np.rint(weight / scale)
        assert np.array_equal(integers * scale, weight)
    for entry in learned["tensors"].values():
        assert np.float32(entry["scale"]) == entry["scale"] > 0
        assert 0 <= entry["zero_point"] <= 255


def test_a_plain_run_exports_no_quantisation(exported):
    assert set(metadata(exported / "model.onnx")) == {METADATA_KEY}


def test_verify_compares_with_both_networks(runs, tmp_path):
    run = runs(LITE, "cpu")
    candidate = int8_model(run)
    images = ImageChoice(images=24, database_images=12)
    report = verify(candidate, run, images=images)
    assert report.passed
    assert report.gate == GATES["qat"]
    assert report.reference == "INT8 arithmetic of cpu"
    assert report.against is not None
    assert report.against.reference == "FP32, run efficientnet_lite0-fp32"
    assert report.against.checkpoint_sha256 == load_run_config(run).qat.base_sha256
    assert report.against.flip_count > report.flip_count
    assert report.against.failures == ()
    values = report.to_dict()
    assert values["against"]["runs"][0]["lengths"].keys() == values["runs"][0]["lengths"].keys()
    assert "(FP32, run efficientnet_lite0-fp32)" in report.table()
    # The FP32 model of the same run has no roundings, and neither has what it is held to.
    own = verify(run / "model.onnx", run, images=images)
    assert own.passed
    assert own.reference == "FP32, without the roundings of QAT"
    assert own.against is None
    assert own.flip_count == 0


def test_the_command_takes_another_run_to_compare_with(runs, tmp_path, capsys):
    run = shutil.copytree(runs(LITE, "tensorrt"), tmp_path / "run")
    config = load_run_config(run)
    save_run_config(run, replace(config, qat=replace(config.qat, base_run=str(tmp_path / "gone"))))
    candidate = int8_model(run)
    images = ["--images", "12", "--database-images", "0"]

    def check(*more):
        line = [sys.executable, "-m", "admth_export", "verify", "model.int8.onnx", *images, *map(str, more)]
        return subprocess.run(line, cwd=run, capture_output=True, text=True, timeout=120, check=False)

    done = check("--against", config.qat.base_run)
    assert done.returncode == 0, done.stderr
    assert "PyTorch (FP32, run efficientnet_lite0-fp32) on 12" in done.stdout
    assert json.loads((run / "model.int8.parity.json").read_text())["against"]["passed"]
    with pytest.raises(CheckpointError, match=r"elsewhere is not a run's folder"):
        verify(candidate, run, against=tmp_path / "elsewhere")
    assert verify(candidate, run, images=ImageChoice(images=12, database_images=0)).against is None
    assert "gone is not there any more: compare with it too by  --against RUN" in capsys.readouterr().err


def test_the_gate_follows_the_manifest():
    from admth_runtime.preprocessing import PreprocessingSpec

    plain = Manifest((8,), PreprocessingSpec(32, 32), {}, "0" * 64, precision="int8", target="cpu")
    tuned = replace(plain, network={"qat": {"target": "cpu"}})
    assert Gate.of_model(plain) == GATES["int8"]
    assert Gate.of_model(tuned) == GATES["qat"]
    assert Gate.of_model(tuned, minimum_bit_parity=0.9).minimum_bit_parity == 0.9
    # The other target's arithmetic is another one, and FP16 around the integers is too.
    assert Gate.of_model(replace(tuned, target="tensorrt")) == GATES["int8"]
    assert Gate.of_model(replace(tuned, calibration={"rest": "fp16"})) == GATES["int8"]
    assert Gate.of_model(replace(tuned, precision="fp16")) == GATES["fp16"]


# The simplest Q/DQ model that follows the places of a quantised network, an independent check of what it computes.
# It knows nothing of the calibration room. Every named tensor gets QuantizeLinear and DequantizeLinear right behind it:
# for the CPU all that take it get the rounded tensor, for TensorRT the layers alone do.


def plain_qdq(model: onnx.ModelProto, tensors: Mapping[str, Mapping[str, Any]], target: str) -> onnx.ModelProto:
    """Return an INT8 model of an FP32 one and the scales of its tensors, ``<layer>.input`` and ``<layer>.output``."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    cpu = target == "cpu"
    layers = {
        node.input[1].removesuffix(".weight"): node
        for node in graph.node
        if node.op_type in ("Conv", "Gemm") and f"{node.input[1].removesuffix('.weight')}.input" in tensors
    }
    rounded: dict[str, tuple[np.float32, int]] = {}
    for layer, node in layers.items():
        rounded[node.input[0]] = _numbers(tensors[f"{layer}.input"])
        if f"{layer}.output" in tensors:
            rounded[_activated(node, users)] = _numbers(tensors[f"{layer}.output"])
    new: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []

    def constant(name: str, value: np.ndarray) -> str:
        constants.append(onnx.numpy_helper.from_array(value, name))
        return name

    def pair(tensor: str) -> list[onnx.NodeProto]:
        scale, zero = rounded[tensor]
        parameters = [
            constant(f"{tensor}.scale", np.array(scale, np.float32)),
            constant(f"{tensor}.zero", np.array(zero, np.uint8 if cpu else np.int8)),
        ]
        return [
            onnx.helper.make_node("QuantizeLinear", [tensor, *parameters], [f"{tensor}.q"], name=f"q.{tensor}"),
            onnx.helper.make_node(
                "DequantizeLinear", [f"{tensor}.q", *parameters], [f"{tensor}.dq"], name=f"dq.{tensor}"
            ),
        ]

    chosen = {node.output[0] for node in layers.values()}
    for node in list(graph.node):
        layer = node.input[1].removesuffix(".weight") if len(node.input) > 1 else ""
        is_layer = node.output[0] in chosen
        for place, name in enumerate(node.input):
            if name in rounded and (cpu or (is_layer and place == 0)):
                node.input[place] = f"{name}.dq"
        if is_layer:
            source = node.input[0].removesuffix(".dq")
            new += _constants(node, layer, weights, rounded[source][0], constant, cpu=cpu)
        new.append(node)
        new += [item for output in node.output if output in rounded for item in pair(output)]
    del graph.node[:]
    graph.node.extend(new)
    graph.initializer.extend(constants)
    del graph.value_info[:]
    return result


def _constants(node, layer, weights, scale, constant, *, cpu):
    weight = weights[f"{layer}.weight"]
    axes = tuple(range(1, weight.ndim))
    scales = (np.abs(weight).max(axis=axes) / np.float32(127)).astype(np.float32)
    scales[scales == 0] = 1
    integers = np.rint(weight / scales.reshape(-1, *[1] * len(axes)))
    assert np.array_equal(integers * scales.reshape(-1, *[1] * len(axes)), weight), layer
    name = f"{layer}.weight"
    parameters = [constant(f"{name}.scale", scales), constant(f"{name}.zero", np.zeros(len(scales), np.int8))]
    made = [
        onnx.helper.make_node(
            "DequantizeLinear",
            [constant(f"{name}.int8", integers.astype(np.int8)), *parameters],
            [f"{name}.dq"],
            name=f"dq.{name}",
            axis=0,
        )
    ]
    node.input[1] = f"{name}.dq"
    if cpu and len(node.input) > 2:
        bias, steps = weights[f"{layer}.bias"], (scale * scales).astype(np.float32)
        rounded = np.rint(bias / steps)
        assert np.abs(rounded).max() < 2**31, layer
        name = f"{layer}.bias"
        inputs = [
            constant(f"{name}.int32", rounded.astype(np.int32)),
            constant(f"{name}.scale", steps),
            constant(f"{name}.zero", np.zeros(len(steps), np.int32)),
        ]
        made.append(onnx.helper.make_node("DequantizeLinear", inputs, [f"{name}.dq"], name=f"dq.{name}", axis=0))
        node.input[2] = f"{name}.dq"
    return made


def _numbers(entry):
    return np.float32(entry["scale"]), int(entry["zero_point"])


def _activated(node, users):
    following = users.get(node.output[0], [])
    if len(following) == 1 and following[0].op_type in ("Relu", "Clip"):
        return following[0].output[0]
    return node.output[0]
