"""The doubles offer nothing that the real bindings do not: every class, attribute, parameter and enumeration value."""

from __future__ import annotations

import enum
import inspect
import re
from importlib import import_module, util
from types import FunctionType, ModuleType

import pytest
from _cuda_double import Machine, driver_module, pycuda_module
from _tensorrt_double import tensorrt_module

from admth_runtime.driver import ask_driver

# What the double's classes have beyond TensorRT's, for the tests themselves.
OF_THE_DOUBLE = {"what"}


def installed(name: str) -> ModuleType:
    try:
        found = util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is missing
        found = False
    if not found:
        pytest.skip(f"{name} is not installed")
    return import_module(name)


def parameters_of_real(method) -> list[set[str]]:
    """The parameters of every overload, from the text that the bindings carry: ``name: type = default``."""
    lines = re.findall(r"^\s*(?:\d+\. )?\w+\((.*)\) ?->", method.__doc__, flags=re.MULTILINE)
    overloads = [set(re.findall(r"(?:^|, )(\w+):", line)) for line in lines]
    assert overloads, f"{method} says nothing of its parameters"
    return [names - {"self"} for names in overloads]


def public(kind: type) -> dict[str, object]:
    return {name: value for name, value in vars(kind).items() if not name.startswith("_") and name not in OF_THE_DOUBLE}


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt_lean", "tensorrt_rtx"])
def test_tensorrt(name):
    real, double = installed(name), tensorrt_module(Machine(), name)
    checked = 0
    for class_name, kind in vars(double).items():
        if class_name.startswith("__"):
            continue
        counterpart = getattr(real, class_name)
        if issubclass(kind, enum.Enum):
            for member in kind:
                assert int(counterpart.__members__[member.name]) == member.value, (class_name, member)
                checked += 1
            continue
        for attribute, value in public(kind).items():
            assert hasattr(counterpart, attribute), f"{class_name}.{attribute}"
            if isinstance(value, FunctionType):
                wanted = set(inspect.signature(value).parameters) - {"self"}
                overloads = parameters_of_real(getattr(counterpart, attribute))
                assert any(wanted == names for names in overloads), (class_name, attribute, wanted, overloads)
            elif isinstance(value, property):
                assert not callable(getattr(counterpart, attribute)), f"{class_name}.{attribute} is a method"
            checked += 1
    assert checked >= 20


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt_lean", "tensorrt_rtx"])
def test_what_only_rtx_has(name):
    """The engine asks with ``hasattr`` for what only TensorRT-RTX has; the double must answer as the real one."""
    real, double = installed(name), tensorrt_module(Machine(), name)
    for owner, attribute in (("", "CudaGraphStrategy"), ("Runtime", "get_engine_validity")):
        answers = [hasattr(getattr(module, owner) if owner else module, attribute) for module in (real, double)]
        assert answers[0] == answers[1] == (name == "tensorrt_rtx"), attribute


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt_lean", "tensorrt_rtx"])
def test_the_logger_can_be_subclassed(name):
    """The real ILogger accepts a Python subclass whose ``log`` is called with a severity that has a name."""
    real = installed(name)
    from admth_runtime.engines.trt_logger import TensorRTMessages

    messages = TensorRTMessages(real)
    messages.logger.log(real.ILogger.Severity.WARNING, "something")
    messages.logger.log(real.ILogger.Severity.ERROR, "Version tag does not match\n")
    assert messages.reason() == "the engine was built by another version of TensorRT"
    messages.clear()
    assert messages.reason() == "TensorRT gives no reason"


def test_cuda_bindings():
    real, double = installed("cuda.bindings.driver"), driver_module(Machine())
    checked = 0
    for name, value in vars(double).items():
        if name.startswith("__"):
            continue
        counterpart = getattr(real, name)
        if isinstance(value, type):
            for member in value:
                assert int(counterpart.__members__[member.name]) == member.value, (name, member)
        else:
            assert list(inspect.signature(counterpart).parameters) == list(inspect.signature(value).parameters), name
        checked += 1
    assert checked >= 30


@pytest.mark.skipif(ask_driver().driver, reason="with a driver these calls would be carried out")
def test_cuda_bindings_take_what_they_are_given():
    """The real functions convert their arguments before they look for the driver: plain integers are accepted."""
    real = installed("cuda.bindings.driver")
    device, context, event = real.CUdevice(0), real.CUcontext(0), real.CUevent(0)
    graph, executable = real.CUgraph(0), real.CUgraphExec(0)
    major = real.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
    mode = real.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    address, host, size, stream = 4096, 8192, 16, 7
    calls = {
        "cuInit": (0,),
        "cuDeviceGetCount": (),
        "cuDeviceGet": (0,),
        "cuDeviceGetAttribute": (major, device),
        "cuDevicePrimaryCtxRetain": (device,),
        "cuDevicePrimaryCtxRelease": (device,),
        "cuCtxPushCurrent": (context,),
        "cuCtxPopCurrent": (),
        "cuMemAlloc": (size,),
        "cuMemFree": (address,),
        "cuMemHostAlloc": (size, 0),
        "cuMemFreeHost": (host,),
        "cuStreamCreate": (int(real.CUstream_flags.CU_STREAM_NON_BLOCKING),),
        "cuStreamDestroy": (stream,),
        "cuStreamSynchronize": (stream,),
        "cuStreamWaitEvent": (stream, event, 0),
        "cuEventCreate": (int(real.CUevent_flags.CU_EVENT_DISABLE_TIMING),),
        "cuEventRecord": (event, stream),
        "cuEventDestroy": (event,),
        "cuMemcpyHtoDAsync": (address, host, size, stream),
        "cuMemcpyDtoHAsync": (host, address, size, stream),
        "cuMemcpyDtoDAsync": (address, address, size, stream),
        "cuStreamBeginCapture": (stream, mode),
        "cuStreamEndCapture": (stream,),
        "cuGraphInstantiate": (graph, 0),
        "cuGraphDestroy": (graph,),
        "cuGraphLaunch": (executable, stream),
        "cuGraphExecDestroy": (executable,),
    }
    offered = {name for name, value in vars(driver_module(Machine())).items() if isinstance(value, FunctionType)}
    assert set(calls) == offered
    for name, arguments in calls.items():
        with pytest.raises(Exception, match=r"driver|libcuda") as caught:
            getattr(real, name)(*arguments)
        assert not isinstance(caught.value, TypeError), name
    with pytest.raises(TypeError):
        real.cuMemcpyHtoDAsync("address", host, size, stream)


def test_pycuda():
    real, double = installed("pycuda.driver"), pycuda_module(Machine())
    for name, value in vars(double).items():
        if name.startswith("__"):
            continue
        assert hasattr(real, name), name
        for attribute in public(value) if isinstance(value, type) else ():
            assert hasattr(getattr(real, name), attribute) or attribute == "handle", (name, attribute)


class TestTheDoubleItself:
    """A double that forgives would prove nothing."""

    @pytest.fixture
    def cuda(self):
        machine = Machine()
        module = driver_module(machine)
        module.cuCtxPushCurrent("primary 0")
        return machine, module

    def test_nothing_happens_before_a_stream_is_waited_for(self, cuda):
        machine, module = cuda
        _, device = module.cuMemAlloc(4)
        _, host = module.cuMemHostAlloc(4, 0)
        _, stream = module.cuStreamCreate(1)
        before = machine.download(device, 4, "uint8").tolist()
        machine.pinned[host][1][:] = bytes(len(machine.pinned[host][1]))
        assert module.cuMemcpyHtoDAsync(device, host, 4, stream) == (0,)
        assert machine.download(device, 4, "uint8").tolist() == before
        module.cuStreamSynchronize(stream)
        assert machine.download(device, 4, "uint8").tolist() == [0, 0, 0, 0]

    def test_a_copy_beyond_an_allocation_is_a_violation(self, cuda):
        machine, module = cuda
        _, device = module.cuMemAlloc(4)
        _, host = module.cuMemHostAlloc(8, 0)
        _, stream = module.cuStreamCreate(1)
        assert module.cuMemcpyHtoDAsync(device, host, 8, stream)[0].name == "CUDA_ERROR_ILLEGAL_ADDRESS"
        assert machine.violations

    def test_memory_that_is_freed_twice_or_in_use_is_a_violation(self, cuda):
        machine, module = cuda
        _, device = module.cuMemAlloc(4)
        _, host = module.cuMemHostAlloc(4, 0)
        _, stream = module.cuStreamCreate(1)
        module.cuMemcpyHtoDAsync(device, host, 4, stream)
        module.cuMemFree(device)
        assert machine.violations == ["device memory while work is queued"]
        assert module.cuMemFree(device)[0].name == "CUDA_ERROR_INVALID_VALUE"
        assert len(machine.violations) == 2

    def test_a_call_without_a_context_is_a_violation(self, cuda):
        machine, module = cuda
        module.cuCtxPopCurrent()
        assert module.cuMemAlloc(4)[0].name == "CUDA_ERROR_INVALID_CONTEXT"
        assert machine.violations
