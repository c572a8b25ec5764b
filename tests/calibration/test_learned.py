"""Scales that training has learned: they need no images, and go into the INT8 model as they are."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnx.numpy_helper
import pytest

from admth_calibration import CalibrationOptions, calibrate
from admth_calibration.gates import Gates
from admth_calibration.graph import Graph
from admth_calibration.learned import QUANTIZATION_KEY, learned_affines, read_learned
from admth_runtime import HashRuntime
from admth_runtime.errors import InputError, ModelError

NAMES = {"cpu": "cpu", "trt": "tensorrt"}


@pytest.fixture(scope="module")
def learned(case, candidate, tmp_path_factory):
    """Write an FP32 model as training exports it: weights on their grids, and every scale in its metadata."""

    def write(target, change=lambda values: None, backbone="cnnf"):
        found, made = case(backbone), candidate(backbone, target)
        model = onnx.ModelProto()
        model.CopyFrom(found.graph.model)
        layers = found.recipe(target).layers
        tensors = {}
        for name, layer in layers.items():
            for side, tensor in (("input", layer.source), ("output", layer.result)):
                if tensor in made.affines:
                    affine = made.affines[tensor]
                    tensors[f"{name}.{side}"] = {"scale": affine.scale, "zero_point": affine.zero_point}
            weight = next(item for item in model.graph.initializer if item.name == layer.weight)
            values = onnx.numpy_helper.to_array(weight)
            axes = tuple(axis for axis in range(values.ndim) if axis != layer.axis)
            scale = np.abs(values).max(axis=axes, keepdims=True) / np.float32(127)
            scale[scale == 0] = 1
            weight.CopyFrom(onnx.numpy_helper.from_array(np.rint(values / scale) * scale, weight.name))
        values = {"version": 1, "target": NAMES[target], "tensors": tensors, "source": {"run": "night"}}
        change(values)
        metadata = {item.key: item.value for item in model.metadata_props}
        onnx.helper.set_model_props(model, {**metadata, QUANTIZATION_KEY: json.dumps(values)})
        path = tmp_path_factory.mktemp("learned") / "model.onnx"
        onnx.save(model, path)
        return path

    return write


@pytest.mark.parametrize("target", ["cpu", "trt"])
def test_no_images_are_needed_and_the_integers_are_those_of_training(learned, candidate, case, target):
    path = learned(target)
    # What the command asks by default is met by training, not by a search: there is nothing to measure on.
    options = CalibrationOptions(target, gates=Gates(min_bit_parity=0.995))
    (made,) = calibrate(path, options=options)
    assert made.model.name == ("model.int8.onnx" if target == "cpu" else "model.int8.trt.onnx")
    facts = made.manifest.calibration
    assert (facts["method"], facts["training"]["run"]) == ("learned in training", "night")
    assert not {"data", "seed", "rounding", "predicted", "gates"} & facts.keys()
    assert facts["kept_fp32"] == []
    graph = Graph(onnx.load(made.model))
    source = {item.name: onnx.numpy_helper.to_array(item) for item in onnx.load(path).graph.initializer}
    stored = {name: onnx.numpy_helper.to_array(item) for name, item in graph.initializers.items()}
    for tensor, affine in candidate("cnnf", target).affines.items():
        assert stored[f"{tensor}.scale"] == np.float32(affine.scale)
        assert stored[f"{tensor}.zero"] == affine.zero_point
    for layer in made.layers:
        found = case("cnnf").recipe(target).layers[layer]
        weight, axis = source[f"{layer}.weight"], found.axis
        integers = stored[f"{layer}.weight.int8"]
        if target == "cpu" and found.kind == "dense" and axis == 0:  # turned, as the kernel wants it
            weight, axis = weight.T, 1 - axis
        shape = [1] * weight.ndim
        shape[axis] = -1
        back = integers * stored[f"{layer}.weight.scale"].reshape(shape)
        # TensorRT's scales are numbers that FP16 has, half a step more at the largest weight.
        np.testing.assert_allclose(back, weight, atol=1e-6 if target == "cpu" else np.abs(weight).max() / 250)
        if target == "trt" and f"{layer}.bias" in source:  # no correction: training has corrected everything
            np.testing.assert_array_equal(stored[f"{layer}.bias.corrected"], source[f"{layer}.bias"])
    keys = {item.key for item in onnx.load(made.model).metadata_props}
    assert QUANTIZATION_KEY not in keys  # the result is no model to calibrate again
    with HashRuntime(made.model, device="cpu") as runtime:
        assert runtime.encode_pixels(case("cnnf").pixels[:2])[16].shape == (2, 2)


def test_parity_is_measured_where_there_are_images(learned, pictures):
    options = CalibrationOptions("trt", images=128, check_images=16, gates=Gates(min_bit_parity=1.0))
    (made,) = calibrate(learned("trt"), f"folder:{pictures}", options=options)
    facts = made.manifest.calibration
    assert facts["method"] == "learned in training"
    assert facts["predicted"]["images"] == 16
    assert "gates" not in facts  # a trained network is held to itself, not to the one that it was made from


def test_options_that_do_not_fit(learned):
    path = learned("cpu")
    for target in ("trt", "both"):
        with pytest.raises(
            InputError, match=r"was trained with the integers of --target cpu: pass that, or train again"
        ):
            calibrate(path, options=CalibrationOptions(target))
    with pytest.raises(InputError, match="--keep-fp32 means nothing for a model with learned scales"):
        calibrate(path, options=CalibrationOptions(keep_fp32=("first",)))
    for gates in (Gates(max_latency_ratio=0.9), Gates(min_map_ratio=0.9)):
        with pytest.raises(InputError, match="are measured on images: pass --data"):
            calibrate(path, options=CalibrationOptions(gates=gates))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values["tensors"].pop("trunk.conv3.input"), "no scale was learned for the tensor"),
        (lambda values: values["tensors"]["trunk.conv3.input"].update(scale=0.0), "a learned scale is not above zero"),
        (lambda values: values["tensors"]["trunk.conv3.input"].pop("scale"), "cannot be read .*: export it again"),
        (lambda values: values.update(version=2), "has version 2, and this admth reads 1"),
        (lambda values: values.update(target="tpu"), "cannot be read"),
        (lambda values: values.update(tensors=[]), "cannot be read"),
        (lambda values: values["tensors"]["trunk.conv4.input"].update(scale=9.0), "has learned another scale than"),
    ],
)
def test_broken_metadata(learned, change, message):
    path = learned("cpu", change)
    with pytest.raises(ModelError, match=message) as caught:
        calibrate(path)
    assert "\n" not in str(caught.value)
    assert [item.name for item in path.parent.iterdir()] == ["model.onnx"]


def test_a_plain_model_has_learned_nothing(case, learned, candidate):
    assert read_learned(case("cnnf").graph) is None
    graph = Graph(onnx.load(learned("cpu", backbone="lite")))
    found = learned_affines(graph, read_learned(graph))
    made = candidate("lite", "cpu")
    for tensor, affine in found.items():
        assert affine == made.affines[tensor]
