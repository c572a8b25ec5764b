"""Quantisation-aware runs, each fine-tuned from the case's FP32 run, exported, and kept."""

from __future__ import annotations

from pathlib import Path

from admth_runtime.console import note
from admth_runtime.files import sha256_of_file, write_json
from admth_runtime.model import read_model
from int8.networks import Network, data_spec
from int8.processes import WorkError, admth, execute
from int8.settings import Settings

__all__ = ["TARGETS", "prepare_qat"]

TARGETS = ("cpu", "trt")
_MINUTES = 15


def prepare_qat(network: Network, settings: Settings) -> tuple[dict[str, Path], dict[str, str]]:
    """Fine-tune for each target, or take what an earlier call left; return the folders, and what failed and why."""
    if not (network.case.qat and settings.qat):
        return {}, {}
    folders, errors = {}, {}
    for target in TARGETS:
        folder = settings.cache / f"{network.case.name}-qat-{target}"
        try:
            _prepare(network, folder, target, settings)
            folders[target] = folder
        except WorkError as error:
            note(f"quantisation-aware training for {target}: {error}")
            errors[target] = str(error)
    return folders, errors


def _prepare(network: Network, folder: Path, target: str, settings: Settings) -> None:
    base = sha256_of_file(network.folder / "model.safetensors")
    if (folder / "model.onnx").is_file() and _base(folder) == base:
        return
    note(f"quantisation-aware training for {target}: about {_MINUTES} minutes")
    words = ["fit", "--qat", str(network.folder), "--qat-target", target, "--data", data_spec(network.case, settings)]
    log = settings.cache / f"{folder.name}.log"
    execute([*admth("admth-train"), *words, "--out", str(folder), "--overwrite"], log=log)
    execute([*admth("admth-export"), "onnx", str(folder)], log=log)
    read_model(folder / "model.onnx")
    write_json(folder / "base.json", {"model.safetensors": base})


def _base(folder: Path) -> str | None:
    import json

    try:
        found: str = json.loads((folder / "base.json").read_text())["model.safetensors"]
    except (OSError, ValueError, KeyError):
        return None
    return found
