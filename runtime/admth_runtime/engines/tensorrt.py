"""TensorRT, its lean runtime and TensorRT-RTX as an :class:`~admth_runtime.engine.Engine`.

Nothing of an engine is executed before these have passed, in this order: the file against its sidecar; the NVIDIA
driver; the installed TensorRT's flavour and version; the GPU's compute capability; TensorRT-RTX's own check of the
header. Then the engine's inputs, outputs and profiles are held against the manifest and the sidecar.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from admth_runtime.engine_file import EngineFile, load_engine
from admth_runtime.engines.cuda import CudaDevice, check_driver, open_cuda
from admth_runtime.engines.device_arrays import (
    DeviceArray,
    DeviceBlock,
    DeviceCodes,
    DeviceInput,
    import_array,
    is_device_array,
)
from admth_runtime.engines.flavours import TensorRTModule, choose_module, cuda_major_of, find_distribution
from admth_runtime.engines.lane import Lane, LaneSpec, TensorSpec
from admth_runtime.engines.pool import Pool
from admth_runtime.engines.trt_logger import TensorRTMessages, messages_of
from admth_runtime.errors import DeviceError, InputError, ModelError
from admth_runtime.manifest import INPUT_NAME, Manifest, output_names
from admth_runtime.sidecar import BatchProfile

__all__ = ["TensorRTEngine"]

_ALIGNMENT = 256  # bytes between outputs that share a block
_EXIT_SECONDS = 5.0  # how long the interpreter's exit waits for a call that a daemon thread is in


class TensorRTEngine:
    """A TensorRT engine on one GPU; safe to share between threads.

    Args:
        path: the engine.
        index: which GPU, from 0.
        cuda: ``"bindings"`` or ``"pycuda"``; see :mod:`admth_runtime.engines.cuda`.
        concurrency: how many calls may run at once; each takes a context and buffers of its own.
        cuda_graphs: capture a CUDA graph of a batch size that comes again, which saves launching its kernels one by
            one.
        trust_engine: accept an engine that has no sidecar.
        manifest: the model's manifest, for such an engine.

    Raises:
        ModelError: the engine is missing, broken, altered, of another sidecar, or not what its manifest says.
        ManifestError: its sidecar is missing, malformed or edited.
        DeviceError: no driver, too old a driver, another GPU, another version of TensorRT, or no memory.
        MissingExtraError: TensorRT or the CUDA layer is not installed.
        InputError: there is no such GPU, or a manifest was given or is missing against the rules above.
    """

    device = "cuda"
    threads = 1

    def __init__(
        self,
        path: Path,
        *,
        index: int = 0,
        cuda: str = "bindings",
        concurrency: int = 2,
        cuda_graphs: bool = True,
        trust_engine: bool = False,
        manifest: Manifest | None = None,
    ) -> None:
        self.file, content = load_engine(path, trust_engine=trust_engine, manifest=manifest)
        check_driver(needed_by=self.file.path.name)
        self._module = choose_module(self.file)
        distribution = find_distribution(self._module.name)
        check_driver(
            cuda_major=cuda_major_of(self._module.name),
            needed_by=distribution[0] if distribution else self._module.name,
        )
        self._cuda = open_cuda(cuda, index)
        _check_gpu(self.file, self._cuda.compute_capability)
        self._process = os.getpid()
        with self._cuda.active():
            loaded = _Loaded(self._cuda, self._module, self.file, content, cuda_graphs=cuda_graphs)
            self._spec = loaded.spec
            self._pool: Pool[Lane] = Pool(loaded.create_lane, concurrency)
            # It must not hold this object, so that one which is forgotten is freed.
            self._release = weakref.finalize(self, _release, self._cuda, self._pool, loaded, self._process)
            # Exit handlers run in reverse: this one before that of an application which made its context earlier.
            atexit.register(self._release)
            try:
                self._pool.fill()
            except BaseException:
                self._release()
                raise

    @property
    def name(self) -> str:
        """``"tensorrt"``, ``"tensorrt_lean"`` or ``"tensorrt_rtx"``."""
        return self._module.name

    @property
    def version(self) -> str:
        """Version of the TensorRT that runs the engine."""
        return self._module.version

    @property
    def max_batch(self) -> int:
        """The most images that one execution takes."""
        return self._spec.max_batch

    def run(self, images: Any) -> dict[str, NDArray[Any]]:
        """Run images, in parts where they are more than :attr:`max_batch`; see :meth:`Engine.run`.

        Args:
            images: C-contiguous uint8 ``[n, H, W, 3]``, in the computer's memory or, without a copy, on the GPU.

        Raises:
            InputError: the engine is closed, or an array on the GPU is of another dtype, shape, layout or GPU.
            DeviceError: TensorRT or CUDA failed.
        """
        self._check_call()
        with self._cuda.active(), self._pool.lease() as lane:
            parts = [lane.run(part) for part, _ in self._parts(self._taken(images, lane))]
        if len(parts) == 1:
            return parts[0]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def run_on_device(self, images: Any) -> DeviceCodes:
        """Run images and leave codes and logits on the GPU; see :meth:`run`."""
        self._check_call()
        with self._cuda.active(), self._pool.lease() as lane:
            taken = self._taken(images, lane)
            arrays = self._allocate(taken.count if isinstance(taken, DeviceInput) else len(taken))
            for part, start in self._parts(taken):
                lane.run_to_device(
                    part,
                    {
                        tensor.name: arrays[tensor.name].address + tensor.bytes_of(start)
                        for tensor in self._spec.outputs
                    },
                )
        lengths = self.file.manifest.code_lengths
        return DeviceCodes(
            {length: arrays[f"code_{length}"] for length in lengths},
            {length: arrays[f"logits_{length}"] for length in lengths},
        )

    def close(self) -> None:
        """Free everything once the calls under way have returned; what was left on the GPU stays until its own end."""
        self._release()
        atexit.unregister(self._release)

    def _taken(self, images: Any, lane: Lane) -> NDArray[np.uint8] | DeviceInput:
        """Take an array on the GPU as it is; what is in the computer's memory was checked above us."""
        if is_device_array(images):
            return import_array(images, self._spec.input.shape, self._cuda, lane.stream)
        array: NDArray[np.uint8] = images
        return array

    def _parts(self, images: NDArray[np.uint8] | DeviceInput) -> Iterator[tuple[NDArray[np.uint8] | DeviceInput, int]]:
        """Yield parts that one execution takes, each with the place of its first image."""
        most, row = self.max_batch, self._spec.input.bytes_of(1)
        if not isinstance(images, DeviceInput):
            for start in range(0, len(images), most):
                yield images[start : start + most], start
            return
        for start in range(0, images.count, most):
            count = min(most, images.count - start)
            yield replace(images, address=images.address + start * row, count=count), start

    def _allocate(self, count: int) -> dict[str, DeviceArray]:
        places, size = {}, 0
        for tensor in self._spec.outputs:
            places[tensor.name] = size
            size += -(-tensor.bytes_of(count) // _ALIGNMENT) * _ALIGNMENT
        block = DeviceBlock(self._cuda, size)
        return {
            tensor.name: DeviceArray((count, *tensor.shape), tensor.dtype, block.address + places[tensor.name], block)
            for tensor in self._spec.outputs
        }

    def _check_call(self) -> None:
        if not self._release.alive:
            raise InputError("this engine is closed: open the model again")
        if os.getpid() != self._process:
            raise DeviceError(
                "this engine was opened before the process was forked, which CUDA does not survive: open it in the "
                "child, or start children with multiprocessing's method 'spawn'"
            )


class _Loaded:
    """Runtime and engine of TensorRT, and what makes execution contexts of them."""

    def __init__(
        self, device: CudaDevice, module: TensorRTModule, file: EngineFile, content: bytes, *, cuda_graphs: bool
    ) -> None:
        self._device, self._label = device, file.path.name
        self._trt = module.bindings
        self._messages: TensorRTMessages = messages_of(self._trt)
        self._messages.clear()
        self._engine: Any = None
        self._runtime: Any = self._trt.Runtime(self._messages.logger)
        # TensorRT-RTX captures by itself, if it is told so.
        self._own_graphs = cuda_graphs and hasattr(self._trt, "CudaGraphStrategy")
        try:
            self._load(module, file, content)
            tensors, profiles = _tensors_of(self._engine), _profiles_of(self._engine)
            self.spec = _checked_spec(tensors, profiles, file, graphs=cuda_graphs and not self._own_graphs)
        except BaseException:
            self.release()  # now, while the context is active, and not when the error is forgotten
            raise

    def _load(self, module: TensorRTModule, file: EngineFile, content: bytes) -> None:
        if self._runtime is None:
            raise DeviceError(
                f"{module.name} {module.version} does not start ({self._messages.reason()}): run  admth-run doctor"
            )
        if file.sidecar is not None and file.sidecar.version_compatible:
            # Such a plan brings the lean runtime along as code; the sidecar vouches for it.
            self._runtime.engine_host_code_allowed = True
        if hasattr(self._runtime, "get_engine_validity"):
            header = content[: self._runtime.engine_header_size]
            validity, reasons = self._runtime.get_engine_validity(header)
            _check_validity(self._trt, validity, reasons, file)
        self._engine = self._runtime.deserialize_cuda_engine(content)
        if self._engine is None:
            raise ModelError(
                f"{file.path} was refused by {module.name} {module.version} ({self._messages.reason()}): run  "
                f"{_rebuild(file)}"
            )

    def create_lane(self) -> Lane:
        """Make an execution context with its stream and buffers; the device is active."""
        return Lane(self._device, self._new_context(), self.spec, self._messages)

    def _new_context(self) -> Any:
        self._messages.clear()
        if self._own_graphs:
            config = self._engine.create_runtime_config()
            config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            context = self._engine.create_execution_context(config)
        else:
            context = self._engine.create_execution_context()
        if context is None:
            raise DeviceError(
                f"{self._label}: no execution context could be made ({self._messages.reason()}): free GPU memory, or "
                "pass a smaller concurrency"
            )
        return context

    def release(self) -> None:
        """Free the engine, then the runtime."""
        self._engine = None
        self._runtime = None


def _release(device: CudaDevice, pool: Pool[Lane], loaded: _Loaded, process: int) -> None:
    """Free contexts, engine, runtime, buffers and streams, in that order, which TensorRT needs."""
    if os.getpid() != process:
        return  # a forked child: CUDA is not there, and all belongs to the parent
    exiting = not threading.main_thread().is_alive()  # the main thread ends before exit handlers run
    lanes = pool.close(_EXIT_SECONDS if exiting else None)
    # After a sticky CUDA error nothing can be freed any more, and nothing else can be done about it.
    with suppress(DeviceError), device.active():
        for lane in lanes:
            lane.release_context()
        loaded.release()
        for lane in lanes:
            with suppress(DeviceError):
                lane.release_memory()


def _check_gpu(file: EngineFile, found: str) -> None:
    sidecar = file.sidecar
    if sidecar is not None and found not in sidecar.compute_capabilities:
        wanted = ", ".join(sidecar.compute_capabilities)
        gpu = f" --gpu {found}" if sidecar.flavour == "rtx" else ""
        raise DeviceError(
            f"{file.path} was built for {wanted} and this GPU is {found}: build it for this one with  "
            f"{sidecar.rebuild_command}{gpu}"
        )


def _check_validity(trt: Any, validity: Any, reasons: int, file: EngineFile) -> None:
    """Read TensorRT-RTX's own judgement of an engine by its header."""
    if validity == trt.EngineValidity.INVALID:
        names = [
            reason.name.lower().replace("_", " ")
            for reason in trt.EngineInvalidityDiagnostics.__members__.values()
            if int(reasons) & int(reason)
        ]
        raise ModelError(
            f"{file.path}, built by {file.header}, is refused by this TensorRT-RTX or GPU "
            f"({', '.join(names) or 'no reason given'}): run  {_rebuild(file)}"
        )


# What follows takes facts and not TensorRT's objects: an error's traceback would keep those beyond their CUDA context.


def _checked_spec(
    found: Mapping[str, tuple[str, str, tuple[int, ...]]],
    profiles: tuple[BatchProfile, ...],
    file: EngineFile,
    *,
    graphs: bool,
) -> LaneSpec:
    """Hold the engine's tensors and profiles against the manifest and the sidecar."""
    manifest = file.manifest
    wanted = {INPUT_NAME: TensorSpec(INPUT_NAME, np.dtype(np.uint8), manifest.preprocessing.shape)}
    for name in output_names(manifest.code_lengths):
        kind, _, length = name.rpartition("_")
        dtype, width = (np.uint8, int(length) // 8) if kind == "code" else (np.float32, int(length))
        wanted[name] = TensorSpec(name, np.dtype(dtype), (width,))
    expected = {
        name: ("INPUT" if name == INPUT_NAME else "OUTPUT", _TYPES[tensor.dtype.name], tensor.shape)
        for name, tensor in wanted.items()
    }
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ModelError(
                f"{file.path} is not what its manifest says: {name} is {_tensor_text(found.get(name))} and should be "
                f"{_tensor_text(expected.get(name))}; run  {_rebuild(file)}"
            )
    if file.sidecar is not None and file.sidecar.profiles != profiles:
        raise ModelError(
            f"{file.path} takes batches of {' and '.join(map(str, profiles))} and its sidecar says "
            f"{' and '.join(map(str, file.sidecar.profiles))}: run  {_rebuild(file)}"
        )
    outputs = tuple(tensor for name, tensor in wanted.items() if name != INPUT_NAME)
    return LaneSpec(wanted[INPUT_NAME], outputs, profiles, graphs, file.path.name)


_TYPES = {"uint8": "UINT8", "float32": "FLOAT"}


def _profiles_of(engine: Any) -> tuple[BatchProfile, ...]:
    return tuple(
        BatchProfile(*(int(shape[0]) for shape in engine.get_tensor_profile_shape(INPUT_NAME, number)))
        for number in range(engine.num_optimization_profiles)
    )


def _tensors_of(engine: Any) -> Mapping[str, tuple[str, str, tuple[int, ...]]]:
    """Return mode, type and shape without the batch of every input and output."""
    names = [engine.get_tensor_name(place) for place in range(engine.num_io_tensors)]
    return {
        name: (
            engine.get_tensor_mode(name).name,
            engine.get_tensor_dtype(name).name,
            tuple(int(size) for size in engine.get_tensor_shape(name))[1:],
        )
        for name in names
    }


def _tensor_text(facts: tuple[str, str, tuple[int, ...]] | None) -> str:
    if facts is None:
        return "absent"
    mode, dtype, shape = facts
    return f"an {mode.lower()} of {dtype} [batch, {', '.join(map(str, shape))}]"


def _rebuild(file: EngineFile) -> str:
    return file.sidecar.rebuild_command if file.sidecar is not None else "admth-export trt"
