"""The FP32 networks: trained, exported and proved by the commands that a user would type, once, and kept."""

from __future__ import annotations

import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

from admth_runtime.console import note
from admth_runtime.files import write_json
from int8.processes import WorkError, admth, execute
from int8.settings import Case, Settings

__all__ = ["EMOJI_PACKAGE", "Network", "data_spec", "prepare_network"]

EMOJI_PACKAGE = "emoji-datasource-google@16.0.0"


@dataclass(frozen=True)
class Network:
    """A finished run with its exported model.

    Attributes:
        case: what it is.
        folder: the run's folder.
        models: where its INT8 models are.
    """

    case: Case
    folder: Path
    models: Path

    @property
    def onnx(self) -> Path:
        """The FP32 model, whose bits ``admth-export onnx`` has proved equal to PyTorch's."""
        return self.folder / "model.onnx"


def prepare_network(case: Case, settings: Settings) -> Network:
    """Train and export, or take what an earlier call with the same options left.

    Raises:
        WorkError: a command failed.
    """
    folder = settings.cache / case.name
    words = ["fit", "--data", data_spec(case, settings), *case.fit]
    recipe = shlex.join(words)
    network = Network(case, folder, folder / "int8")
    if not (network.onnx.is_file() and _recipe(folder) == recipe):
        note(f"training {case.title}: about {case.minutes} minutes")
        execute([*admth("admth-train"), *words, "--out", str(folder), "--overwrite"])
        execute([*admth("admth-train"), "evaluate", str(folder)])
        execute([*admth("admth-export"), "onnx", str(folder)])
        write_json(folder / "recipe.json", {"command": recipe})
        shutil.rmtree(network.models, ignore_errors=True)
    network.models.mkdir(exist_ok=True)
    return network


def data_spec(case: Case, settings: Settings) -> str:
    """Return the data set's specification; emoji are downloaded where they were not named."""
    if case.data == "fashion":
        return f"fashion-mnist:{settings.fashion.resolve()}"
    folder = settings.emoji or settings.cache / "emoji"
    if settings.emoji is None and not (folder / "package" / "emoji.json").is_file():
        _download_emoji(folder)
    return f"emoji:{folder.resolve()}"


def _download_emoji(folder: Path) -> None:
    if shutil.which("npm") is None:
        raise WorkError(f"npm is not installed: get {EMOJI_PACKAGE} in another way, unpack it, and pass --emoji DIR")
    folder.mkdir(parents=True, exist_ok=True)
    note(f"downloading {EMOJI_PACKAGE}, 74 MB")
    printed = execute(["npm", "pack", "--silent", "--pack-destination", str(folder), EMOJI_PACKAGE]).output
    archive = folder / printed.split()[-1]
    shutil.unpack_archive(archive, folder, filter="data")
    archive.unlink()


def _recipe(folder: Path) -> str | None:
    import json

    try:
        command: str = json.loads((folder / "recipe.json").read_text())["command"]
    except (OSError, ValueError, KeyError):
        return None
    return command
