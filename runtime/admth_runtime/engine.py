"""Inference engines behind one protocol: ONNX Runtime on a CPU or an NVIDIA GPU, and TensorRT.

An engine takes the deployed graph's input and returns all its outputs; everything above it is the same for every
engine. Engines are imported when one is opened, since importing them is most of a cold start.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from importlib import import_module, util
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from admth_runtime.allocator import return_freed_memory
from admth_runtime.cpu import usable_cores
from admth_runtime.engine_kind import is_engine
from admth_runtime.errors import DeviceError, InputError, ModelError, require
from admth_runtime.manifest import INPUT_NAME, Manifest, output_names
from admth_runtime.model import ModelFile, read_model

if TYPE_CHECKING:
    from admth_runtime.engine_file import EngineFile
    from admth_runtime.engines.device_arrays import DeviceCodes

__all__ = [
    "CUDA_LAYERS",
    "DEVICES",
    "PROVIDERS",
    "DeviceEngine",
    "Engine",
    "EngineOptions",
    "OnnxRuntimeEngine",
    "is_on_gpu",
    "open_engine",
    "parse_device",
]

DEVICES = ("auto", "cpu", "cuda")
"""Kinds of device; ``"cuda:1"`` is the second GPU."""

PROVIDERS = ("cpu", "cuda", "tensorrt", "rtx")
"""Execution providers of ONNX Runtime that may be asked for by name."""

_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "rtx": "NvTensorRTRTXExecutionProvider",
}
_RTX_PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"
_GET_GPU = "pip uninstall onnxruntime  and then  pip install 'admth[gpu]'"
_ERRORS_ONLY = 3

CUDA_LAYERS = ("bindings", "pycuda")
"""Ways to CUDA that a TensorRT engine may take; see :mod:`admth_runtime.engines.cuda`."""

# It rounds float biases to integers of the input's scale times the weight's. That is not what the model says, and in
# FP16 that product is often zero: half of the bits of an INT8 model with an FP16 rest were wrong in onnxruntime 1.32.
_DISABLED_OPTIMIZERS = ["WeightBiasQuantization"]

# "/src/model.cc:256 onnxruntime::Model::Model(onnx::ModelProto&&, ...) " before what an exception says
_SOURCE_LOCATION = re.compile(r"^\S+\.(?:cc|cpp|h):\d+ .*?\((?:[^()]|\([^()]*\))*\)(?: const)?(?: \[with .*?\])? ")

_log = logging.getLogger("admth_runtime")


@dataclass(frozen=True)
class EngineOptions:
    """How a model is to be run; :class:`admth_runtime.runtime.HashRuntime` describes each field.

    Raises:
        InputError: a value is unknown or out of range.
    """

    device: str = "auto"
    provider: str | None = None
    threads: int | None = None
    cuda: str = "bindings"
    concurrency: int = 2
    cuda_graphs: bool = True
    trust_engine: bool = False
    manifest: Manifest | None = None

    def __post_init__(self) -> None:
        kind, _ = parse_device(self.device)
        if self.provider is not None and self.provider not in PROVIDERS:
            raise InputError(f"provider {self.provider!r} is unknown: use one of {', '.join(PROVIDERS)}")
        if self.provider is not None and kind != "auto" and (kind == "cpu") != (self.provider == "cpu"):
            raise InputError(
                f"provider {self.provider!r} does not run on device {self.device!r}: leave one of them out"
            )
        if self.cuda not in CUDA_LAYERS:
            raise InputError(f"cuda {self.cuda!r} is unknown: use one of {', '.join(CUDA_LAYERS)}")
        for name in ("threads", "concurrency"):
            value = getattr(self, name)
            if not (value is None and name == "threads") and (
                isinstance(value, bool) or not isinstance(value, int) or value < 1
            ):
                least = "1 or more, or None for every core" if name == "threads" else "1 or more"
                raise InputError(f"{name} {value!r} is not a positive integer: pass {least}")


class Engine(Protocol):
    """A loaded model on a device. ``run`` may be called from several threads at once."""

    @property
    def name(self) -> str:
        """The inference software, such as ``"onnxruntime"``."""

    @property
    def version(self) -> str:
        """Its version."""

    @property
    def device(self) -> str:
        """Where it runs: ``"cpu"`` or ``"cuda"``."""

    @property
    def threads(self) -> int:
        """Threads that one call uses on the CPU."""

    def run(self, images: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """Run C-contiguous uint8 ``[batch, H, W, 3]`` and return every output by name.

        Raises:
            DeviceError: the engine failed, for example for want of memory.
        """

    def close(self) -> None:
        """Free the model's memory once the calls under way have returned."""


@runtime_checkable
class DeviceEngine(Engine, Protocol):
    """An engine that reads pixels on the GPU where they are, and can leave its outputs there."""

    def run_on_device(self, images: Any) -> DeviceCodes:
        """Run uint8 ``[n, H, W, 3]`` from the GPU or the computer's memory, and leave codes and logits on the GPU.

        Raises:
            InputError: another dtype, shape, layout or GPU.
            DeviceError: the engine failed.
        """


class OnnxRuntimeEngine:
    """ONNX Runtime as an :class:`Engine`.

    Sequential execution, one inter-operator thread, and no spinning, so that waiting threads leave the processor to
    image decoding. Denormals are not flushed to zero: ONNX Runtime does that by changing the floating-point mode of
    the thread that creates the session, for good, and with it the arithmetic of the program around us.

    Args:
        path: an ONNX file that :func:`admth_runtime.onnx_file.read_onnx` has accepted.
        output_names: the outputs to return.
        options: of these, ``device``, ``threads`` and ``provider`` count here. A named provider is used or refused;
            TensorRT's leave operators that they do not have to CUDA and the CPU.

    Raises:
        MissingExtraError: ONNX Runtime is not installed.
        DeviceError: the device or the provider cannot be had.
        ModelError: ONNX Runtime refuses the model.
    """

    name = "onnxruntime"

    def __init__(self, path: Path, output_names: tuple[str, ...], options: EngineOptions) -> None:
        kind, self._index = parse_device(options.device)
        provider = options.provider
        self._ort: Any = require("onnxruntime", extra="cpu", purpose="running a model")
        self.version: str = self._ort.__version__
        self.threads = options.threads or usable_cores()
        self._output_names = list(output_names)
        if provider is not None:
            self._session, self.provider = self._session_on(path, provider, f"provider {provider!r}"), provider
        else:
            self._session, self.provider = self._open(path, kind)
        self.device = "cpu" if self.provider == "cpu" else "cuda"
        return_freed_memory()

    def run(self, images: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """Run a batch; see :meth:`Engine.run`."""
        session = self._session
        if session is None:
            raise InputError("this engine is closed: open the model again")
        try:
            outputs = session.run(self._output_names, {INPUT_NAME: images})
        except Exception as error:  # onnxruntime's errors share no base class but Exception
            raise DeviceError(
                f"onnxruntime {self.version} failed on a batch of {len(images)} ({_first_line(error)}): "
                "try a smaller batch size, or device='cpu'"
            ) from error
        return dict(zip(self._output_names, outputs, strict=True))

    def close(self) -> None:
        """Let the session go; a call under way in another thread still ends well."""
        self._session = None

    def _open(self, path: Path, device: str) -> tuple[Any, str]:
        """Open the session that a device asks for; return it with the provider that it runs on."""
        if device != "cpu" and (device == "cuda" or _PROVIDERS["cuda"] in self._ort.get_available_providers()):
            try:
                return self._session_on(path, "cuda", "device 'cuda'"), "cuda"
            except DeviceError as error:
                if device == "cuda":
                    raise
                _log.warning("%s; running on the CPU instead (pass device='cpu' to say so)", error)
        return self._session_on(path, "cpu", "device 'cpu'"), "cpu"

    def _session_on(self, path: Path, provider: str, wish: str) -> Any:
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.execution_mode = self._ort.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = _ERRORS_ONLY
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        providers = self._providers(provider, options, wish)
        try:
            session = self._ort.InferenceSession(
                str(path), options, enable_fallback=0, disabled_optimizers=_DISABLED_OPTIMIZERS, **providers
            )
        except Exception as error:  # see run
            reason = _first_line(error)
            if provider != "cpu" and re.search("CUDA|TensorRT|NvTensorRTRTX", str(error)):
                raise DeviceError(f"{wish} cannot be had: {reason}") from error
            raise ModelError(
                f"{path}: onnxruntime {self.version} refuses the model ({reason}): export it again, "
                "or run  pip install -U onnxruntime  when it is newer than this engine"
            ) from error
        # A provider that fails to start is left out with no more than a printed warning.
        if _PROVIDERS[provider] not in session.get_providers():
            raise DeviceError(
                f"{wish} cannot be had: onnxruntime {self.version} started only "
                f"{', '.join(session.get_providers())}; run  admth-run doctor"
            )
        return session

    def _providers(self, provider: str, options: Any, wish: str) -> dict[str, Any]:
        """Return the session's ``providers`` argument, or put a plugin's device into the options."""
        if provider == "rtx":
            options.add_provider_for_devices([self._rtx_device(wish)], {})
            return {}
        available = self._ort.get_available_providers()
        if _PROVIDERS[provider] not in available:
            raise DeviceError(
                f"{wish} cannot be had: onnxruntime {self.version} has {', '.join(available)}; run  {_GET_GPU}"
                ", or pass device='cpu'"
            )
        order = {"cpu": ["cpu"], "cuda": ["cuda", "cpu"], "tensorrt": ["tensorrt", "cuda", "cpu"]}[provider]
        # Without TF32, which rounds the inputs of FP32 layers to 10 bits and costs sign parity.
        chosen: dict[str, Any] = {
            "cpu": _PROVIDERS["cpu"],
            "cuda": (_PROVIDERS["cuda"], {"device_id": str(self._index), "use_tf32": "0"}),
            "tensorrt": (_PROVIDERS["tensorrt"], {"device_id": str(self._index)}),
        }
        return {"providers": [chosen[each] for each in order if _PROVIDERS[each] in available]}

    def _rtx_device(self, wish: str) -> Any:
        """Register NVIDIA's plugin, once a process, and return the GPU that it offers."""
        from admth_runtime.engines.cuda import check_driver

        if util.find_spec(_RTX_PLUGIN) is None:
            raise DeviceError(
                f"{wish} cannot be had: it is a plugin of onnxruntime 1.24 or newer; run  "
                f"pip install {_RTX_PLUGIN.replace('_', '-')}"
            )
        if not hasattr(self._ort, "register_execution_provider_library"):
            raise DeviceError(
                f"{wish} cannot be had: onnxruntime {self.version} takes no plugins; run  pip install -U onnxruntime"
            )
        check_driver(needed_by=wish)  # before the plugin loads CUDA's libraries
        try:
            plugin: Any = import_module(_RTX_PLUGIN)
            name = plugin.get_ep_name()
            if not any(device.ep_name == name for device in self._ort.get_ep_devices()):
                self._ort.register_execution_provider_library(name, plugin.get_library_path())
            devices = [device for device in self._ort.get_ep_devices() if device.ep_name == name]
        except Exception as error:  # see run
            raise DeviceError(f"{wish} cannot be had: {_first_line(error)}") from error
        if self._index >= len(devices):
            raise DeviceError(
                f"{wish} cannot be had on GPU {self._index}: the plugin finds {len(devices)} RTX GPUs; run  "
                "admth-run doctor"
            )
        return devices[self._index]


def is_on_gpu(pixels: Any) -> bool:
    """Tell whether an object is an array on an NVIDIA GPU; NumPy arrays, paths and pictures are not."""
    if isinstance(pixels, np.ndarray) or not (
        hasattr(pixels, "__dlpack_device__") or hasattr(pixels, "__cuda_array_interface__")
    ):
        return False
    from admth_runtime.engines.device_arrays import is_device_array

    return is_device_array(pixels)


def parse_device(device: str) -> tuple[str, int]:
    """Read a device's name: its kind, one of ``DEVICES``, and the number of the GPU.

    Raises:
        InputError: the name is unknown.
    """
    kind, colon, number = device.partition(":") if isinstance(device, str) else ("", "", "")
    if kind not in DEVICES or (colon and (kind != "cuda" or not number.isdecimal())):
        raise InputError(f"device {device!r} is unknown: use one of {', '.join(DEVICES)}, or cuda:1 for the second GPU")
    return kind, int(number or 0)


def open_engine(path: str | Path, options: EngineOptions | None = None) -> tuple[ModelFile | EngineFile, Engine]:
    """Check a model's file and open it with the engine that it needs: ONNX Runtime, or the TensorRT of its flavour.

    Returns:
        What the file says of itself, and the engine.

    Raises:
        AdmthError: as :func:`admth_runtime.model.read_model` and the engine's class say.
    """
    path, options = Path(path), options or EngineOptions()
    if is_engine(path):
        return _open_tensorrt(path, options)
    if options.manifest is not None:
        raise InputError(f"{path} is not a TensorRT engine and has its own manifest: leave manifest out")
    model = read_model(path)
    names = output_names(model.manifest.code_lengths)
    return model, OnnxRuntimeEngine(path, names, options)


def _open_tensorrt(path: Path, options: EngineOptions) -> tuple[EngineFile, Engine]:
    from admth_runtime.engines.tensorrt import TensorRTEngine

    kind, index = parse_device(options.device)
    if kind == "cpu":
        raise InputError(
            f"{path} is a TensorRT engine, which runs on an NVIDIA GPU only: pass the ONNX model for a CPU"
        )
    if options.provider is not None:
        raise InputError(
            f"{path} is a TensorRT engine and provider {options.provider!r} is one of ONNX Runtime's: leave it out, "
            "or pass the ONNX model"
        )
    engine = TensorRTEngine(
        path,
        index=index,
        cuda=options.cuda,
        concurrency=options.concurrency,
        cuda_graphs=options.cuda_graphs,
        trust_engine=options.trust_engine,
        manifest=options.manifest,
    )
    return engine.file, engine


def _first_line(error: Exception) -> str:
    """Return the message of an onnxruntime error without its code, the model's path, and source locations."""
    text = str(error).strip().splitlines()
    line = text[0] if text else type(error).__name__
    if line.startswith("[ONNXRuntimeError]"):
        line = line.split(" : ", 3)[-1]
    line = re.sub(r"^Load model from .* failed:", "", line)
    return _SOURCE_LOCATION.sub("", line).strip()[:300]
