from __future__ import annotations

import hashlib
import json

import pytest
from _tiny_model import LENGTHS, save_tiny_model, tiny_manifest, tiny_model
from onnx import TensorProto, helper

from admth_runtime.errors import ManifestError, ModelError
from admth_runtime.model import read_model


def test_model_and_manifest(tiny_path):
    model = read_model(tiny_path)
    assert model.manifest == tiny_manifest()
    assert model.manifest.code_lengths == LENGTHS
    assert model.path == tiny_path
    assert model.sha256 == hashlib.sha256(tiny_path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ("", "has no admth manifest: export your checkpoint"),
        ("{broken", "not JSON"),
        (json.dumps({"format_version": 99}), "newer than"),
        (tiny_manifest((16, 32)), r"has \['code_48', 'code_64', 'logits_48', 'logits_64'\] beside"),
        (tiny_manifest((16, 32, 48, 64, 128)), r"lacks \['code_128', 'logits_128'\]"),
        (tiny_manifest(size=16), r"uint8 \[batch, 16, 16, 3\].* it is images: uint8 \[batch, 12, 12, 3\]"),
    ],
)
def test_manifests_that_are_missing_or_disagree(tmp_path, manifest, message):
    path = save_tiny_model(tmp_path / "model.onnx", manifest=manifest)
    with pytest.raises(ManifestError, match=message) as caught:
        read_model(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "message"),
    [
        ("pictures", TensorProto.UINT8, ["batch", 12, 12, 3], "it is pictures"),
        ("images", TensorProto.FLOAT, ["batch", 12, 12, 3], "images: float32"),
        ("images", TensorProto.UINT8, ["batch", 3, 12, 12], r"\[batch, 3, 12, 12\]"),
        ("images", TensorProto.UINT8, [1, 12, 12, 3], "dynamic batch"),
        ("images", TensorProto.UINT8, None, r"uint8 \[\?\]"),
    ],
)
def test_inputs_that_are_not_the_contract(tmp_path, name, dtype, shape, message):
    model = tiny_model()
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info(name, dtype, shape))
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ManifestError, match=message):
        read_model(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("index", "dtype", "shape"),
    [
        (0, TensorProto.FLOAT, ["batch", 2]),
        (0, TensorProto.UINT8, ["batch", 16]),
        (1, TensorProto.FLOAT16, ["batch", 16]),
        (1, TensorProto.FLOAT, ["batch", 16, 1]),
    ],
)
def test_outputs_that_are_not_the_contract(tmp_path, index, dtype, shape):
    model = tiny_model()
    name = model.graph.output[index].name
    model.graph.output[index].CopyFrom(helper.make_tensor_value_info(name, dtype, shape))
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ManifestError, match=f"output {name}: .* is not"):
        read_model(tmp_path / "model.onnx")


def test_output_widths_that_shape_inference_left_open_are_accepted(tmp_path):
    model = tiny_model()
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("code_16", TensorProto.UINT8, ["batch", None]))
    model.graph.output[2].CopyFrom(helper.make_tensor_value_info("code_32", TensorProto.UINT8, ["batch", "width"]))
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    assert read_model(tmp_path / "model.onnx").manifest.code_lengths == LENGTHS


def test_file_errors_pass_through(tmp_path):
    with pytest.raises(ModelError, match="no such model file"):
        read_model(tmp_path / "none.onnx")
