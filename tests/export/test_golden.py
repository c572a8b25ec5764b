"""What an exporter writes for the self-test, and that what it wrote passes."""

from __future__ import annotations

import shutil

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from admth_export import export_onnx
from admth_export.golden import with_golden_of_file
from admth_runtime.errors import SelfTestError
from admth_runtime.model import read_model
from admth_runtime.runtime import HashRuntime
from admth_runtime.self_test import GoldenVectors, golden_pixels
from admth_training.checkpoint import load_run
from admth_training.encode import reference_logits


def test_an_fp32_models_vectors_are_pytorchs_codes_and_it_passes(exported):
    manifest = read_model(exported / "model.onnx").manifest
    vectors = GoldenVectors.from_dict(manifest.golden, manifest.code_lengths)
    assert vectors.precision == "fp32"
    logits = reference_logits(load_run(exported).network, golden_pixels(manifest.preprocessing.shape))
    for length, values in logits.items():
        assert np.array_equal(vectors.codes[length], np.packbits(values > 0, axis=1))
    with HashRuntime(exported / "model.onnx", threads=1, self_test=True) as runtime:
        assert all(check.wrong == 0 for check in runtime.self_test().lengths.values())


def test_they_are_written_without_the_gate_too(tiny_run):
    export_onnx(tiny_run, verify=False)
    HashRuntime(tiny_run / "model.onnx", threads=1, self_test=True).close()


def test_a_page_of_lost_weights_is_found(exported, tmp_path):
    model = onnx.load(exported / "model.onnx")
    tensor = max(model.graph.initializer, key=lambda each: np.prod(each.dims))
    weights = numpy_helper.to_array(tensor).copy()
    weights.reshape(-1)[:1024] = 0
    tensor.CopyFrom(numpy_helper.from_array(weights, tensor.name))
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(SelfTestError):
        HashRuntime(tmp_path / "model.onnx", threads=1, self_test=True)


def test_a_typed_model_gets_its_own_and_passes(exported, tmp_path):
    from admth_export.tensorrt.building import export_engine
    from admth_export.tensorrt.options import EnginePrecision

    source = shutil.copy(exported / "model.onnx", tmp_path / "model.onnx")
    result = export_engine(source, precision=EnginePrecision("fp16"), onnx_only=True, verify=False)
    manifest = read_model(result.file).manifest
    assert manifest.golden["precision"] == "fp16"
    assert manifest.golden != read_model(source).manifest.golden
    HashRuntime(result.file, device="cpu", threads=1, self_test=True).close()


def test_a_file_that_cannot_be_run_gives_none(exported, tmp_path):
    manifest = read_model(exported / "model.onnx").manifest
    assert with_golden_of_file(manifest, tmp_path / "none.onnx").golden is None
    completed = with_golden_of_file(manifest, exported / "model.onnx")
    assert GoldenVectors.from_dict(completed.golden, manifest.code_lengths).precision == "fp32"
