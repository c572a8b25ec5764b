"""Shared fixtures of the runtime's tests."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

# Test modules are imported by path, so their neighbours are found only if we say where they are.
sys.path.insert(0, str(Path(__file__).parent))

from _tiny_model import SIZE, save_tiny_model


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory) -> Path:
    """A model file with 16-, 32-, 48- and 64-bit codes for 12x12 pictures."""
    return save_tiny_model(tmp_path_factory.mktemp("model") / "model.onnx")


@pytest.fixture
def pixels() -> np.ndarray:
    """Seventy pictures of the network's own size, uint8 [70, 12, 12, 3]."""
    return np.random.default_rng(7).integers(0, 256, (70, SIZE, SIZE, 3), dtype=np.uint8)
