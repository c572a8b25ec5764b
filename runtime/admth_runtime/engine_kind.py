"""Telling an engine from a model apart from reading either: running a model loads nothing that only engines need."""

from __future__ import annotations

from pathlib import Path

__all__ = ["ENGINE_MAGIC", "ENGINE_SUFFIXES", "is_engine"]

ENGINE_SUFFIXES = frozenset({".plan", ".rtx", ".engine", ".trt"})
"""File names that people give to engines."""

ENGINE_MAGIC = {b"ftrt": "tensorrt", b"vtrt": "rtx"}
"""The flavour of an engine by the first bytes of its file."""


def is_engine(path: str | Path) -> bool:
    """Tell whether a file is, or by its name claims to be, a TensorRT engine; False where it cannot be read."""
    path = Path(path)
    if path.suffix.lower() in ENGINE_SUFFIXES:
        return True
    try:
        with path.open("rb") as file:
            return file.read(4) in ENGINE_MAGIC
    except OSError:
        return False
