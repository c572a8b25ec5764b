"""The gate around a build: the typed model on the CPU before it, the engine itself after it where there is a GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from admth_export.tensorrt.options import EnginePrecision
from admth_export.tensorrt.typed_model import HalfChoice, TypedModel, needs_conversion, write_half, write_simulation
from admth_runtime.driver import ask_driver
from admth_runtime.errors import AdmthError, ParityError, require
from admth_runtime.model import ModelFile
from admth_runtime.sidecar import Sidecar, sidecar_path, write_sidecar

if TYPE_CHECKING:
    from admth_export.blame import LayerShare
    from admth_export.gate import Gate
    from admth_export.gate_images import GateImages
    from admth_export.options import ImageChoice
    from admth_export.parity_report import ParityReport
    from admth_training.checkpoint import TrainedRun

__all__ = ["Prediction", "Reference", "load_reference", "measure_engine", "predict"]

_BLAME_IMAGES = 16
_REMAINING = (0.5, 0.2, 0.05)  # parts of the error that are left when its largest sources are taken out, try after try
_NAMED_LAYERS = 3


@dataclass(frozen=True, eq=False)
class Reference:
    """What a candidate is compared with.

    Attributes:
        trained: the run.
        images: the gate's images.
    """

    trained: TrainedRun
    images: GateImages


@dataclass(frozen=True, eq=False)
class Prediction:
    """The typed model, and what the gate said of it.

    Attributes:
        model: the model to compile; its manifest holds the gate's summary.
        report: the gate's report, or None where an earlier one counts or the gate was left out.
    """

    model: TypedModel
    report: ParityReport | None


def load_reference(
    source: ModelFile,
    run: str | Path | None,
    images: ImageChoice | None,
    *,
    verify: bool,
    precision: EnginePrecision,
    targets: tuple[str, ...],
    onnx_only: bool,
) -> tuple[Reference | None, str | None]:
    """Load the run and the images where the gate needs them.

    Returns:
        The reference, or None; and why the engine itself will not be run, or None where it will.

    Raises:
        AdmthError: the gate on the typed model needs the run, and it cannot be had.
    """
    if not verify:
        return None, "the gate was left out with --no-verify"
    driver = ask_driver()
    unmeasured = None
    if onnx_only or not driver.gpus:
        unmeasured = "no engine was built" if onnx_only else f"there is {driver.problem} here"
    elif driver.gpus[0][1] not in targets:
        unmeasured = f"the GPU here is {driver.gpus[0][1]} and the engine is for {', '.join(targets)}"
    predicted = _already_passed(source, precision)
    if predicted and unmeasured is not None and run is None:
        return None, unmeasured
    try:
        return _load(source, run, images), unmeasured
    except AdmthError as error:
        if not predicted or run is not None:
            raise
        return None, f"the run to compare it with cannot be used ({error})"


def predict(
    source: ModelFile,
    path: Path,
    target: Path,
    precision: EnginePrecision,
    choice: HalfChoice,
    *,
    reference: Reference | None,
    gate: Gate | None,
    verify: bool,
) -> Prediction:
    """Make the typed model, and hold it against PyTorch on the CPU.

    Args:
        source: the model to build from.
        path: where a converted model goes.
        target: the file that is being made, for messages and for the report of a failure.
        precision: what is wanted.
        choice: what stays in FP32.
        reference: what to compare with, or None.
        gate: the limits; None is those of the precision.
        verify: whether the gate is wanted at all.

    Raises:
        ParityError: the model fails the gate; the message names the layers to blame, and the report is kept.
    """
    if not needs_conversion(precision, source):
        manifest = replace(source.manifest, target="tensorrt")
        if manifest.golden is None:  # made before there were any, or by a step that changed the model's codes
            from admth_export.golden import with_golden_of_file

            manifest = with_golden_of_file(manifest, source.path)
        typed = TypedModel(source.path, manifest)
        if reference is None or not verify:
            return Prediction(typed, None)
        if precision.name == "fp16" or precision.half_rest:
            typed = replace(typed, simulation=write_simulation(source, path))
        report = _measure(reference, target, typed, gate)
        if not report.passed:
            raise _failure(target, report, _mend(precision))
        return Prediction(replace(typed, manifest=replace(manifest, parity=report.summary())), report)
    pixels = None if reference is None else reference.images.pixels
    typed = write_half(source, path, precision, choice, pixels)
    if reference is None:
        return Prediction(typed, None)
    report = _measure(reference, target, typed, gate)
    if not report.passed:
        typed, report = _mended(source, path, target, precision, choice, typed, report, reference, gate)
    manifest = replace(typed.manifest, parity=report.summary())
    from admth_export.model_file import write_manifest

    write_manifest(path, typed.graph_size, manifest)
    return Prediction(replace(typed, manifest=manifest), report)


def measure_engine(
    engine: Path, target: Path, sidecar: Sidecar, reference: Reference, gate: Gate | None
) -> ParityReport:
    """Hold an engine against PyTorch on the GPU of this machine, in a process of its own.

    Args:
        engine: the engine, under its temporary name.
        target: its name to be.
        sidecar: its sidecar.
        reference: what to compare with.
        gate: the limits; None is those of the precision.

    Raises:
        ParityError: it fails the gate; the report is kept.
        AdmthError: the runtime cannot run it.
    """
    from admth_export.gate import Gate
    from admth_export.measuring import measure_parity
    from admth_export.parity_report import ModelFacts

    manifest = sidecar.manifest
    facts = ModelFacts(
        file=target.name,
        sha256=sidecar.engine_sha256,
        bytes=sidecar.engine_bytes,
        precision=manifest.precision,
        target=manifest.target,
        checkpoint_sha256=manifest.checkpoint_sha256,
    )
    limits = gate or Gate.of_model(manifest)
    try:
        write_sidecar(engine, sidecar)
        report = measure_parity(reference.trained, reference.images, engine, facts, limits, device="cuda")
    finally:
        sidecar_path(engine).unlink(missing_ok=True)
    if not report.passed:
        mend = "the typed model passed on the CPU, so TensorRT's kernels differ: build with --fp32, or report it"
        raise _failure(target, report, mend)
    return report


def _already_passed(source: ModelFile, precision: EnginePrecision) -> bool:
    """Whether the model to compile passed the gate when it was made."""
    parity = source.manifest.parity
    return not needs_conversion(precision, source) and parity is not None and parity.get("passed") is True


def _load(source: ModelFile, run: str | Path | None, images: ImageChoice | None) -> Reference:
    # Where engines are built there may be no PyTorch, and the modules below import it.
    require("torch", extra="export", purpose="comparing bits with PyTorch's")
    from admth_export.gate_images import load_gate_images
    from admth_export.options import ImageChoice
    from admth_export.verification import check_origin
    from admth_runtime.console import progress
    from admth_training.checkpoint import load_run

    with progress("loading the run", None):
        trained = load_run(run if run is not None else source.path.parent)
    check_origin(source, trained)
    return Reference(trained, load_gate_images(trained, images or ImageChoice()))


def _measure(reference: Reference, target: Path, typed: TypedModel, gate: Gate | None) -> ParityReport:
    from admth_export.gate import Gate
    from admth_export.measuring import measure_parity
    from admth_export.parity_report import ModelFacts

    manifest = typed.manifest
    facts = ModelFacts(
        file=target.name,
        sha256=None,
        bytes=typed.path.stat().st_size,
        precision=manifest.precision,
        target=manifest.target,
        checkpoint_sha256=manifest.checkpoint_sha256,
    )
    limits = gate or Gate.of_model(manifest)
    return measure_parity(reference.trained, reference.images, typed.runnable, facts, limits)


def _faulty(report: ParityReport) -> bool:
    """Whether something is wrong whatever the margins are, such as logits that are not finite."""
    return any(parity.faults for run in report.runs for parity in run.lengths.values())


def _mended(
    source: ModelFile,
    path: Path,
    target: Path,
    precision: EnginePrecision,
    choice: HalfChoice,
    typed: TypedModel,
    report: ParityReport,
    reference: Reference,
    gate: Gate | None,
) -> tuple[TypedModel, ParityReport]:
    """Leave the layers that add most of the error in FP32, a few at a time, until the gate is passed.

    Raises:
        ParityError: a value is not finite, nothing is left to ``auto``, or the gate fails still; the layers are named.
    """
    if _faulty(report):
        raise _failure(target, report, _first_fault(typed, reference))
    shares = _shares(source, typed, reference)
    for remaining in _REMAINING if choice.auto else ():
        sensitive = _largest(shares, 1.0 - remaining)
        typed = write_half(source, path, precision, replace(choice, sensitive=sensitive), reference.images.pixels)
        report = _measure(reference, target, typed, gate)
        if report.passed:
            return typed, report
    if not shares:
        raise _failure(target, report, f"no layer in FP16 is to blame: {_mend(precision)}")
    worst = shares[:_NAMED_LAYERS]
    blamed = f"the layers that add most to the error are {', '.join(map(str, worst))}"
    if choice.auto:
        kept = sum(share.layer in typed.layers_kept for share in shares)
        mend = (
            f"leaving {kept} of {len(shares)} layers in FP32 was not enough: build with --fp32, or set other limits "
            "with --noise-threshold and --min-bit-parity"
        )
    else:
        mend = f"keep them in FP32 with  --keep-fp32 {','.join(['auto', *(share.layer for share in worst)])}"
    raise _failure(target, report, f"{blamed}; {mend}")


def _shares(source: ModelFile, typed: TypedModel, reference: Reference) -> list[LayerShare]:
    from admth_calibration.graph import Graph, load_graph
    from admth_export.blame import layer_shares
    from admth_export.fp16 import Island

    model = load_graph(str(source.path))
    graph = Graph(model)
    kept = [Island(node.name, "", "") for node in graph.nodes if graph.layer_name(node) in typed.layers_kept]
    return layer_shares(model, kept, reference.images.pixels[:_BLAME_IMAGES])


def _largest(shares: list[LayerShare], part: float) -> dict[str, float]:
    """Return the fewest layers whose shares sum up to a part of the error."""
    chosen: dict[str, float] = {}
    for share in shares:
        if sum(chosen.values()) >= part:
            break
        chosen[share.layer] = share.share
    return chosen


def _first_fault(typed: TypedModel, reference: Reference) -> str:
    from admth_calibration.graph import load_graph
    from admth_export.blame import first_non_finite

    layer = first_non_finite(load_graph(str(typed.runnable)), reference.images.pixels)
    if layer is None:
        return "every value inside is finite, so it is the codes that are wrong: please report it"
    return (
        f"the first value that is not finite comes from the layer {layer}: keep it in FP32 with  "
        f"--keep-fp32 auto,{layer}"
    )


def _mend(precision: EnginePrecision) -> str:
    if precision.name == "int8":
        return "calibrate again with more images, or with some layers left out: admth-calibrate --target trt --images N"
    return "export it again with  admth-export onnx"


def _failure(target: Path, report: ParityReport, mend: str) -> ParityError:
    from admth_export.exporting import report_paths, write_report

    json_path, picture = report_paths(target, failed=True)
    write_report(report, json_path, picture)
    more = f" (and {len(report.failures) - 1:,} more)" if len(report.failures) > 1 else ""
    return ParityError(
        f"{target.name} fails the parity gate and was not written: {report.failures[0]}{more}; {mend}; see {json_path}"
    )
