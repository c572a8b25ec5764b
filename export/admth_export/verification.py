"""``admth-export verify`` as a function: sign parity of any exported model with its checkpoint."""

from __future__ import annotations

from pathlib import Path

from admth_export.gate import Gate
from admth_export.gate_images import load_gate_images
from admth_export.measuring import measure_parity
from admth_export.options import ImageChoice
from admth_export.parity_report import ModelFacts, ParityReport
from admth_export.stages import stage
from admth_runtime.errors import CheckpointError, ManifestError
from admth_runtime.model import ModelFile, read_model
from admth_training.checkpoint import CONFIG_FILE, WEIGHTS_FILE, TrainedRun, load_run

__all__ = ["check_origin", "verify"]


def verify(
    candidate: str | Path,
    run: str | Path | None = None,
    *,
    gate: Gate | None = None,
    images: ImageChoice | None = None,
    device: str = "cpu",
    threads: int | None = None,
    any_checkpoint: bool = False,
) -> ParityReport:
    """Compare the bits of an exported model, of any precision, with the FP32 PyTorch network's.

    Args:
        candidate: the ONNX model.
        run: the run that it came from; None is the candidate's folder.
        gate: the limits; None is those of the precision that the candidate's manifest states.
        images: which images to compare on; None is 1,000 of the run's own query split.
        device: where the candidate runs: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        threads: its CPU threads; None takes one a physical core.
        any_checkpoint: compare with a run whose weights the candidate did not come from.

    Returns:
        The report; ``report.passed`` says whether the gate is passed.

    Raises:
        ModelError: the candidate is missing, broken, or no model of ours.
        CheckpointError: the run is missing or unfinished, or the candidate came from other weights.
        DataError: the images are gone or broken.
    """
    path = Path(candidate)
    model = read_model(path)
    if run is None and not (path.parent / CONFIG_FILE).is_file():
        raise CheckpointError(f"{path.parent} is no run's folder, it holds no {CONFIG_FILE}: name the run with --run")
    with stage("loading the run"):
        trained = load_run(run if run is not None else path.parent)
    check_origin(model, trained, any_checkpoint=any_checkpoint)
    manifest = model.manifest
    facts = ModelFacts(
        file=path.name,
        sha256=model.sha256,
        bytes=model.onnx.size,
        precision=manifest.precision,
        target=manifest.target,
        checkpoint_sha256=manifest.checkpoint_sha256,
    )
    chosen = load_gate_images(trained, images or ImageChoice())
    limits = gate or Gate.of_precision(manifest.precision)
    return measure_parity(trained, chosen, path, facts, limits, device=device, threads=threads)


def check_origin(model: ModelFile, trained: TrainedRun, *, any_checkpoint: bool = False) -> None:
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
