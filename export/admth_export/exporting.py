"""``admth-export onnx`` as a function: checkpoint to ONNX, through the parity gate, into place."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from admth_export.gate import Gate
from admth_export.gate_images import load_gate_images
from admth_export.golden import with_golden_of_network
from admth_export.locking import export_lock
from admth_export.measuring import measure_parity
from admth_export.model_file import check_file, write_graph, write_manifest
from admth_export.onnx_export import build_graph, manifest_of
from admth_export.options import MODEL_FILE, ImageChoice, OnnxOptions, check_target
from admth_export.parity_plot import save_parity_figure
from admth_export.parity_report import ModelFacts, ParityReport
from admth_export.quantization import quantization_metadata, reference_for
from admth_export.stages import stage
from admth_runtime.errors import CheckpointError, ParityError
from admth_runtime.files import atomic_path, sha256_of_file, write_json
from admth_runtime.manifest import Manifest
from admth_training.checkpoint import CONFIG_FILE, TrainedRun, load_run

__all__ = ["ExportResult", "export_onnx", "report_paths", "write_report"]


@dataclass(frozen=True)
class ExportResult:
    """What an export made.

    Attributes:
        model: the ONNX file.
        bytes: its size.
        sha256: its SHA-256, 64 hexadecimal digits.
        manifest: its manifest.
        parity: the gate's report, or None where the gate was left out.
        report: the report's JSON file, or None.
        picture: the report's picture, or None.
    """

    model: Path
    bytes: int
    sha256: str
    manifest: Manifest
    parity: ParityReport | None
    report: Path | None
    picture: Path | None


def export_onnx(
    run: str | Path = ".",
    out: str | Path | None = None,
    *,
    options: OnnxOptions | None = None,
    gate: Gate | None = None,
    images: ImageChoice | None = None,
    verify: bool = True,
) -> ExportResult:
    """Export a run to one ONNX file that holds its manifest, once its bits have proved to be PyTorch's.

    Of a QAT run it is the network without roundings, with weights that are on their grids already, and the learned
    scales in its metadata (:data:`admth_export.quantization.QUANTIZATION_KEY`): what ``admth-calibrate`` makes INT8 of.

    A model that fails the gate is not kept, and one that was there before stays; the report of the failure is then
    ``<model>.parity.failed.json`` with a picture beside it.

    Args:
        run: the run's folder.
        out: the file to write; None is ``model.onnx`` in the run's folder.
        options: format versions; None is opset 20 and IR version 10.
        gate: the limits; None is those of FP32.
        images: which images the gate takes; None is 1,000 of the run's own query split.
        verify: False leaves the gate out, and the manifest says so: its ``parity`` is then null.

    Raises:
        CheckpointError: the run is missing, unfinished, or its parts disagree.
        DataError: the images are gone or broken.
        ParityError: the model fails the gate.
        OutputError: the file cannot be written, or another export writes it.
        ModelError: the exporter or the checker fails.
    """
    folder, target = Path(run), Path(out) if out is not None else Path(run) / MODEL_FILE
    options = options or OnnxOptions()
    with stage("loading the run"):
        trained = load_run(folder)
    _check_size(trained)
    check_target(target)
    with ExitStack() as stack:
        stack.enter_context(export_lock(target))
        temporary = stack.enter_context(atomic_path(target))
        # Opened before the graph is built, so that missing data is known in a second.
        chosen = load_gate_images(trained, images or ImageChoice()) if verify else None
        network = reference_for(trained, "fp32").network
        manifest, others = with_golden_of_network(manifest_of(trained), network), quantization_metadata(trained)
        with stage("building the graph"):
            graph_size = write_graph(temporary, build_graph(network, manifest.preprocessing.shape, options))
        with stage("checking the graph"):
            check_file(temporary)
        write_manifest(temporary, graph_size, manifest, others=others)
        report = None
        if chosen is not None:
            limits = gate or Gate.of_precision(manifest.precision)
            facts = _facts(target, temporary, manifest)
            report = measure_parity(trained, chosen, temporary, facts, limits)
            if not report.passed:
                raise _failure(target, report)
            manifest = replace(manifest, parity=report.summary())
            write_manifest(temporary, graph_size, manifest, others=others)
        size, digest = temporary.stat().st_size, sha256_of_file(temporary)
        if report is not None:
            report = replace(report, model=replace(report.model, sha256=digest, bytes=size))
            _stage_report(stack, target, report)
    json_path, picture = report_paths(target)
    _remove(*report_paths(target, failed=True))
    if report is None:
        _remove(json_path, picture)  # of an earlier model
        return ExportResult(target, size, digest, manifest, None, None, None)
    return ExportResult(target, size, digest, manifest, report, json_path, picture)


def report_paths(model: Path, *, failed: bool = False) -> tuple[Path, Path]:
    """Return where the report of a model's parity lies: the JSON file and the picture, beside the model."""
    kind = ".parity.failed" if failed else ".parity"
    return model.with_name(f"{model.stem}{kind}.json"), model.with_name(f"{model.stem}{kind}.png")


def write_report(report: ParityReport, json_path: Path, picture: Path) -> None:
    """Write a report's JSON file and picture, each by rename.

    Raises:
        OutputError: one cannot be written.
        MissingExtraError: Matplotlib is not installed.
    """
    write_json(json_path, report.to_dict())
    save_parity_figure(report, picture)


def _stage_report(stack: ExitStack, target: Path, report: ParityReport) -> None:
    """Write the report under temporary names that the stack renames together with the model."""
    json_path, picture = report_paths(target)
    staged = stack.enter_context(atomic_path(json_path)), stack.enter_context(atomic_path(picture))
    write_report(report, *staged)


def _failure(target: Path, report: ParityReport) -> ParityError:
    json_path, picture = report_paths(target, failed=True)
    write_report(report, json_path, picture)
    more = f" (and {len(report.failures) - 1:,} more)" if len(report.failures) > 1 else ""
    return ParityError(
        f"{target.name} fails the parity gate and was not written: {report.failures[0]}{more}: see {json_path}; "
        "set other limits with --noise-threshold and --min-bit-parity"
    )


def _facts(target: Path, temporary: Path, manifest: Manifest) -> ModelFacts:
    return ModelFacts(
        file=target.name,
        sha256=None,
        bytes=temporary.stat().st_size,
        precision=manifest.precision,
        target=manifest.target,
        checkpoint_sha256=manifest.checkpoint_sha256,
    )


def _check_size(trained: TrainedRun) -> None:
    size, shape = trained.config.network.size, trained.config.preprocessing.shape
    if shape != (size, size, 3):
        raise CheckpointError(
            f"{trained.folder / CONFIG_FILE}: preprocessing gives {shape[0]}x{shape[1]} pixels and the network takes "
            f"{size}x{size}: restore the config.json that training wrote"
        )


def _remove(*paths: Path) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
