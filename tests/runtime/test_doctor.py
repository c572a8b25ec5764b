from __future__ import annotations

import json
import sys
from importlib import metadata

import numpy as np
import onnx
import onnxruntime
import pytest
from _cuda_double import Machine

from admth_runtime import doctor, driver
from admth_runtime.doctor import CudaFacts, Package, diagnose

CARD = CudaFacts(True, "13.0", 1, None, (("Double L4", "sm89"),))


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
    monkeypatch.setattr(doctor, "ask_driver", lambda: CudaFacts(True, "12.8", 1))
    found = diagnose(installed(onnxruntime="1.20", pyarrow="15"))
    assert found.advice == ("to use the GPU: run  pip uninstall -y onnxruntime  and then  pip install 'admth[gpu]'",)


def test_missing_optional_packages():
    found = diagnose(installed(onnxruntime="1.20"))
    assert found.optional == {"pyarrow": None}
    assert any("pip install 'admth[parquet]'" in line for line in found.advice)


class TestTensorRT:
    @pytest.fixture(autouse=True)
    def no_real_one(self, monkeypatch):
        for name in ("tensorrt", "tensorrt_lean", "tensorrt_rtx"):
            monkeypatch.setitem(sys.modules, name, None)

    @pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt-lean", "tensorrt-rtx-cu13"])
    def test_without_a_driver_it_is_not_even_imported(self, flavour, monkeypatch):
        monkeypatch.setattr(doctor, "ask_driver", lambda: CudaFacts(False, problem="no NVIDIA driver"))
        found = diagnose(installed(**{flavour.replace("-", "_"): "11.4"}))
        (facts,) = found.tensorrt
        assert facts.module == flavour.removesuffix("-cu13").replace("-", "_")
        assert facts.packages == (Package(flavour, "11.4"),)
        assert (facts.version, facts.usable, facts.problem) == ("11.4", False, "no NVIDIA driver")

    def facts(self, monkeypatch, cuda=CARD, module=None, **versions):
        monkeypatch.setattr(doctor, "ask_driver", lambda: cuda)
        if module is not None:
            monkeypatch.setitem(sys.modules, "tensorrt_rtx", module)
        return diagnose(installed(**versions)).tensorrt

    def test_usable(self, monkeypatch):
        from _tensorrt_double import tensorrt_module

        (facts,) = self.facts(
            monkeypatch,
            module=tensorrt_module(Machine(), "tensorrt_rtx"),
            tensorrt_rtx_cu13="1.7.1",
            cuda_bindings="13.0",
        )
        assert (facts.version, facts.usable, facts.problem) == ("1.7.1.116", True, None)

    def test_none(self, monkeypatch):
        assert self.facts(monkeypatch) == ()

    def test_one_that_cannot_be_imported(self, monkeypatch):
        (facts,) = self.facts(monkeypatch, tensorrt_rtx_cu13="1.7.1", cuda_bindings="13.0")
        assert not facts.usable
        assert "cannot be imported (ModuleNotFoundError" in facts.problem
        assert "--force-reinstall 'admth[rtx]'" in facts.problem

    def test_an_old_driver(self, monkeypatch):
        old = CudaFacts(True, "12.4", 1, None, (("Double L4", "sm89"),))
        (facts,) = self.facts(monkeypatch, old, tensorrt_rtx_cu13="1.7.1", cuda_bindings="13.0")
        assert facts.problem.startswith("it needs CUDA 13 and the driver supports 12.4")

    def test_no_way_to_cuda(self, monkeypatch):
        (facts,) = self.facts(monkeypatch, tensorrt_lean="11.4")
        assert facts.problem == "it needs cuda-bindings: run  pip install 'admth[tensorrt-lean]'"


class TestDriver:
    def test_none(self, monkeypatch):
        def missing(name):
            raise OSError(f"{name}: cannot open shared object file: No such file or directory")

        monkeypatch.setattr(driver.ctypes, "CDLL", missing)
        assert driver.ask_driver() == CudaFacts(False, problem="no NVIDIA driver")

    @pytest.mark.parametrize(
        ("machine", "facts"),
        [
            (Machine(start_code=100), CudaFacts(True, problem="the NVIDIA driver does not start (CUDA error 100)")),
            (Machine(gpus=[]), CudaFacts(True, "13.0", 0, "the NVIDIA driver sees no GPU")),
            (Machine(), CARD),
            (
                Machine(gpus=[("a", 12, 0), ("b", 8, 7)], driver_version=12060),
                CudaFacts(True, "12.6", 2, None, (("a", "sm120"), ("b", "sm87"))),
            ),
        ],
    )
    def test_what_it_says(self, monkeypatch, machine, facts):
        monkeypatch.setattr(driver, "ctypes", machine.ctypes())
        assert driver.ask_driver() == facts
        assert facts.version_major == int((facts.version or "0").split(".")[0])
