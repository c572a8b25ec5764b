"""``admth-export trt`` as a function: model to typed model, through the parity gate, to engine and sidecar."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from admth_export.locking import export_lock
from admth_export.tensorrt.build_process import BuildOutcome, run_build
from admth_export.tensorrt.flavours import Flavour, choose_flavour
from admth_export.tensorrt.options import EngineOptions, EnginePrecision
from admth_export.tensorrt.prediction import Prediction, load_reference, measure_engine, predict
from admth_export.tensorrt.typed_model import HalfChoice, check_source, default_source
from admth_runtime.errors import OutputError
from admth_runtime.files import atomic_path, check_target, sha256_of_file, write_json
from admth_runtime.model import ModelFile
from admth_runtime.sidecar import Sidecar, sidecar_path

if TYPE_CHECKING:
    from admth_export.gate import Gate
    from admth_export.options import ImageChoice
    from admth_export.parity_report import ParityReport

__all__ = ["EngineResult", "export_engine"]

_ENDINGS = (".onnx", ".trt", ".fp32", ".fp16", ".int8")


@dataclass(frozen=True)
class EngineResult:
    """What a build made.

    Attributes:
        file: the engine, or the typed ONNX model where no engine was asked for.
        bytes: its size.
        sha256: its SHA-256.
        sidecar: what the sidecar says, or None for a typed model.
        layers_kept: precision of the layers that were kept out of the file's own, by name.
        parity: the report of the gate on the typed model, or None where an earlier one counts or it was left out.
        predicted: what the manifest says of parity; None where the gate was left out.
        measured: the report on the engine itself, or None where it was not run.
        unmeasured: why the engine itself was not run, or None.
        reports: the report's files, or none.
    """

    file: Path
    bytes: int
    sha256: str
    sidecar: Sidecar | None
    layers_kept: dict[str, str]
    parity: ParityReport | None
    predicted: dict[str, Any] | None
    measured: ParityReport | None
    unmeasured: str | None
    reports: tuple[Path, ...]


def export_engine(
    model: str | Path | None = None,
    out: str | Path | None = None,
    *,
    precision: EnginePrecision,
    flavour: str = "auto",
    options: EngineOptions | None = None,
    keep: HalfChoice | None = None,
    onnx_only: bool = False,
    run: str | Path | None = None,
    gate: Gate | None = None,
    images: ImageChoice | None = None,
    verify: bool = True,
) -> EngineResult:
    """Build a TensorRT engine from one of our ONNX models, once the typed model's bits have proved to be PyTorch's.

    Args:
        model: the ONNX model; None is ``model.onnx``, or ``model.int8.trt.onnx`` for INT8.
        out: the file to write; None is beside the model, named after it, the precision and the flavour.
        precision: what is wanted.
        flavour: ``"auto"``, ``"tensorrt"`` or ``"rtx"``.
        options: how to build; None is a batch profile of 1, 8, 32 and TensorRT's own choices.
        keep: what stays in FP32 in an FP16 model; None is what needs it.
        onnx_only: write the typed ONNX model and build nothing, for a build on another machine.
        run: folder of the training run; None is the model's folder.
        gate: the limits; None is those of the precision.
        images: which images the gate takes; None is 1,000 of the run's own query split.
        verify: False leaves the gate out, and the sidecar says so.

    Raises:
        ModelError: the model is missing, broken, of a wrong precision, or refused by TensorRT's parser.
        InputError: an option is out of range, or this flavour cannot honour it.
        MissingExtraError: TensorRT, or a package of the conversion, is not installed.
        DeviceError: there is no GPU and the flavour needs one, or the build fails.
        ParityError: the typed model, or the engine, fails the gate.
        OutputError: a file cannot be written, or another build writes it.
    """
    options, keep = options or EngineOptions(), keep or HalfChoice()
    source = check_source(Path(model) if model is not None else default_source(precision), precision)
    chosen: Flavour | None = None
    targets: tuple[str, ...] = ()
    if onnx_only:
        target = _target(source.path, out, f"{precision.label}.onnx", ".onnx")
    else:
        chosen = choose_flavour(flavour)
        target = _target(source.path, out, f"{precision.label}{chosen.suffix}", chosen.suffix)
        chosen.check(options, precision)
        options.check_files()
        check_target(sidecar_path(target))
        chosen.load()
        targets = chosen.targets(options)
    check_target(target)
    if target.exists() and target.samefile(source.path):
        raise OutputError(f"cannot write {target}: it is the model itself; choose another place with --out")
    with ExitStack() as stack:
        stack.enter_context(export_lock(target, what="build", extra="export" if chosen is None else chosen.extra))
        # Published in reverse order: the engine, then the sidecar that vouches for it.
        staged_sidecar = None if chosen is None else stack.enter_context(atomic_path(sidecar_path(target)))
        staged = stack.enter_context(atomic_path(target))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".admth-", dir=target.parent)))
        reference, unmeasured = load_reference(
            source, run, images, verify=verify, precision=precision, targets=targets, onnx_only=onnx_only
        )
        prediction = predict(
            source, folder / "typed.onnx", target, precision, keep, reference=reference, gate=gate, verify=verify
        )
        if chosen is None or staged_sidecar is None:
            _move(prediction.model.path, staged, source)
            return _result(target, staged, prediction, None, None, None, stack)
        sidecar = _build(stack, chosen, source, prediction, staged, target, targets, options, precision)
        measured = None
        if reference is not None and unmeasured is None:
            measured = measure_engine(staged, target, sidecar, reference, gate)
            sidecar = sidecar.with_measured_parity(measured.summary())
        write_json(staged_sidecar, sidecar.to_dict())
        return _result(target, staged, prediction, sidecar, measured, unmeasured, stack)


def _build(
    stack: ExitStack,
    flavour: Flavour,
    source: ModelFile,
    prediction: Prediction,
    staged: Path,
    target: Path,
    targets: tuple[str, ...],
    options: EngineOptions,
    precision: EnginePrecision,
) -> Sidecar:
    typed = prediction.model
    cache = None
    if options.timing_cache is not None:
        cache = stack.enter_context(atomic_path(options.timing_cache))
        if options.timing_cache.is_file():
            cache.write_bytes(options.timing_cache.read_bytes())
    outcome = run_build(
        flavour,
        typed.path,
        staged,
        shape=typed.manifest.preprocessing.shape,
        targets=targets,
        options=options,
        cache=cache,
        names={staged: str(target), typed.path: str(source.path)},
    )
    return _sidecar(flavour, source, prediction, staged, targets, options, precision, outcome)


def _sidecar(
    flavour: Flavour,
    source: ModelFile,
    prediction: Prediction,
    engine: Path,
    targets: tuple[str, ...],
    options: EngineOptions,
    precision: EnginePrecision,
    outcome: BuildOutcome,
) -> Sidecar:
    typed = prediction.model
    return Sidecar(
        manifest=typed.manifest,
        flavour=flavour.name,
        tensorrt_version=outcome.version,
        compute_capabilities=targets,
        profiles=(options.batch,),
        engine_sha256=sha256_of_file(engine),
        engine_bytes=engine.stat().st_size,
        source_name=source.path.name,
        source_sha256=source.sha256,
        source_bytes=source.onnx.size,
        build_seconds=round(outcome.seconds, 3),
        layers_kept=dict(typed.layers_kept),
        version_compatible=options.version_compatible,
        build_options={
            "precision": precision.flags,
            "workspace_mib": options.workspace_mib,
            "optimization_level": options.optimization_level,
            "tf32": options.tf32,
            "gpu": list(options.gpus),
            "kept_because": dict(typed.reasons),
        },
        predicted_parity=typed.manifest.parity,
    )


def _result(
    target: Path,
    staged: Path,
    prediction: Prediction,
    sidecar: Sidecar | None,
    measured: ParityReport | None,
    unmeasured: str | None,
    stack: ExitStack,
) -> EngineResult:
    size, digest = staged.stat().st_size, sha256_of_file(staged)
    reports: tuple[Path, ...] = ()
    if (report := measured or prediction.report) is not None:
        from dataclasses import replace

        from admth_export.exporting import report_paths, write_report

        reports = report_paths(target)
        report = replace(report, model=replace(report.model, file=target.name, sha256=digest, bytes=size))
        json_path, picture = (stack.enter_context(atomic_path(path)) for path in reports)
        write_report(report, json_path, picture)
        for path in report_paths(target, failed=True):
            path.unlink(missing_ok=True)
    manifest = prediction.model.manifest
    return EngineResult(
        file=target,
        bytes=size,
        sha256=digest,
        sidecar=sidecar,
        layers_kept=dict(prediction.model.layers_kept),
        parity=prediction.report,
        predicted=None if manifest.parity is None else dict(manifest.parity),
        measured=measured,
        unmeasured=unmeasured,
        reports=reports,
    )


def _target(source: Path, out: str | Path | None, ending: str, suffix: str) -> Path:
    """Return the file to write: the one named, or the model's name with the precision and the suffix."""
    if out is None:
        name = source.name
        while (ending_of := Path(name).suffix) in _ENDINGS:
            name = name[: -len(ending_of)]
        return source.with_name(f"{name}.{ending.lstrip('.')}")
    target = Path(out)
    if target.suffix != suffix:
        raise OutputError(
            f"cannot write {target}: its name must end with {suffix}; pass for example --out {target.stem}{suffix}"
        )
    return target


def _move(typed: Path, staged: Path, source: ModelFile) -> None:
    """Put the typed model in its place; a model that needed no conversion is copied."""
    if typed == source.path:
        staged.write_bytes(typed.read_bytes())
    else:
        typed.replace(staged)
