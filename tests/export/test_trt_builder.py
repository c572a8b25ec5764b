"""Answers of TensorRT that mean failure: None, -1, False and what it logs, each to one line with the mend.

No TensorRT on a machine without a GPU gives most of them, so a stand-in answers here. Everything that can be built for
real is built for real, in test_trt_build.py; a test there holds this stand-in's names against the real module.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from admth_export.tensorrt.builder import Listener, build_engine
from admth_export.tensorrt.options import EngineOptions
from admth_runtime.errors import DeviceError, InputError, ModelError

SHAPE = (8, 8, 3)


class FakeTensorRT:
    """The part of TensorRT's Python module that a build calls, with answers to choose."""

    __name__ = "tensorrt"
    __version__ = "10.13.3.9"

    def __init__(self, *, complaints=(), **answers):
        self.calls = []
        self.answers = answers
        self.complaints = complaints
        module = self

        class ILogger:
            def __init__(self):
                pass

        class IProgressMonitor:
            def __init__(self):
                pass

        class Builder:
            def __init__(self, logger):
                if "builder" in answers:
                    raise TypeError("factory function returned nullptr")
                self.logger = logger

            def create_network(self, flags):
                module.calls.append(("create_network", flags))
                return answers.get("network", object())

            def create_builder_config(self):
                return answers.get("config", Config())

            def create_optimization_profile(self):
                return answers.get("profile", Profile())

            def build_serialized_network(self, network, config):
                for severity, text in module.complaints:
                    self.logger.log(SimpleNamespace(name=severity), text)
                config.progress_monitor.phase_start("Building", None, 2)
                assert config.progress_monitor.step_complete("Building", 0) is True
                config.progress_monitor.phase_finish("Building")
                return answers.get("plan", b"ftrt" + bytes(60))

        class OnnxParser:
            def __init__(self, network, logger):
                self.num_errors = len(answers.get("errors", []))

            def parse(self, model):
                module.calls.append(("parse", bytes(model)))
                return not self.num_errors

            def get_error(self, index):
                return answers["errors"][index]

        class Config:
            def __setattr__(self, name, value):
                module.calls.append((name, value))
                object.__setattr__(self, name, value)

            def set_flag(self, flag):
                module.calls.append(("set_flag", flag))

            def clear_flag(self, flag):
                module.calls.append(("clear_flag", flag))

            def set_memory_pool_limit(self, pool, size):
                module.calls.append(("set_memory_pool_limit", pool, size))

            def add_optimization_profile(self, profile):
                return answers.get("profile_index", 0)

            def set_compute_capability(self, capability, index):
                module.calls.append(("set_compute_capability", capability, index))
                return answers.get("capability", True)

            def create_timing_cache(self, content):
                module.calls.append(("create_timing_cache", content))
                return answers.get("cache", SimpleNamespace(serialize=lambda: b"updated"))

            def set_timing_cache(self, cache, ignore_mismatch):
                return answers.get("cache_fits", True)

            def get_timing_cache(self):
                return SimpleNamespace(serialize=lambda: memoryview(b"updated"))

        class Profile:
            def set_shape(self, name, low, best, high):
                module.calls.append(("set_shape", name, low, best, high))

        self.ILogger, self.IProgressMonitor, self.Builder, self.OnnxParser = (
            ILogger,
            IProgressMonitor,
            Builder,
            OnnxParser,
        )
        self.IBuilderConfig, self.IOptimizationProfile = Config, Profile
        self.NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
        self.MemoryPoolType = SimpleNamespace(WORKSPACE="workspace")
        self.BuilderFlag = SimpleNamespace(TF32="tf32", VERSION_COMPATIBLE="compatible")
        self.ProfilingVerbosity = SimpleNamespace(DETAILED="detailed")
        self.ComputeCapability = SimpleNamespace(SM86="sm86", SM89="sm89")


def build(module, tmp_path, options=None, targets=("sm89",), *, choose_targets=False):
    model = tmp_path / "model.onnx"
    model.write_bytes(b"onnx")
    told = []
    listener = Listener(
        message=lambda severity, text: told.append((severity, text)),
        phase_started=lambda name, parent, steps: told.append(("start", name, steps)),
        stepped=lambda name: told.append(("step", name)),
        phase_finished=lambda name: told.append(("finish", name)),
    )
    built = build_engine(
        module, model, SHAPE, options or EngineOptions(), targets, listener, choose_targets=choose_targets
    )
    return built, told


def test_the_calls_of_a_build(tmp_path):
    module = FakeTensorRT(complaints=[("WARNING", "slow")])
    cache = tmp_path / "cache"
    cache.write_bytes(b"old")
    options = EngineOptions(workspace_mib=64, optimization_level=4, timing_cache=cache, version_compatible=True)
    built, told = build(module, tmp_path, options)
    assert bytes(built.plan[:4]) == b"ftrt"
    assert (built.version, built.timing_cache) == ("10.13.3.9", b"updated")
    assert built.seconds >= 0
    assert told == [("WARNING", "slow"), ("start", "Building", 2), ("step", "Building"), ("finish", "Building")]
    calls = module.calls
    assert ("create_network", 2) in calls  # 1 << STRONGLY_TYPED, which 10 needs and 11 accepts
    assert ("parse", b"onnx") in calls
    assert ("set_memory_pool_limit", "workspace", 64 << 20) in calls
    assert ("builder_optimization_level", 4) in calls
    assert ("set_flag", "compatible") in calls
    assert ("clear_flag", "tf32") in calls
    assert ("profiling_verbosity", "detailed") in calls
    assert ("create_timing_cache", b"old") in calls
    assert ("set_shape", "images", (1, *SHAPE), (8, *SHAPE), (32, *SHAPE)) in calls
    assert not [call for call in calls if call[0] in ("set_compute_capability", "num_compute_capabilities")]


def test_tf32_and_targets(tmp_path):
    module = FakeTensorRT()
    build(module, tmp_path, EngineOptions(tf32=True), ("sm86", "sm89"), choose_targets=True)
    assert ("num_compute_capabilities", 2) in module.calls
    assert [call for call in module.calls if call[0] == "set_compute_capability"] == [
        ("set_compute_capability", "sm86", 0),
        ("set_compute_capability", "sm89", 1),
    ]
    assert not [call for call in module.calls if call[0] in ("clear_flag", "create_timing_cache", "set_flag")]


@pytest.mark.parametrize(
    ("answers", "kind", "message"),
    [
        ({"builder": None}, DeviceError, "TensorRT makes no builder .factory function returned nullptr"),
        ({"network": None}, DeviceError, "TensorRT makes no network: it gives no reason"),
        ({"config": None}, DeviceError, "TensorRT makes no configuration"),
        ({"profile": None}, DeviceError, "TensorRT makes no optimisation profile"),
        ({"profile_index": -1}, DeviceError, "TensorRT refuses the batch profile 1-32"),
        ({"plan": None}, DeviceError, "tensorrt 10.13.3.9 cannot build the engine: it gives no reason: .*--verbose"),
    ],
)
def test_none_is_never_passed_on(tmp_path, answers, kind, message):
    with pytest.raises(kind, match=message) as caught:
        build(FakeTensorRT(**answers), tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("said", "mend"),
    [
        ("Error Code 2: OutOfMemory (Requested size was 15943992 bytes.)", "raise --workspace, or leave it out"),
        ("Could not find any implementation for node conv1", "no kernel fits: raise --workspace"),
        ("Unable to load library: libnvinfer_lean.so.1", "the lean runtime is missing"),
        ("[check_turing_op_compatibility] FP32 GEMM is not supported", "build with --fp16, or leave sm75 out"),
        ("CUDA initialization failure with error: 35", "CUDA does not work here: run  admth-run doctor"),
        ("Something nobody has seen yet", "see all messages with --verbose, or update TensorRT"),
    ],
)
def test_a_build_that_fails_says_why_and_what_to_do(tmp_path, said, mend):
    noise = ("ERROR", "catchCudaError: CUDA driver version is insufficient for CUDA runtime version")
    module = FakeTensorRT(plan=None, complaints=[noise, ("ERROR", said), ("ERROR", "and so on")])
    with pytest.raises(DeviceError) as caught:
        build(module, tmp_path)
    text = str(caught.value)
    assert said[:60] in text
    assert mend in text
    assert "insufficient" not in text


def test_the_parser_names_node_and_operator(tmp_path):
    new = SimpleNamespace(node_name=lambda: "node_7", node_operator=lambda: "Det", desc=lambda: "No importer\nfor Det")
    with pytest.raises(ModelError, match=r"parser refuses the model .node 'node_7', operator Det: No importer for"):
        build(FakeTensorRT(errors=[new]), tmp_path)
    old = SimpleNamespace(node=lambda: 3, desc=lambda: "unsupported")
    with pytest.raises(ModelError, match="node 3: unsupported"):
        build(FakeTensorRT(errors=[old]), tmp_path)


@pytest.mark.parametrize("answers", [{"cache": None}, {"cache_fits": False}])
def test_a_foreign_timing_cache(tmp_path, answers):
    options = EngineOptions(timing_cache=tmp_path / "cache")
    with pytest.raises(InputError, match=r"timing cache .* is damaged, or of another TensorRT or GPU .*: remove it"):
        build(FakeTensorRT(**answers), tmp_path, options)


def test_a_target_that_this_tensorrt_does_not_know(tmp_path):
    with pytest.raises(InputError, match=r"tensorrt 10.13.3.9 does not build for sm120: leave it out of --gpu"):
        build(FakeTensorRT(), tmp_path, targets=("sm120",), choose_targets=True)
    with pytest.raises(InputError, match="does not build for sm86"):
        build(FakeTensorRT(capability=False), tmp_path, targets=("sm86",), choose_targets=True)


def test_the_stand_in_has_the_real_modules_names():
    real = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'admth[rtx]'")
    fake = FakeTensorRT()
    for name in (
        "NetworkDefinitionCreationFlag",
        "MemoryPoolType",
        "BuilderFlag",
        "ProfilingVerbosity",
        "ComputeCapability",
    ):
        for member in vars(getattr(fake, name)):
            assert hasattr(getattr(real, name), member), f"{name}.{member}"
    for name in ("Builder", "OnnxParser", "IBuilderConfig", "IOptimizationProfile"):
        for member in vars(getattr(fake, name)):
            assert member.startswith("_") or hasattr(getattr(real, name), member), f"{name}.{member}"
    for name in ("progress_monitor", "builder_optimization_level", "profiling_verbosity", "num_compute_capabilities"):
        assert hasattr(real.IBuilderConfig, name)
    for name in ("phase_start", "step_complete", "phase_finish"):
        assert hasattr(real.IProgressMonitor, name)
    for name in ("node_name", "node_operator", "desc"):
        assert hasattr(real.ParserError, name)
