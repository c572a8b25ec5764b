"""One build, in this process: typed ONNX in, serialised engine out, on any TensorRT from 10.3 on.

Every call that may return None or False is checked, since TensorRT reports failures that way and crashes on what is
made of them later. What it wrote to its log becomes the error's text, with the mend where the cause is known.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from admth_export.tensorrt.options import EngineOptions
from admth_runtime.errors import AdmthError, DeviceError, InputError, ModelError
from admth_runtime.manifest import INPUT_NAME

__all__ = ["BuiltEngine", "Listener", "build_engine"]

# What TensorRT says, and what to do about it; the first that is found counts.
_MENDS: tuple[tuple[str, type[AdmthError], str], ...] = (
    (
        r"check_turing_op_compatibility|for Turing",
        DeviceError,
        "Turing (sm75) lacks that in FP32: build with --fp16, or leave sm75 out of --gpu",
    ),
    (r"OutOfMemory|out of memory|insufficient memory|workspace", DeviceError, "raise --workspace, or leave it out"),
    (
        r"libnvinfer_lean|nvinfer_lean|load library",
        DeviceError,
        "the lean runtime is missing: install tensorrt-lean of the same version, or leave --version-compatible out",
    ),
    (
        r"could not find any implementation",
        DeviceError,
        "no kernel fits: raise --workspace, lower the largest --batch, or update TensorRT",
    ),
    (
        r"driver version is insufficient|no CUDA-capable device|cudaError|CUDA initialization",
        DeviceError,
        "CUDA does not work here: run  admth-run doctor",
    ),
)
_NO_DRIVER = re.compile(r"driver version is insufficient|no CUDA-capable device")


@dataclass(eq=False)
class Listener:
    """Where a build reports to.

    Attributes:
        message: takes TensorRT's severity, such as ``"WARNING"``, and its text.
        phase_started: takes the phase's name, its parent's or None, and its number of steps.
        stepped: takes the phase's name.
        phase_finished: takes the phase's name.
        errors: the errors that TensorRT reported so far.
    """

    message: Callable[[str, str], None]
    phase_started: Callable[[str, str | None, int], None]
    stepped: Callable[[str], None]
    phase_finished: Callable[[str], None]
    errors: list[str] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class BuiltEngine:
    """A serialised engine.

    Attributes:
        plan: its bytes, as a buffer of TensorRT's.
        seconds: how long TensorRT took.
        version: the TensorRT that built it.
        timing_cache: the updated timing cache, or None.
    """

    plan: Any
    seconds: float
    version: str
    timing_cache: bytes | None


def build_engine(
    bindings: Any,
    model: Path,
    input_shape: tuple[int, int, int],
    options: EngineOptions,
    targets: Sequence[str],
    listener: Listener,
    *,
    choose_targets: bool,
) -> BuiltEngine:
    """Build an engine.

    Args:
        bindings: the TensorRT module.
        model: the typed ONNX model; its bytes go to the parser, so that it opens no other file.
        input_shape: ``(H, W, 3)``.
        options: checked options.
        targets: compute capabilities, as ``"sm89"``.
        listener: takes messages and progress.
        choose_targets: whether this flavour is told the targets; TensorRT builds for the GPU that it finds.

    Raises:
        ModelError: the parser refuses the model; the message names the node and its operator.
        InputError: the timing cache is of another TensorRT, or this TensorRT does not know a target.
        DeviceError: the build fails.
    """
    logger = _logger(bindings, listener)
    builder = _made(lambda: bindings.Builder(logger), "a builder", listener)
    flags = 1 << int(bindings.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = _made(lambda: builder.create_network(flags), "a network", listener)
    parser = _made(lambda: bindings.OnnxParser(network, logger), "an ONNX parser", listener)
    _parse(parser, model)
    config = _made(builder.create_builder_config, "a configuration", listener)
    _configure(bindings, config, options)
    if choose_targets:
        _set_targets(bindings, config, targets)
    cache = _timing_cache(config, options.timing_cache, listener)
    _set_profile(builder, config, input_shape, options, listener)
    # Kept in a variable: TensorRT holds no reference of its own.
    monitor = _monitor(bindings, listener)
    config.progress_monitor = monitor
    start = time.perf_counter()
    plan = builder.build_serialized_network(network, config)
    seconds = time.perf_counter() - start
    if plan is None:
        raise _failure(listener, f"{bindings.__name__} {bindings.__version__} cannot build the engine")
    return BuiltEngine(plan, seconds, str(bindings.__version__), None if cache is None else _serialized(config))


def _parse(parser: Any, model: Path) -> None:
    if parser.parse(model.read_bytes()):
        return
    problems = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        node = (
            f"node {error.node_name()!r}, operator {error.node_operator()}"
            if hasattr(error, "node_name")
            else (f"node {error.node()}")
        )
        problems.append(f"{node}: {' '.join(str(error.desc()).split())[:200]}")
    text = "; ".join(problems[:3]) or "it gives no reason"
    raise ModelError(
        f"TensorRT's parser refuses the model ({text}): export it again with  admth-export onnx , or update TensorRT"
    )


def _configure(bindings: Any, config: Any, options: EngineOptions) -> None:
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(bindings.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.version_compatible:
        config.set_flag(bindings.BuilderFlag.VERSION_COMPATIBLE)
    if not options.tf32 and hasattr(bindings.BuilderFlag, "TF32"):
        config.clear_flag(bindings.BuilderFlag.TF32)
    # So that an inspector can list every layer with its precision.
    config.profiling_verbosity = bindings.ProfilingVerbosity.DETAILED


def _set_targets(bindings: Any, config: Any, targets: Sequence[str]) -> None:
    known = bindings.ComputeCapability
    config.num_compute_capabilities = len(targets)
    for index, name in enumerate(targets):
        capability = getattr(known, name.upper(), None)
        if capability is None or not config.set_compute_capability(capability, index):
            raise InputError(
                f"{bindings.__name__} {bindings.__version__} does not build for {name}: leave it out of --gpu, or "
                "update it"
            )


def _timing_cache(config: Any, path: Path | None, listener: Listener) -> Any:
    if path is None:
        return None
    content = path.read_bytes() if path.is_file() else b""
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, False):
        raise InputError(
            f"the timing cache {path} is damaged, or of another TensorRT or GPU ({_reason(listener)}): remove it, or "
            "name another --timing-cache"
        )
    return cache


def _serialized(config: Any) -> bytes | None:
    cache = config.get_timing_cache()
    content = None if cache is None else cache.serialize()
    return None if content is None else bytes(content)


def _set_profile(
    builder: Any, config: Any, input_shape: tuple[int, int, int], options: EngineOptions, listener: Listener
) -> None:
    profile = _made(builder.create_optimization_profile, "an optimisation profile", listener)
    batch = options.batch
    shapes = [(count, *input_shape) for count in (batch.minimum, batch.optimum, batch.maximum)]
    profile.set_shape(INPUT_NAME, *shapes)
    if config.add_optimization_profile(profile) < 0:
        raise _failure(listener, f"TensorRT refuses the batch profile {batch}")


def _made(make: Callable[[], Any], what: str, listener: Listener) -> Any:
    """Return what a factory makes; TensorRT answers with None, or pybind11 with a TypeError, where it cannot."""
    try:
        made = make()
    except (TypeError, RuntimeError) as error:
        raise _failure(listener, f"TensorRT makes no {what.partition(' ')[2]} ({error})") from error
    if made is None:
        raise _failure(listener, f"TensorRT makes no {what.partition(' ')[2]}")
    return made


def _failure(listener: Listener, what: str) -> AdmthError:
    reason = _reason(listener)
    everything = " ".join(listener.errors)
    for pattern, kind, mend in _MENDS:
        if re.search(pattern, reason, re.IGNORECASE) or (
            kind is not DeviceError and re.search(pattern, everything, re.IGNORECASE)
        ):
            return kind(f"{what}: {reason}: {mend}")
    return DeviceError(f"{what}: {reason}: see all messages with --verbose, or update TensorRT")


def _reason(listener: Listener) -> str:
    """Return TensorRT's first error; without a driver it complains of that before and after everything else."""
    told = [text for text in listener.errors if not _NO_DRIVER.search(text)] or listener.errors
    return " ".join(told[0].split())[:300] if told else "it gives no reason"


def _logger(bindings: Any, listener: Listener) -> Any:
    class Logger(bindings.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            bindings.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            name = str(getattr(severity, "name", severity)).rpartition(".")[2]
            if name in ("ERROR", "INTERNAL_ERROR"):
                listener.errors.append(msg)
            listener.message(name, msg)

    return Logger()


def _monitor(bindings: Any, listener: Listener) -> Any:
    class Monitor(bindings.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            bindings.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            listener.phase_started(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            listener.stepped(phase_name)
            return True

        def phase_finish(self, phase_name: str) -> None:
            listener.phase_finished(phase_name)

    return Monitor()
