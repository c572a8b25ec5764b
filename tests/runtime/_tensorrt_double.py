"""TensorRT's Python surface on the GPU of ``_cuda_double``: an "engine" is an ONNX model that ONNX Runtime executes.

Classes, methods and parameters are named as in the real bindings, which test_tensorrt_double.py checks.
"""

from __future__ import annotations

import ctypes
import enum
import gc
import json
import struct
import sys
import threading
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import numpy as np
import onnxruntime
from _cuda_double import ALIGNMENT, Machine, driver_module, pycuda_module
from _tiny_model import tiny_manifest, tiny_model

from admth_runtime.files import sha256_of_bytes
from admth_runtime.sidecar import BatchProfile, Sidecar, write_sidecar

VERSIONS = {"tensorrt": "10.13.3.9", "tensorrt_lean": "11.4.0.106", "tensorrt_rtx": "1.7.1.116"}


class DataType(enum.IntEnum):
    FLOAT = 0
    HALF = 1
    UINT8 = 5


class TensorIOMode(enum.IntEnum):
    NONE = 0
    INPUT = 1
    OUTPUT = 2


class EngineValidity(enum.IntEnum):
    VALID = 0
    SUBOPTIMAL = 1
    INVALID = 2


class EngineInvalidityDiagnostics(enum.IntEnum):
    VERSION_MISMATCH = 1
    UNSUPPORTED_CC = 2
    OLD_CUDA_DRIVER = 4


class CudaGraphStrategy(enum.IntEnum):
    DISABLED = 0
    WHOLE_GRAPH_CAPTURE = 1


class Severity(enum.IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2


def engine_bytes(flavour="rtx", version=None, profiles=((1, 4, 16),), model=None, **faults) -> bytes:
    """An engine of the double: the 64 bytes of a header as NVIDIA's engines have, facts, and an ONNX model."""
    version = version or VERSIONS["tensorrt" if flavour == "tensorrt" else "tensorrt_rtx"]
    header = bytearray(64)
    header[0:4] = b"ftrt" if flavour == "tensorrt" else b"vtrt"
    header[24:28] = bytes(int(part) % 256 for part in version.split("."))
    facts = json.dumps({"profiles": profiles, **faults}).encode()
    onnx = (model or tiny_model()).SerializeToString()
    return bytes(header) + struct.pack("<I", len(facts)) + facts + onnx


def sidecar_of(content: bytes, flavour="rtx", version=None, profiles=((1, 4, 16),), **changes) -> Sidecar:
    fields = {
        "manifest": tiny_manifest(precision="fp16", target="tensorrt"),
        "flavour": flavour,
        "tensorrt_version": version or VERSIONS["tensorrt" if flavour == "tensorrt" else "tensorrt_rtx"],
        "compute_capabilities": ("sm89",),
        "profiles": tuple(BatchProfile(*profile) for profile in profiles),
        "engine_sha256": sha256_of_bytes(content),
        "engine_bytes": len(content),
        "source_name": "model.onnx",
        "source_sha256": "cd" * 32,
        "source_bytes": 12345,
        "build_seconds": 1.5,
    }
    return Sidecar(**{**fields, **changes})


def save_engine(folder: Path, flavour="rtx", version=None, profiles=((1, 4, 16),), changes=None, **faults) -> Path:
    """Write an engine of the double and its sidecar."""
    content = engine_bytes(flavour, version, profiles, **faults)
    path = folder / f"model.fp16.{'plan' if flavour == 'tensorrt' else 'rtx'}"
    path.write_bytes(content)
    write_sidecar(path, replace(sidecar_of(content, flavour, version, profiles), **(changes or {})))
    return path


class Live:
    """Writes to the machine's log when it goes, as a destructor of TensorRT would run."""

    what = ""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def __del__(self) -> None:
        if not self._machine.contexts():
            self._machine.violations.append(f"{self.what} is destroyed with no context current")
        self._machine.log.append(self.what)


def tensorrt_module(machine: Machine, name: str, version: str | None = None) -> ModuleType:
    """The double of ``tensorrt``, ``tensorrt_lean`` or ``tensorrt_rtx``."""
    rtx = name == "tensorrt_rtx"
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    module.__version__ = version or VERSIONS[name]
    module.DataType, module.TensorIOMode = DataType, TensorIOMode

    class ILogger:
        def __init__(self):
            pass

    ILogger.Severity = Severity

    class IExecutionContext(Live):
        what = "context"

        def __init__(self, engine, strategy):
            super().__init__(machine)
            self._engine, self._strategy = engine, strategy
            self._profile, self._batch, self._addresses, self._state, self._user = None, None, {}, 0, None

        def set_optimization_profile_async(self, profile_index, stream_handle):
            machine.stream(stream_handle)
            self._profile, self._state = profile_index, self._state + 1
            return profile_index < len(self._engine._facts["profiles"])

        def set_input_shape(self, name, shape):
            least, _, most = self._engine._facts["profiles"][self._profile]
            wanted = tuple(self._engine._tensor("images").shape[1:])
            if name != "images" or tuple(shape[1:]) != wanted or not least <= shape[0] <= most:
                self._engine._logger.log(Severity.ERROR, f"setInputShape: {shape} does not satisfy the profile\n")
                return False
            self._batch, self._state = shape[0], self._state + 1
            return True

        def set_tensor_address(self, name, memory):
            if memory % ALIGNMENT:
                machine.violations.append(f"{name} is at {memory}, which is not aligned")
                return False
            self._addresses[name], self._state = memory, self._state + 1
            return True

        def execute_async_v3(self, stream_handle):
            engine, stream = self._engine, machine.stream(stream_handle)
            if stream.recording is not None and engine._facts.get("uncapturable"):
                engine._logger.log(Severity.ERROR, "enqueueV3: operation not permitted when stream is capturing\n")
                return False
            if engine._facts.get("fails"):
                engine._logger.log(Severity.ERROR, "enqueueV3: Cuda Runtime (out of memory)\n")
                return False
            if self._user not in (None, threading.get_ident()):
                machine.violations.append("two threads are in one execution context")
            self._user = threading.get_ident()
            state, batch, addresses = self._state, self._batch, dict(self._addresses)
            machine.calls["execute"] = machine.calls.get("execute", 0) + 1

            def operation() -> None:
                if self._state != state:
                    machine.violations.append("a graph is launched after its context was changed")
                engine._run(batch, addresses)
                self._user = None

            stream.put(operation)
            return True

    class ICudaEngine(Live):
        what = "engine"

        def __init__(self, logger, content):
            super().__init__(machine)
            self._logger = logger
            (size,) = struct.unpack_from("<I", content, 64)
            self._facts = json.loads(content[68 : 68 + size])
            self._session = onnxruntime.InferenceSession(content[68 + size :], providers=["CPUExecutionProvider"])
            self._tensors = [*self._session.get_inputs(), *self._session.get_outputs()]

        @property
        def num_io_tensors(self):
            return len(self._tensors)

        @property
        def num_optimization_profiles(self):
            return len(self._facts["profiles"])

        def get_tensor_name(self, index):
            return self._tensors[index].name

        def get_tensor_mode(self, name):
            return TensorIOMode.INPUT if name == "images" else TensorIOMode.OUTPUT

        def get_tensor_dtype(self, name):
            return {"tensor(uint8)": DataType.UINT8, "tensor(float)": DataType.FLOAT}[self._tensor(name).type]

        def get_tensor_shape(self, name):
            return (-1, *self._tensor(name).shape[1:])

        def get_tensor_profile_shape(self, name, profile_index):
            return [(batch, *self._tensor(name).shape[1:]) for batch in self._facts["profiles"][profile_index]]

        def create_runtime_config(self):
            return IRuntimeConfig()

        def create_execution_context(self, runtime_config=None):
            machine.need_context()
            if self._facts.get("no_context"):
                self._logger.log(Severity.ERROR, "createExecutionContext: OutOfMemory\n")
                return None
            strategy = None if runtime_config is None else runtime_config.cuda_graph_strategy
            machine.calls.setdefault("strategies", []).append(strategy)
            return IExecutionContext(self, strategy)

        def _tensor(self, name):
            return next(tensor for tensor in self._tensors if tensor.name == name)

        def _run(self, batch, addresses):
            machine.calls.setdefault("batches", []).append(batch)
            pixels = machine.download(addresses["images"], (batch, *self._tensor("images").shape[1:]), np.uint8)
            names = [tensor.name for tensor in self._session.get_outputs()]
            for name, value in zip(names, self._session.run(names, {"images": pixels}), strict=True):
                machine.check_range(addresses[name], value.nbytes, machine.allocations)
                ctypes.memmove(addresses[name], np.ascontiguousarray(value).ctypes.data, value.nbytes)

    class IRuntimeConfig:
        def __init__(self):
            self.cuda_graph_strategy = CudaGraphStrategy.DISABLED

    class Runtime(Live):
        what = "runtime"
        engine_host_code_allowed = False
        engine_header_size = 64

        def __init__(self, logger):
            super().__init__(machine)
            machine.need_context()
            self._logger = logger

        def deserialize_cuda_engine(self, serialized_engine):
            content = bytes(serialized_engine)
            machine.calls["deserialize"] = machine.calls.get("deserialize", 0) + 1
            machine.calls["host_code"] = self.engine_host_code_allowed
            (size,) = struct.unpack_from("<I", content, 64)
            if message := json.loads(content[68 : 68 + size]).get("refused"):
                self._logger.log(Severity.ERROR, f"{message}\n")
                return None
            return ICudaEngine(self._logger, content)

        def get_engine_validity(self, buffer):
            assert len(buffer) == 64
            if bytes(buffer[40:41]) != b"\0":
                return EngineValidity.INVALID, buffer[40]
            return EngineValidity.VALID, 0

    if rtx:
        module.CudaGraphStrategy = CudaGraphStrategy
        module.EngineValidity, module.EngineInvalidityDiagnostics = EngineValidity, EngineInvalidityDiagnostics
        module.IRuntimeConfig = IRuntimeConfig
    else:
        del Runtime.get_engine_validity, Runtime.engine_header_size, ICudaEngine.create_runtime_config
    module.ILogger, module.Runtime, module.ICudaEngine = ILogger, Runtime, ICudaEngine
    module.IExecutionContext = IExecutionContext
    return module


def install(monkeypatch, machine: Machine, *flavours: str, pycuda=False, versions=None) -> None:
    """Put the doubles where the real packages would be; those that are not named are not installed."""
    from admth_runtime import driver

    monkeypatch.setattr(driver, "ctypes", machine.ctypes())
    for name in ("cuda", "cuda.bindings"):
        package = ModuleType(name)
        package.__spec__ = ModuleSpec(name, None, is_package=True)
        monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver_module(machine))
    monkeypatch.setitem(sys.modules, "pycuda", ModuleType("pycuda") if pycuda else None)
    monkeypatch.setitem(sys.modules, "pycuda.driver", pycuda_module(machine) if pycuda else None)
    for name in VERSIONS:
        double = tensorrt_module(machine, name, (versions or {}).get(name)) if name in flavours else None
        monkeypatch.setitem(sys.modules, name, double)


def assert_clean(machine: Machine) -> None:
    """Nothing undefined was done, and nothing is left."""
    gc.collect()
    left = {
        "violations": machine.violations,
        "device memory": list(machine.allocations),
        "pinned memory": list(machine.pinned),
        "graphs": list(machine.graphs),
        "events": list(machine.events),
        "streams": [handle for handle in machine.streams if handle > 2],
        "primary context": machine.primary,
    }
    left = {name: value for name, value in left.items() if value}
    assert not left, left
