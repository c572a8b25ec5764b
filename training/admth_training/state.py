"""What makes a run resumable: the folder's lock, ``state.safetensors``, and ``metrics.jsonl`` cut to the same epoch.

``state.safetensors`` holds the weights and the optimizer's tensors after a whole epoch. Random choices need no state,
since each epoch draws its own (:mod:`admth_training.seeds`), and neither does the learning rate, which follows from the
epoch. The file stays when a run ends, so that the run can be given more epochs; deleting it costs only that.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from admth_runtime.errors import CheckpointError, OutputError, require
from admth_runtime.files import write_text
from admth_training.checkpoint import (
    CONFIG_FILE,
    METRICS_FILE,
    WEIGHTS_FILE,
    RunConfig,
    check_tensors,
    load_run_config,
    read_metrics,
    save_tensors,
)
from admth_training.network import MultiLengthHashNetwork

__all__ = [
    "LOCK_FILE",
    "SPLITS_FILE",
    "STATE_FILE",
    "append_metrics",
    "check_claim",
    "clear_run",
    "cut_metrics",
    "load_state",
    "run_lock",
    "save_state",
    "saved_epoch",
]

STATE_FILE = "state.safetensors"
SPLITS_FILE = "splits.json"
LOCK_FILE = ".lock"
_RUN_FILES = (CONFIG_FILE, WEIGHTS_FILE, METRICS_FILE, STATE_FILE)
_DERIVED_FILES = (SPLITS_FILE, "evaluation.json", "evaluation.png")
_WEIGHTS, _OPTIMIZER = "network/", "optimizer/"


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the folder for one process; the system releases it when the process dies.

    Raises:
        OutputError: another process trains into this folder, or the lock cannot be made.

    """
    filelock = require("filelock", extra="train", purpose="training")
    lock = filelock.FileLock(str(folder / LOCK_FILE), timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise OutputError(
            f"{folder} is in use: another training run writes into it; wait for it, or choose another place with --out"
        ) from error
    except OSError as error:
        raise OutputError(f"cannot write {folder / LOCK_FILE}: {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.release()


def check_claim(folder: Path, config: RunConfig, *, resume: bool, overwrite: bool) -> bool:
    """Decide whether a run continues the one in its folder; nothing is touched.

    Returns:
        True to continue, False to start from the beginning.

    Raises:
        OutputError: the folder holds a run and neither ``resume`` nor ``overwrite`` was asked for.
        CheckpointError: the run there has another configuration, or is broken.

    """
    if resume and overwrite:
        raise OutputError("--resume and --overwrite exclude each other: choose one")
    present = [name for name in _RUN_FILES if (folder / name).exists()]
    if not present or overwrite:
        return False
    if not resume:
        kind = "a finished" if WEIGHTS_FILE in present else "an unfinished"
        raise OutputError(
            f"{folder} already holds {kind} run: continue it with --resume, replace it with --overwrite, "
            "or choose another --out"
        )
    if WEIGHTS_FILE in present and STATE_FILE not in present:
        raise CheckpointError(
            f"{folder} holds a finished run without its {STATE_FILE}, which --resume needs: start anew with --overwrite"
        )
    differences = _differences(load_run_config(folder), config)
    if differences:
        more = f"; and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise CheckpointError(
            f"{folder} was started with another configuration: {'; '.join(differences[:5])}{more}: "
            "leave these options out, or start anew with --overwrite"
        )
    return True


def clear_run(folder: Path) -> None:
    """Remove the files of an earlier run; what was made from them elsewhere, such as exports, stays.

    Raises:
        OutputError: a file cannot be removed.

    """
    try:
        for name in (*_RUN_FILES, *_DERIVED_FILES):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot remove {error.filename}: {error.strerror}") from error


def save_state(folder: Path, network: MultiLengthHashNetwork, optimizer: torch.optim.Optimizer, *, epoch: int) -> None:
    """Write the state after a whole epoch, by rename.

    Raises:
        OutputError: it cannot be written; the state before it stays.

    """
    tensors = {f"{_WEIGHTS}{name}": tensor for name, tensor in network.state_dict().items()}
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in network.named_parameters()}
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{_OPTIMIZER}{names[parameter]}/{key}"] = value
    save_tensors(folder / STATE_FILE, tensors, metadata={"state": json.dumps({"format_version": 1, "epoch": epoch})})


def saved_epoch(folder: Path) -> int:
    """Return the epoch of the saved state, 0 where there is none yet.

    Raises:
        CheckpointError: the file is broken or of a newer version.

    """
    path = folder / STATE_FILE
    if not path.exists():
        return 0
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            state = json.loads((file.metadata() or {}).get("state", "null"))
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}): start anew with --overwrite") from error
    if not isinstance(state, dict) or state.get("format_version") != 1 or not isinstance(state.get("epoch"), int):
        raise CheckpointError(f"{path}: is no state that this version reads: pip install -U admth, or use --overwrite")
    return int(state["epoch"])


def load_state(folder: Path, network: MultiLengthHashNetwork, optimizer: torch.optim.Optimizer) -> int:
    """Put the saved weights and the optimizer's tensors back, and return their epoch.

    Raises:
        CheckpointError: the file is broken, or its tensors are not those of the network.

    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    epoch = saved_epoch(folder)
    if epoch == 0:
        return 0
    path = folder / STATE_FILE
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}): start anew with --overwrite") from error
    weights = {name.removeprefix(_WEIGHTS): t for name, t in tensors.items() if name.startswith(_WEIGHTS)}
    check_tensors(network.state_dict(), weights, path=path)
    network.load_state_dict(weights)
    optimizer.state.clear()
    parameters = dict(network.named_parameters())
    for name, tensor in tensors.items():
        if name.startswith(_OPTIMIZER):
            owner, _, key = name.removeprefix(_OPTIMIZER).rpartition("/")
            if owner not in parameters:
                raise CheckpointError(f"{path}: the optimizer's tensor {name} is unknown: start anew with --overwrite")
            # AdamW counts its steps in a scalar on the CPU; everything else lies beside its parameter.
            device = parameters[owner].device if tensor.ndim else "cpu"
            optimizer.state[parameters[owner]][key] = tensor.to(device)
    return epoch


def append_metrics(folder: Path, record: dict[str, Any]) -> None:
    """Add a line to ``metrics.jsonl`` and bring it to the disk.

    Raises:
        OutputError: it cannot be written.

    """
    path = folder / METRICS_FILE
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}; continue later with --resume") from error


def cut_metrics(folder: Path, epoch: int) -> list[dict[str, Any]]:
    """Keep the lines up to an epoch, those that the saved state includes, and return them.

    Raises:
        CheckpointError: the file is broken, or ends before the state.
        OutputError: it cannot be written.

    """
    path = folder / METRICS_FILE
    if epoch == 0 and not path.exists():
        return []
    kept = [record for record in read_metrics(folder) if record.get("epoch", 0) <= epoch]
    if [record.get("epoch") for record in kept] != list(range(1, epoch + 1)):
        raise CheckpointError(
            f"{path}: does not hold the {epoch} epochs of {STATE_FILE}: restore it, or start anew with --overwrite"
        )
    write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
    return kept


def _differences(old: RunConfig, new: RunConfig) -> list[str]:
    """Name what differs between two configurations; more epochs are no difference, nor is where the FP32 run lies."""
    before, after = _flatten(old.to_dict()), _flatten(new.to_dict())
    before.pop("qat.base_run", None), after.pop("qat.base_run", None)
    if new.fit.epochs >= old.fit.epochs:
        before["fit.epochs"] = after["fit.epochs"]
    return [
        f"{name} is {before.get(name)!r} there and {after.get(name)!r} here"
        for name in before | after
        if name != "created_by" and before.get(name) != after.get(name)
    ]


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
