"""The one tree of errors that every room of admth raises.

Each message says what is wrong, with the value, and ends with the command or the argument that mends it.
Command-line programs print it as one line and exit with code 1, so a message holds no line breaks.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

__all__ = [
    "AdmthError",
    "CheckpointError",
    "CodeLengthError",
    "DataError",
    "DeviceError",
    "ImageError",
    "InputError",
    "ManifestError",
    "MissingExtraError",
    "ModelError",
    "OutputError",
    "ParityError",
    "PipelineError",
    "QueueFullError",
    "SelfTestError",
    "TrainingError",
    "require",
]


class AdmthError(Exception):
    """Base of every error that admth raises on purpose."""


class InputError(AdmthError, ValueError):
    """An argument is of the wrong kind, shape, dtype or range."""


class CodeLengthError(InputError, KeyError):
    """A code length that the model or file does not have; a ``KeyError`` too, since lengths are looked up by key."""

    __str__ = Exception.__str__  # KeyError would print the message's repr


class ImageError(AdmthError):
    """An image cannot be read, or is refused, by name."""


class ModelError(AdmthError):
    """A model file is missing, broken, unsafe, or not one of ours."""


class ManifestError(ModelError):
    """A manifest is missing, malformed, too new, or disagrees with its model."""


class DeviceError(AdmthError):
    """The inference engine or the device asked for cannot be had."""


class MissingExtraError(AdmthError, ImportError):
    """A package that this task needs is not installed; the message holds the one command that installs it."""


class OutputError(AdmthError):
    """A result cannot be written; nothing half-written is left behind."""


class PipelineError(AdmthError):
    """A pipeline cannot go on: its source vanished, its sink failed, or a stage is stuck."""


class QueueFullError(PipelineError):
    """A frame was rejected, because as many as allowed wait already."""


class SelfTestError(AdmthError):
    """A model gives other codes here than its golden vectors say."""


class DataError(AdmthError):
    """A data set, a label file or a split is unusable."""


class CheckpointError(AdmthError):
    """A training run's folder is missing, incomplete, or its weights do not match its configuration."""


class TrainingError(AdmthError):
    """Training cannot go on, for example because the loss is no longer finite."""


class ParityError(AdmthError):
    """An engine's bits differ from PyTorch's beyond the gate."""


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import an optional dependency, or say how to install it.

    Args:
        module: the import name, such as ``"onnxruntime"``.
        extra: the extra of the ``admth`` distribution that brings it, such as ``"cpu"``.
        purpose: what needs it, as the start of a sentence: ``"encoding images"``.

    Returns:
        The imported module.

    Raises:
        MissingExtraError: the module is absent, or is there and fails to import.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if isinstance(error.__cause__, KeyboardInterrupt):  # while a library's native code was loading
            raise KeyboardInterrupt from error
        if importlib.util.find_spec(module.partition(".")[0]) is None:
            state = f"the package {module.partition('.')[0]}, which is not installed"
        else:
            state = f"{module}, which is installed but fails to import ({error})"
        raise MissingExtraError(f"{purpose} needs {state}: run  pip install 'admth[{extra}]'") from error
