"""Small trained-looking runs on real files, shared by the tests of the export room."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from admth_runtime.preprocessing import PreprocessingSpec
from admth_training.checkpoint import RunConfig, save_network, save_run_config
from admth_training.config import DataConfig, FitConfig, NetworkConfig, ObjectiveConfig
from admth_training.network import MultiLengthHashNetwork, build_network


def random_pixels(count: int, size: int, seed: int = 0) -> np.ndarray:
    """Smooth random pictures, uint8 ``[count, size, size, 3]``: unlike noise, they differ on average."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 5, 5, 3), dtype=np.uint8)
    return np.stack([Image.fromarray(picture).resize((size, size), Image.Resampling.BICUBIC) for picture in coarse])


def lively_network(config: NetworkConfig, seed: int = 0) -> MultiLengthHashNetwork:
    """A network whose logits depend on the image and lie around zero, as those of a trained one do.

    With fresh weights every image has nearly the same logits, and equal signs would prove nothing.
    """
    network = build_network(config, seed=seed)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    pixels = torch.from_numpy(random_pixels(48, config.size, seed=99))
    with torch.no_grad():
        for norm in norms:
            norm.momentum = None  # a plain average of what comes by
            norm.reset_running_stats()
            norm.train()
        network.eval()
        for norm in norms:
            norm.train()
        network(pixels)
        network.eval()
        for branch, logits in zip(network.branches, network(pixels), strict=True):
            last, spread = branch[-1], logits.std(dim=0).clamp_min(1e-6)
            last.weight.div_(spread[:, None])
            last.bias.copy_((last.bias - logits.median(dim=0).values) / spread)
    return network


def write_run(folder: Path, network: MultiLengthHashNetwork, spec: str, *, query_size: int | None = 24) -> Path:
    """Write what training leaves: ``config.json`` and ``model.safetensors``."""
    folder.mkdir(parents=True, exist_ok=True)
    size = network.config.size
    config = RunConfig(
        network=network.config,
        objective=ObjectiveConfig(),
        fit=FitConfig(),
        preprocessing=PreprocessingSpec(size, size),
        data=DataConfig(spec, query_size=query_size),
        pretrained=False,
    )
    save_run_config(folder, config)
    save_network(folder / "model.safetensors", network)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _few_threads():
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """A folder of 3 classes with 24 PNG files each."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, name in enumerate(("bag", "boot", "coat")):
        (folder / name).mkdir()
        for index, pixels in enumerate(random_pixels(24, 40, seed=number)):
            tinted = pixels.copy()
            tinted[:, :, number] //= 2
            Image.fromarray(tinted).save(folder / name / f"{index:02}.png")
    return folder


@pytest.fixture(scope="session")
def tiny_network() -> MultiLengthHashNetwork:
    return lively_network(NetworkConfig(input_size=32, hidden=16, code_lengths=(8, 16)))


@pytest.fixture
def tiny_run(tmp_path, tiny_network, pictures) -> Path:
    """A finished run of EfficientNet-Lite0 at 32 pixels with 24 queries; each test has its own copy."""
    return write_run(tmp_path / "run", tiny_network, f"folder:{pictures}")


@pytest.fixture(scope="session")
def exported(tmp_path_factory, tiny_network, pictures) -> Path:
    """A run with an exported model that passed the gate; tests copy what they change."""
    from admth_export import export_onnx

    run = write_run(tmp_path_factory.mktemp("exported") / "run", tiny_network, f"folder:{pictures}")
    export_onnx(run)
    return run


@pytest.fixture(scope="session")
def make_network():
    return lively_network


@pytest.fixture(scope="session")
def make_run():
    return write_run


@pytest.fixture(scope="session")
def make_pixels():
    return random_pixels
