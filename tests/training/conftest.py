"""What the tests of training share: a small folder of pictures, and a small run's configuration."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """Return a folder of three classes, twelve pictures each, told apart by colour, with noise."""
    root = tmp_path_factory.mktemp("tiny")
    rng = np.random.default_rng(0)
    for name, colour in (("red", (200, 40, 40)), ("green", (40, 190, 60)), ("blue", (50, 60, 210))):
        (root / name).mkdir()
        for number in range(12):
            pixels = np.clip(np.array(colour) + rng.normal(0, 40, size=(40, 44, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number:02}.png")
    return root


@pytest.fixture
def tiny_config(tiny_folder):
    """Return a function that makes the configuration of a run of a second or two; it takes parts of FitConfig."""

    def make(*, data: Path = tiny_folder, network: dict | None = None, pretrained: bool = False, **fit):
        from admth_runtime.preprocessing import PreprocessingSpec
        from admth_training.checkpoint import RunConfig
        from admth_training.config import DataConfig, FitConfig, NetworkConfig, ObjectiveConfig

        shape = NetworkConfig(**{"code_lengths": (8, 16), "input_size": 32, "hidden": 16, **(network or {})})
        return RunConfig(
            network=shape,
            objective=ObjectiveConfig(),
            fit=FitConfig(**{"epochs": 2, "batch_size": 8, "freeze_trunk": True, **fit}),
            preprocessing=PreprocessingSpec(shape.size, shape.size),
            data=DataConfig(f"folder:{data}", query_size=6),
            pretrained=pretrained,
        )

    return make


@pytest.fixture
def more_epochs():
    """Return a function that gives a configuration another number of epochs."""
    return lambda config, epochs: replace(config, fit=replace(config.fit, epochs=epochs))
