"""A finished run on pictures that are made here: what a user has after training, evaluation and export."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

# Test modules are imported by path, so their neighbours are found only if we say where they are.
sys.path.insert(0, str(Path(__file__).parent))

from _rooms import FinishedRun, command

CLASSES = {"red & <dark>": (200, 40, 30), "green": (40, 170, 60), "blue": (40, 60, 200)}
"""The first name must be escaped wherever it is shown."""


def draw_pictures(folder: Path, a_class: int, seed: int) -> None:
    """Write noisy pictures of one colour a class, in a folder a class."""
    rng = np.random.default_rng(seed)
    for name, colour in CLASSES.items():
        (folder / name).mkdir(parents=True)
        for number in range(a_class):
            noise = rng.normal(0, 25, (40, 48, 3)) + np.asarray(colour)
            Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(folder / name / f"{number:03}.png")


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """Train, evaluate and export, by the commands that a user types."""
    base = tmp_path_factory.mktemp("e2e")
    pictures, folder = base / "pictures", base / "runs" / "tiny"
    draw_pictures(pictures, a_class=40, seed=3)
    words = "--input-size 32 --hidden 32 --epochs 6 --batch-size 24 --query-size 30 --code-lengths 16,24,64"
    words += " --freeze-trunk --threads 1 --seed 5"
    fit = command("admth-train", "fit", "--data", f"folder:{pictures}", *words.split(), "--out", str(folder), cwd=base)
    evaluate = command("admth-train", "evaluate", str(folder), cwd=base)
    export = command("admth-export", "onnx", str(folder), cwd=base)
    return FinishedRun(folder, pictures, fit, evaluate, export)
