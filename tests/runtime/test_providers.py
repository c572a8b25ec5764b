"""ONNX Runtime's execution providers: what is asked for is had, or refused with the mend."""

from __future__ import annotations

import subprocess
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import numpy as np
import onnxruntime
import pytest
from _cuda_double import Machine

from admth_runtime import DeviceError, HashRuntime, InputError, ModelError, driver
from admth_runtime.engine import PROVIDERS, parse_device


@pytest.mark.parametrize(
    ("text", "parsed"), [("auto", ("auto", 0)), ("cpu", ("cpu", 0)), ("cuda", ("cuda", 0)), ("cuda:3", ("cuda", 3))]
)
def test_devices(text, parsed):
    assert parse_device(text) == parsed


@pytest.mark.parametrize("text", ["gpu", "cuda:", "cuda:-1", "cuda:1.5", "cpu:0", "auto:1", "", None, 0])
def test_devices_that_are_unknown(text):
    with pytest.raises(InputError, match="is unknown: use one of auto, cpu, cuda"):
        parse_device(text)


def test_the_cpu_by_name(tiny_path, pixels):
    with HashRuntime(tiny_path, provider="cpu", threads=1) as runtime:
        assert (runtime.device, runtime.engine.provider) == ("cpu", "cpu")
        assert runtime.encode(pixels).count == len(pixels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"provider": "openvino"}, "provider 'openvino' is unknown: use one of cpu, cuda, tensorrt, rtx"),
        ({"provider": "cuda", "device": "cpu"}, "provider 'cuda' does not run on device 'cpu'"),
        ({"provider": "cpu", "device": "cuda"}, "provider 'cpu' does not run on device 'cuda'"),
        ({"manifest": object()}, "is not a TensorRT engine and has its own manifest"),
    ],
)
def test_options_that_are_refused(tiny_path, options, message):
    with pytest.raises(InputError, match=message):
        HashRuntime(tiny_path, **options)


@pytest.fixture
def gpu_wheel(monkeypatch):
    """onnxruntime-gpu as far as its Python surface goes; sessions run on the CPU and say what was asked for."""
    asked = []
    names = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    real = onnxruntime.InferenceSession

    def session(path, options, providers, **more):
        asked.append(providers)
        inner = real(path, options, providers=["CPUExecutionProvider"], **more)
        started = [name if isinstance(name, str) else name[0] for name in providers]
        return SimpleNamespace(get_providers=lambda: started, run=inner.run)

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    return asked


def cuda(index="0"):
    return ("CUDAExecutionProvider", {"device_id": index, "use_tf32": "0"})


@pytest.mark.parametrize(
    ("options", "providers"),
    [
        ({"device": "auto"}, [cuda(), "CPUExecutionProvider"]),
        ({"device": "cuda"}, [cuda(), "CPUExecutionProvider"]),
        ({"device": "cpu"}, ["CPUExecutionProvider"]),
        ({"provider": "cuda"}, [cuda(), "CPUExecutionProvider"]),
        ({"device": "cuda:1"}, [cuda("1"), "CPUExecutionProvider"]),
        (
            {"provider": "tensorrt"},
            [("TensorrtExecutionProvider", {"device_id": "0"}), cuda(), "CPUExecutionProvider"],
        ),
        (
            {"provider": "tensorrt", "device": "cuda:1"},
            [("TensorrtExecutionProvider", {"device_id": "1"}), cuda("1"), "CPUExecutionProvider"],
        ),
    ],
)
def test_what_the_session_is_asked_for(tiny_path, gpu_wheel, pixels, options, providers):
    with HashRuntime(tiny_path, threads=1, **options) as runtime:
        assert gpu_wheel == [providers]
        assert runtime.device == ("cpu" if len(providers) == 1 else "cuda")
        assert runtime.engine.provider in PROVIDERS
        assert runtime.encode(pixels).count == len(pixels)


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="has a CUDA engine")
def test_a_provider_that_is_not_in_the_wheel(tiny_path, provider):
    with pytest.raises(DeviceError, match=rf"provider '{provider}' cannot be had: .*pip install 'admth\[gpu\]'"):
        HashRuntime(tiny_path, provider=provider)


def test_a_named_provider_never_falls_back(tiny_path, gpu_wheel, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("CUDA failure 35: CUDA driver version is insufficient")

    monkeypatch.setattr(onnxruntime, "InferenceSession", fail)
    for options in ({"provider": "tensorrt"}, {"provider": "cuda"}, {"device": "cuda"}):
        with pytest.raises(DeviceError, match="cannot be had: CUDA failure 35"):
            HashRuntime(tiny_path, **options)


class TestRtx:
    """NVIDIA's plugin for TensorRT-RTX."""

    @pytest.fixture
    def plugin(self, monkeypatch):
        machine, registered = Machine(), []
        monkeypatch.setattr(driver, "ctypes", machine.ctypes())
        module = ModuleType("onnxruntime_ep_nv_tensorrt_rtx")
        module.__spec__ = ModuleSpec(module.__name__, None)
        module.get_ep_name = lambda: "NvTensorRTRTXExecutionProvider"
        module.get_library_path = lambda: "/plugin.so"
        monkeypatch.setitem(sys.modules, module.__name__, module)
        devices = [SimpleNamespace(ep_name="CPUExecutionProvider")]

        def register(name, path):
            assert not registered, "a plugin is registered once a process"
            registered.append((name, path))
            devices.extend(SimpleNamespace(ep_name=name, number=number) for number in range(len(machine.gpus)))

        monkeypatch.setattr(onnxruntime, "register_execution_provider_library", register)
        monkeypatch.setattr(onnxruntime, "get_ep_devices", lambda: devices)
        return SimpleNamespace(machine=machine, registered=registered, module=module)

    @pytest.fixture
    def sessions(self, monkeypatch):
        chosen, real, real_options = [], onnxruntime.InferenceSession, onnxruntime.SessionOptions

        class Options(real_options):
            def add_provider_for_devices(self, devices, options):
                chosen.append([device.number for device in devices])

        def session(path, options, **more):
            inner = real(path, options, providers=["CPUExecutionProvider"], **more)
            return SimpleNamespace(
                get_providers=lambda: ["NvTensorRTRTXExecutionProvider", "CPUExecutionProvider"], run=inner.run
            )

        monkeypatch.setattr(onnxruntime, "SessionOptions", Options)
        monkeypatch.setattr(onnxruntime, "InferenceSession", session)
        return chosen

    def test_it_is_registered_once_and_its_gpu_chosen(self, plugin, sessions, tiny_path, pixels):
        plugin.machine.gpus = [("a", 8, 9), ("b", 8, 9)]
        for device in ("auto", "cuda:1"):
            with HashRuntime(tiny_path, provider="rtx", device=device, threads=1) as runtime:
                assert (runtime.device, runtime.engine.provider) == ("cuda", "rtx")
                assert runtime.encode(pixels).count == len(pixels)
        assert plugin.registered == [("NvTensorRTRTXExecutionProvider", "/plugin.so")]
        assert sessions == [[0], [1]]

    def test_no_rtx_gpu(self, plugin, tiny_path):
        with pytest.raises(DeviceError, match="cannot be had on GPU 1: the plugin finds 1 RTX GPUs"):
            HashRuntime(tiny_path, provider="rtx", device="cuda:1")

    def test_no_driver(self, plugin, tiny_path):
        plugin.machine.start_code = 100
        with pytest.raises(DeviceError, match=r"provider 'rtx' needs an NVIDIA GPU: .*CUDA error 100"):
            HashRuntime(tiny_path, provider="rtx")
        assert plugin.registered == []

    def test_not_installed(self, tiny_path, monkeypatch):
        monkeypatch.setattr("admth_runtime.engine.util.find_spec", lambda name: None)
        with pytest.raises(DeviceError, match="pip install onnxruntime-ep-nv-tensorrt-rtx"):
            HashRuntime(tiny_path, provider="rtx")

    def test_an_onnxruntime_without_plugins(self, plugin, tiny_path, monkeypatch):
        monkeypatch.delattr(onnxruntime, "register_execution_provider_library")
        with pytest.raises(DeviceError, match="takes no plugins; run  pip install -U onnxruntime"):
            HashRuntime(tiny_path, provider="rtx")

    def test_a_plugin_that_does_not_load(self, plugin, tiny_path, monkeypatch):
        def fail(*_):
            raise RuntimeError("libcudart.so.13: cannot open shared object file")

        monkeypatch.setattr(onnxruntime, "register_execution_provider_library", fail)
        with pytest.raises(DeviceError, match=r"provider 'rtx' cannot be had: libcudart\.so\.13"):
            HashRuntime(tiny_path, provider="rtx")

    def test_the_surface_is_onnxruntimes_own(self):
        """The names that the plugin's session needs are in the onnxruntime that is installed here."""
        for name in ("register_execution_provider_library", "get_ep_devices"):
            assert hasattr(onnxruntime, name)
        assert hasattr(onnxruntime.SessionOptions, "add_provider_for_devices")
        assert all(hasattr(device, "ep_name") for device in onnxruntime.get_ep_devices())


def test_a_broken_model_is_still_the_models_fault(tmp_path, gpu_wheel, monkeypatch, tiny_path):
    def fail(*_, **__):
        raise RuntimeError("node Foo has no kernel")

    monkeypatch.setattr(onnxruntime, "InferenceSession", fail)
    with pytest.raises(ModelError, match="refuses the model"):
        HashRuntime(tiny_path, provider="cuda")


def test_the_command_line(tiny_path):
    done = subprocess.run(
        [sys.executable, "-m", "admth_runtime", "bench", tiny_path, "--provider", "tpu"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.strip() == "error: provider 'tpu' is unknown: use one of cpu, cuda, tensorrt, rtx"


def test_codes_do_not_depend_on_how_the_cpu_is_named(tiny_path, pixels):
    codes = []
    for options in ({"device": "cpu"}, {"provider": "cpu"}, {"provider": "cpu", "device": "auto"}):
        with HashRuntime(tiny_path, threads=1, **options) as runtime:
            codes.append(runtime.encode(pixels))
    assert all(np.array_equal(codes[0][length], other[length]) for other in codes[1:] for length in other)
