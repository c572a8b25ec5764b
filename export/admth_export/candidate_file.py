"""What a file that is to be verified says of itself, be it an ONNX model or an engine."""

from __future__ import annotations

from pathlib import Path

from admth_runtime.engine_file import EngineFile, read_engine_file
from admth_runtime.engine_kind import is_engine
from admth_runtime.model import ModelFile, read_model

__all__ = ["read_candidate"]


def read_candidate(path: Path) -> ModelFile | EngineFile:
    """Read a model, or an engine and its sidecar; nothing of it is executed.

    Raises:
        ModelError: it is missing, broken, no model of ours, or not the engine of its sidecar.
    """
    return read_engine_file(path) if is_engine(path) else read_model(path)
