from __future__ import annotations

import json
import sys
from importlib import metadata

import numpy as np
import onnx
import onnxruntime
import pytest

from admth_runtime import doctor
from admth_runtime.doctor import CudaFacts, diagnose


def installed(**versions):
    def find(name: str) -> str:
        if name.replace("-", "_") not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name.replace("-", "_")]

    return find


def test_this_machine():
    found = diagnose()
    assert found.engine_works
    assert found.engine_problem is None
    assert "CPUExecutionProvider" in found.providers
    assert [(package.name, package.version) for package in found.onnxruntime] == [
        ("onnxruntime", onnxruntime.__version__)
    ]
    assert found.optional["pyarrow"]
    assert found.conflicts == ()
    json.dumps(found.to_dict())


def test_the_test_model_is_what_it_says():
    model = onnx.load_from_string(doctor._IDENTITY_MODEL)
    onnx.checker.check_model(model, full_check=True)
    assert (model.ir_version, model.opset_import[0].version) == (10, 20)
    assert [node.op_type for node in model.graph.node] == ["Identity"]


def test_both_wheels_are_a_conflict():
    found = diagnose(installed(onnxruntime="1.20", onnxruntime_gpu="1.20"))
    assert len(found.conflicts) == 1
    assert "onnxruntime and onnxruntime-gpu are both installed" in found.conflicts[0]
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in found.conflicts[0]


def test_no_engine(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    found = diagnose(installed())
    assert not found.engine_works
    assert found.onnxruntime == ()
    assert "pip install 'admth[cpu]'" in found.advice[0]


def test_a_broken_engine_is_reported_and_not_raised(monkeypatch):
    monkeypatch.delattr(onnxruntime, "InferenceSession")
    found = diagnose(installed(onnxruntime="1.20"))
    assert not found.engine_works
    assert "AttributeError" in found.engine_problem
    assert "--force-reinstall" in found.advice[0]


def test_an_engine_with_wrong_values_is_not_working(monkeypatch):
    class Wrong:
        def __init__(self, *_, **__):
            pass

        def run(self, *_):
            return [np.zeros(4, np.uint8)]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Wrong)
    assert diagnose().engine_problem == "onnxruntime returned wrong values for a model of one Identity"


def test_a_gpu_without_its_wheel(monkeypatch):
    monkeypatch.setattr(doctor, "_ask_cuda", lambda: CudaFacts(True, "12.8", 1))
    found = diagnose(installed(onnxruntime="1.20", pyarrow="15"))
    assert found.advice == ("to use the GPU: run  pip uninstall -y onnxruntime  and then  pip install 'admth[gpu]'",)


def test_missing_optional_packages():
    found = diagnose(installed(onnxruntime="1.20"))
    assert found.optional == {"pyarrow": None}
    assert any("pip install 'admth[parquet]'" in line for line in found.advice)


@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt-lean", "tensorrt-rtx-cu13"])
def test_tensorrt_flavours(flavour):
    found = diagnose(installed(**{flavour.replace("-", "_"): "11.4"}))
    assert [(package.name, package.version) for package in found.tensorrt] == [(flavour, "11.4")]


def test_a_driver_that_does_not_start(monkeypatch):
    class Driver:
        def cuInit(self, flags):
            return 100

    monkeypatch.setattr(doctor.ctypes, "CDLL", lambda name: Driver())
    assert doctor._ask_cuda() == CudaFacts(True, problem="the NVIDIA driver does not start (CUDA error 100)")
