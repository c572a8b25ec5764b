"""The ONNX model that TensorRT compiles: of the precision that was asked for, written down in its types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from admth_export.tensorrt.options import EnginePrecision
from admth_runtime.console import progress
from admth_runtime.errors import ModelError
from admth_runtime.manifest import Manifest
from admth_runtime.model import ModelFile, read_model

if TYPE_CHECKING:
    import onnx

    from admth_export.fp16 import HalfModel

__all__ = [
    "HalfChoice",
    "TypedModel",
    "check_source",
    "default_source",
    "needs_conversion",
    "write_half",
    "write_simulation",
]

_RANGE_IMAGES = 256
_RANGE_BATCH = 16
_TRIED = 4


@dataclass(frozen=True)
class HalfChoice:
    """What stays in FP32.

    Attributes:
        auto: whether the parts that need it do.
        names: layers that do besides.
        sensitive: layers that do because the parity gate asks for it, each with its share of the error, 0 to 1.
    """

    auto: bool = True
    names: tuple[str, ...] = ()
    sensitive: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class TypedModel:
    """A model to compile.

    Attributes:
        path: its file.
        manifest: its manifest, which the file holds too.
        layers_kept: precision of the layers that were kept out of the model's own, by name.
        reasons: why, by the same names.
        graph_size: bytes of the file before its manifest; 0 where the file is the user's own.
        simulation: a model of the same function for CPUs, which rounds where FP16 does; None where that is the model
            itself. See :mod:`admth_export.fp16_simulation`.
    """

    path: Path
    manifest: Manifest
    layers_kept: Mapping[str, str] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    graph_size: int = 0
    simulation: Path | None = None

    @property
    def runnable(self) -> Path:
        """What the gate runs on the CPU."""
        return self.simulation or self.path


def default_source(precision: EnginePrecision) -> Path:
    """Return the model that is taken when none is named: what the step before wrote."""
    return Path("model.int8.trt.onnx" if precision.name == "int8" else "model.onnx")


def check_source(path: Path, precision: EnginePrecision) -> ModelFile:
    """Read the model to build from, and check that the precision can be made of it.

    Raises:
        ModelError: it is missing, broken, unsafe, or of a precision that the one asked for cannot be made of.
    """
    if precision.name == "int8" and not path.exists():
        raise ModelError(
            f"{path}: no such calibrated model; make it with  admth-calibrate model.onnx --data DATA --target trt"
        )
    model = read_model(path)
    has, target = model.manifest.precision, model.manifest.target
    if target == "cpu":
        raise ModelError(
            f"{path} is made for CPUs ({has}), with types that TensorRT refuses: calibrate for it with  "
            "admth-calibrate model.onnx --data DATA --target trt"
        )
    if precision.name == "int8" and has != "int8":
        raise ModelError(
            f"{path} is {has} and --int8 needs a calibrated model: make it with  admth-calibrate {path} --data DATA "
            "--target trt"
        )
    if has not in (precision.name, "fp32"):
        raise ModelError(
            f"{path} is {has}, and no {precision.name} engine can be made of that: pass the FP32 model.onnx"
        )
    return model


def needs_conversion(precision: EnginePrecision, model: ModelFile) -> bool:
    """Whether the model's types are not yet those of the precision."""
    if precision.half_rest:
        return (model.manifest.calibration or {}).get("rest") != "fp16"
    return precision.name == "fp16" and model.manifest.precision == "fp32"


def write_half(
    source: ModelFile,
    target: Path,
    precision: EnginePrecision,
    choice: HalfChoice,
    pixels: NDArray[np.uint8] | None,
) -> TypedModel:
    """Convert a model to FP16, or the rest of an INT8 model, and write it and its simulation, strictly checked.

    Args:
        source: the model.
        target: the file to write.
        precision: FP16, or INT8 with the rest in half.
        choice: what stays in FP32.
        pixels: real images, uint8 ``[n, H, W, 3]``, on which values are looked at; None looks at weights alone.

    Raises:
        InputError: a named layer does not exist.
        ModelError: the graph cannot be converted, or fails the checker.
    """
    from admth_calibration.graph import load_graph
    from admth_export.fp16 import to_half
    from admth_export.fp16_simulation import simulate_half
    from admth_export.golden import with_golden_of_file
    from admth_export.model_file import check_file, write_graph, write_manifest

    model = load_graph(str(source.path))
    with progress("converting to FP16", None):
        half: HalfModel = to_half(model, _islands(model, choice, pixels))
        del model
        manifest = replace(
            source.manifest,
            precision=precision.name,
            target="tensorrt",
            parity=None,
            calibration={**(source.manifest.calibration or {}), "rest": "fp16"} if precision.half_rest else None,
        )
        simulation = target.with_name(f"simulated-{target.name}")
        simulation_size = write_graph(simulation, simulate_half(half.model))
        size = write_graph(target, half.model)
    with progress("checking the graph", None):
        for path in (simulation, target):
            check_file(path)
        write_manifest(simulation, simulation_size, manifest)
        manifest = with_golden_of_file(manifest, simulation)
        for path, graph_size in ((simulation, simulation_size), (target, size)):
            write_manifest(path, graph_size, manifest)
        if pixels is not None:
            _try(target, pixels[:_TRIED], manifest)
    return TypedModel(target, manifest, half.layers_kept, _reasons(half), size, simulation)


def write_simulation(source: ModelFile, target: Path) -> Path:
    """Write what computes on a CPU what a model of FP16 types does, and return its path beside ``target``.

    Raises:
        ModelError: the graph fails the checker.
    """
    from admth_calibration.graph import load_graph
    from admth_export.fp16_simulation import simulate_half
    from admth_export.model_file import check_file, write_graph, write_manifest

    path = target.with_name(f"simulated-{target.name}")
    size = write_graph(path, simulate_half(load_graph(str(source.path))))
    check_file(path)
    write_manifest(path, size, source.manifest)
    return path


def _try(path: Path, pixels: NDArray[np.uint8], manifest: Manifest) -> None:
    """Run the typed model itself, whose types another engine shall accept too; its numbers are the simulation's."""
    from admth_calibration.probing import open_probe
    from admth_runtime.manifest import output_names

    with open_probe(path, output_names(manifest.code_lengths)) as probe:
        probe.run(pixels)


def _reasons(half: HalfModel) -> dict[str, str]:
    reasons: dict[str, str] = {}
    for island in half.islands:
        reasons.setdefault(island.layer, island.reason)
    return reasons


def _islands(model: onnx.ModelProto, choice: HalfChoice, pixels: NDArray[np.uint8] | None) -> Sequence[Any]:
    from admth_calibration.graph import Graph
    from admth_calibration.probing import collect_ranges
    from admth_export.fp16 import automatic_islands, named_islands, sensitive_islands

    graph = Graph(model)
    islands = named_islands(graph, choice.names)
    if choice.auto:
        ranges = {}
        if pixels is not None:
            floats = [name for name, kind in graph.types.items() if kind == 1 and name in graph.producers]
            some = pixels[:_RANGE_IMAGES]
            ranges = collect_ranges(
                model, floats, [some[start : start + _RANGE_BATCH] for start in range(0, len(some), _RANGE_BATCH)]
            )
        islands += automatic_islands(graph, ranges)
    return [*islands, *sensitive_islands(graph, choice.sensitive)]
