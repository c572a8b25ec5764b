"""``admth-export verify`` as a function: sign parity of any exported model with its checkpoint."""

from __future__ import annotations

from pathlib import Path

from admth_export.candidate_file import read_candidate
from admth_export.gate import Gate
from admth_export.gate_images import load_gate_images
from admth_export.measuring import measure_parity
from admth_export.options import ImageChoice
from admth_export.parity_report import ModelFacts, ParityReport
from admth_export.stages import stage
from admth_runtime.console import note
from admth_runtime.engine_file import EngineFile
from admth_runtime.errors import CheckpointError, ManifestError
from admth_runtime.model import ModelFile
from admth_training.checkpoint import CONFIG_FILE, WEIGHTS_FILE, TrainedRun, load_run
from admth_training.qat_start import load_base_run

__all__ = ["check_origin", "verify"]


def verify(
    candidate: str | Path,
    run: str | Path | None = None,
    *,
    gate: Gate | None = None,
    images: ImageChoice | None = None,
    device: str | None = None,
    threads: int | None = None,
    any_checkpoint: bool = False,
    against: str | Path | None = None,
) -> ParityReport:
    """Compare the bits of an exported model or engine, of any precision, with its PyTorch network's.

    An INT8 model of a QAT run is compared twice: with that run's own network, which rounds as the model does, and with
    the FP32 network that the run came from. Only the first comparison is judged.

    Args:
        candidate: the ONNX model, or the TensorRT engine with its sidecar.
        run: the run that it came from; None is the candidate's folder.
        gate: the limits; None is those of the precision that the candidate's manifest states.
        images: which images to compare on; None is 1,000 of the run's own query split.
        device: where the candidate runs: ``"auto"``, ``"cpu"`` or ``"cuda"``; None is the CPU for a model and the GPU
            for an engine.
        threads: its CPU threads; None takes one a physical core.
        any_checkpoint: compare with a run whose weights the candidate did not come from.
        against: another run to compare with besides; None is the FP32 run that a QAT run names, for an INT8 candidate
            and where that run is still there.

    Returns:
        The report; ``report.passed`` says whether the gate is passed.

    Raises:
        ModelError: the candidate is missing, broken, or no model of ours.
        DeviceError: the device cannot be had.
        CheckpointError: the run is missing or unfinished, or the candidate came from other weights.
        DataError: the images are gone or broken.
    """
    path = Path(candidate)
    model = read_candidate(path)
    if run is None and not (path.parent / CONFIG_FILE).is_file():
        raise CheckpointError(f"{path.parent} is no run's folder, it holds no {CONFIG_FILE}: name the run with --run")
    with stage("loading the run"):
        trained = load_run(run if run is not None else path.parent)
    check_origin(model, trained, any_checkpoint=any_checkpoint)
    manifest = model.manifest
    facts = ModelFacts(
        file=path.name,
        sha256=model.sha256,
        bytes=path.stat().st_size,
        precision=manifest.precision,
        target=manifest.target,
        checkpoint_sha256=manifest.checkpoint_sha256,
    )
    other = _other_run(model, trained, against)
    chosen = load_gate_images(trained, images or ImageChoice())
    limits = gate or Gate.of_model(manifest)
    where = device or ("cuda" if isinstance(model, EngineFile) else "cpu")
    return measure_parity(trained, chosen, path, facts, limits, device=where, threads=threads, against=other)


def _other_run(model: ModelFile | EngineFile, trained: TrainedRun, against: str | Path | None) -> TrainedRun | None:
    """Load the run of the second comparison, where there is one."""
    if against is not None:
        other = load_run(against)
        check_origin(model, other, any_checkpoint=True)
        return other
    qat = trained.config.qat
    if qat is None or model.manifest.precision != "int8":
        return None
    try:
        return load_base_run(qat)
    except CheckpointError:
        note(f"the FP32 run {qat.base_run} is not there any more: compare with it too by  --against RUN")
        return None


def check_origin(model: ModelFile | EngineFile, trained: TrainedRun, *, any_checkpoint: bool = False) -> None:
    """Check that a model came from a run, so that their bits can be compared.

    Raises:
        CheckpointError: it came from other weights, and ``any_checkpoint`` is False.
        ManifestError: its code lengths or its preprocessing are not the run's.
    """
    manifest, config = model.manifest, trained.config
    if manifest.checkpoint_sha256 != trained.checkpoint_sha256 and not any_checkpoint:
        raise CheckpointError(
            f"{model.path} came from other weights ({manifest.checkpoint_sha256[:12]}) than "
            f"{trained.folder / WEIGHTS_FILE} ({trained.checkpoint_sha256[:12]}): name its run with --run, "
            "export it again, or compare anyway with --any-checkpoint"
        )
    if manifest.code_lengths != config.network.code_lengths:
        raise ManifestError(
            f"{model.path} has code lengths {list(manifest.code_lengths)} and the run {trained.folder} has "
            f"{list(config.network.code_lengths)}: name its own run with --run"
        )
    if manifest.preprocessing != config.preprocessing:
        raise ManifestError(
            f"{model.path} and the run {trained.folder} preprocess images differently, so there are no equal pixels "
            "to compare: name its own run with --run"
        )
