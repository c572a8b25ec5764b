"""A run's folder: ``model.safetensors``, ``config.json`` and ``metrics.jsonl``. Nothing in it is a pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from admth_runtime._version import __version__
from admth_runtime.errors import CheckpointError, InputError, ManifestError, OutputError
from admth_runtime.files import atomic_path, sha256_of_file, write_json
from admth_runtime.preprocessing import PreprocessingSpec
from admth_training.config import (
    DataConfig,
    FitConfig,
    NetworkConfig,
    ObjectiveConfig,
    QatConfig,
    from_dict,
    to_dict,
)
from admth_training.network import MultiLengthHashNetwork, build_network
from admth_training.qat import quantize_network

__all__ = [
    "CONFIG_FILE",
    "METRICS_FILE",
    "WEIGHTS_FILE",
    "RunConfig",
    "TrainedRun",
    "check_tensors",
    "load_run",
    "load_run_config",
    "read_metrics",
    "save_network",
    "save_run_config",
    "save_tensors",
]

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.jsonl"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class RunConfig:
    """Everything that defines a run, as ``config.json`` holds it.

    Attributes:
        network: the network's shape.
        objective: weights of the loss.
        fit: how it is trained.
        preprocessing: how an image becomes pixels.
        data: which images.
        pretrained: whether the trunk started from ImageNet weights.
        qat: how a quantised network was made of an FP32 run's; None for an FP32 run.

    """

    network: NetworkConfig
    objective: ObjectiveConfig
    fit: FitConfig
    preprocessing: PreprocessingSpec
    data: DataConfig
    pretrained: bool
    qat: QatConfig | None = None

    def __post_init__(self) -> None:
        if self.qat is not None and self.fit.precision == "bf16":
            raise InputError("precision 'bf16' has too few bits for the integers of a quantised network: use 'fp32'")

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, the inverse of :meth:`from_dict`."""
        values = {
            "format_version": FORMAT_VERSION,
            "created_by": f"admth {__version__}",
            "network": to_dict(self.network),
            "objective": to_dict(self.objective),
            "fit": to_dict(self.fit),
            "preprocessing": self.preprocessing.to_dict(),
            "data": to_dict(self.data),
            "pretrained": self.pretrained,
        }
        return values if self.qat is None else {**values, "qat": to_dict(self.qat)}

    @classmethod
    def from_dict(cls, values: Any, *, source: str) -> RunConfig:
        """Read the JSON form.

        Raises:
            CheckpointError: a part is missing, unknown, out of range, or of a newer format.

        """
        if not isinstance(values, dict):
            raise CheckpointError(f"{source}: is not a JSON object: train again")
        version = values.get("format_version")
        if version != FORMAT_VERSION:
            raise CheckpointError(f"{source}: format version {version!r} is not {FORMAT_VERSION}: pip install -U admth")
        parts: dict[str, dict[str, Any]] = {}
        for name in ("network", "objective", "fit", "preprocessing", "data"):
            part = values.get(name)
            if not isinstance(part, dict):
                raise CheckpointError(f"{source}: the part {name!r} is missing: train again")
            parts[name] = part
        try:
            preprocessing = PreprocessingSpec.from_dict(parts["preprocessing"])
        except ManifestError as error:
            raise CheckpointError(f"{source}: {error}") from error
        qat = values.get("qat")
        if qat is not None and not isinstance(qat, dict):
            raise CheckpointError(f"{source}: the part 'qat' is not a JSON object: train again")
        try:
            return cls(
                network=from_dict(NetworkConfig, parts["network"], source=source),
                objective=from_dict(ObjectiveConfig, parts["objective"], source=source),
                fit=from_dict(FitConfig, parts["fit"], source=source),
                preprocessing=preprocessing,
                data=from_dict(DataConfig, parts["data"], source=source),
                pretrained=bool(values.get("pretrained", False)),
                qat=None if qat is None else from_dict(QatConfig, qat, source=source),
            )
        except InputError as error:
            raise CheckpointError(f"{source}: {error}") from error


@dataclass(frozen=True)
class TrainedRun:
    """A run that was read back.

    Attributes:
        folder: where it lies.
        config: its configuration.
        network: the network in evaluation mode, FP32, on the CPU; that of a QAT run rounds to its integers.
        checkpoint_sha256: SHA-256 of ``model.safetensors``.

    """

    folder: Path
    config: RunConfig
    network: MultiLengthHashNetwork
    checkpoint_sha256: str


def save_run_config(folder: Path, config: RunConfig) -> None:
    """Write ``config.json``."""
    write_json(folder / CONFIG_FILE, config.to_dict())


def save_network(path: Path, network: MultiLengthHashNetwork) -> None:
    """Write the weights as safetensors, by rename.

    Raises:
        OutputError: the file cannot be written; whatever was there stays.

    """
    save_tensors(path, network.state_dict(), metadata={})


def save_tensors(path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str]) -> None:
    """Write tensors as safetensors, by rename.

    Args:
        path: the file.
        tensors: by name, on any device.
        metadata: text values for the file's header, beside the format. The library writes them in any order, so only
            a file without them is the same to the byte for equal tensors.

    Raises:
        OutputError: the file cannot be written; whatever was there stays.

    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {"format": "pt", **metadata}
    with atomic_path(path) as temporary:
        try:
            save_file(plain, temporary, metadata=header)
        except SafetensorError as error:
            # The library wraps the system's error, a full disk say, in one of its own.
            raise OutputError(f"cannot write {path}: {error}; free space or choose another --out") from error


def load_run_config(folder: str | Path) -> RunConfig:
    """Read ``config.json`` of a run's folder.

    Raises:
        CheckpointError: the folder or the file is missing, is not JSON, or holds values out of range.

    """
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{folder} is not a run's folder, it holds no {CONFIG_FILE}: run  admth-train fit --out {folder}"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}): train again") from error
    return RunConfig.from_dict(values, source=str(path))


def load_run(folder: str | Path) -> TrainedRun:
    """Read a run's configuration and weights.

    Raises:
        CheckpointError: a file is missing or broken, or the weights are not those of the configuration.

    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    config = load_run_config(folder)
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{folder} holds no {WEIGHTS_FILE}: finish training with  admth-train fit --out {folder} --resume"
        )
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: is not a complete safetensors file ({error}): train again") from error
    network = build_network(config.network)
    if config.qat is not None:
        quantize_network(network, config.qat.target)
    check_tensors(network.state_dict(), tensors, path=path)
    network.load_state_dict(tensors)
    return TrainedRun(folder, config, network.eval(), sha256_of_file(path))


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """Read ``metrics.jsonl``, a JSON object an epoch; an unfinished last line is left out.

    Raises:
        CheckpointError: the file is missing, or a line before the last is not JSON.

    """
    path = Path(folder) / METRICS_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no {METRICS_FILE}: run  admth-train fit --out {folder}")
    lines = path.read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:  # noqa: PERF203 - the line number belongs into the message
            if number < len(lines):
                raise CheckpointError(f"{path}: line {number} is not JSON ({error}): train again") from error
    return records


def check_tensors(expected_tensors: Mapping[str, Tensor], tensors: Mapping[str, Tensor], *, path: Path) -> None:
    """Hold tensors that were read to those that the configuration asks for.

    Raises:
        CheckpointError: a name is missing or unknown, or a shape or dtype differs; three of the differences are named.

    """
    expected = {name: _describe(tensor) for name, tensor in expected_tensors.items()}
    found = {name: _describe(tensor) for name, tensor in tensors.items()}
    if expected == found:
        return
    differences = [f"{name} is missing" for name in expected if name not in found]
    differences += [f"{name} is unknown" for name in found if name not in expected]
    differences += [
        f"{name} is {found[name]} instead of {text}"
        for name, text in expected.items()
        if name in found and found[name] != text
    ]
    more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
    raise CheckpointError(
        f"{path}: the weights are not those of {CONFIG_FILE}: {'; '.join(differences[:3])}{more}: "
        "restore the config.json that was written with them"
    )


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
