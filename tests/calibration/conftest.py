"""Small models to calibrate, exported from real networks, and real picture files."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from admth_calibration.fitting_layers import LayerFitter
from admth_calibration.graph import Graph, load_graph
from admth_calibration.layers import find_layers
from admth_calibration.observing import Observation, observe
from admth_calibration.pixels import with_exact_pixels
from admth_calibration.places import find_places
from admth_calibration.probing import open_probe
from admth_calibration.recipe import Candidate, Recipe
from admth_export.onnx_export import build_model
from admth_export.options import OnnxOptions
from admth_runtime.manifest import Manifest
from admth_runtime.preprocessing import PreprocessingSpec
from admth_training.backbones.efficientnet_lite0 import load_imagenet_weights
from admth_training.config import NetworkConfig
from admth_training.network import build_network


def smooth_pixels(count: int, size: int, seed: int) -> np.ndarray:
    """Smooth random pictures, uint8 ``[count, size, size, 3]``."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 5, 5, 3), dtype=np.uint8)
    return np.stack([Image.fromarray(picture).resize((size, size), Image.Resampling.BICUBIC) for picture in coarse])


def export(path: Path, config: NetworkConfig) -> Path:
    """Export a network whose logits lie around zero, as those of a trained one do."""
    network = build_network(config, seed=0).eval()
    if config.backbone == "efficientnet_lite0":
        load_imagenet_weights(network.trunk)
    pixels = torch.from_numpy(smooth_pixels(48, config.size, 99))
    with torch.no_grad():
        for branch, logits in zip(network.branches, network(pixels), strict=True):
            last, spread = branch[-1], logits.std(dim=0).clamp_min(1e-6)
            last.weight.div_(spread[:, None])
            last.bias.copy_((last.bias - logits.median(dim=0).values) / spread)
    spec = PreprocessingSpec(config.size, config.size)
    manifest = Manifest(config.code_lengths, spec, {"backbone": config.backbone}, "ab" * 32)
    onnx.save(build_model(network, manifest, OnnxOptions()), path)
    return path


@pytest.fixture(scope="session", autouse=True)
def _few_threads():
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def lite(tmp_path_factory) -> Path:
    config = NetworkConfig(input_size=64, hidden=24, code_lengths=(16, 32))
    return export(tmp_path_factory.mktemp("lite") / "model.onnx", config)


@pytest.fixture(scope="session")
def cnnf(tmp_path_factory) -> Path:
    config = NetworkConfig(backbone="cnnf", input_size=67, hidden=24, code_lengths=(16,))
    return export(tmp_path_factory.mktemp("cnnf") / "model.onnx", config)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """A folder with 160 PNG files."""
    folder = tmp_path_factory.mktemp("pictures")
    for index, pixels in enumerate(smooth_pixels(160, 48, 7)):
        Image.fromarray(pixels).save(folder / f"{index:03}.png")
    return folder


@pytest.fixture(scope="session")
def make_smooth():
    return smooth_pixels


@pytest.fixture(scope="session")
def export_network():
    return export


@dataclass(frozen=True, eq=False)
class Case:
    """A small network and what was observed of it."""

    model: onnx.ModelProto
    graph: Graph
    observations: dict[str, Observation]
    pixels: np.ndarray

    def of(self, model: onnx.ModelProto) -> Case:
        """The case of a changed model, with what was observed of this one."""
        return Case(model, Graph(model), self.observations, self.pixels)

    def recipe(self, target: str, rounding: str = "zero-sum", method: str = "mse", **changes) -> Recipe:
        fitter = LayerFitter(rounding, half=target == "trt", largest=changes.pop("largest", 127))
        return Recipe(self.graph, target, self.observations, method, fitter, **changes)


@pytest.fixture(scope="session")
def case(lite, cnnf):
    """Give a backbone's network with everything observed on 48 smooth pictures; each is made once."""
    files = {"lite": (lite, 64), "cnnf": (cnnf, 67)}

    @cache
    def get(backbone: str) -> Case:
        path, size = files[backbone]
        model = load_graph(str(path))
        graph = Graph(with_exact_pixels(model))
        layers = find_layers(graph)
        tensors = {name for layer in layers.values() for name in (layer.source, layer.result)}
        tensors |= set(find_places(graph, layers, "cpu").ranged)
        pixels = smooth_pixels(48, size, 1)
        names = sorted(tensors - {output.name for output in graph.model.graph.output})
        observations = dict(observe(graph.model, names, lambda: iter(np.split(pixels, 3)), histograms=True))
        return Case(model, graph, observations, pixels)

    return get


@pytest.fixture(scope="session")
def candidate(case):
    """Give the model of a backbone for a target with every layer in INT8; each is made once."""

    @cache
    def get(backbone: str, target: str) -> Candidate:
        return case(backbone).recipe(target).fit(case(backbone).pixels[:16])

    return get


@pytest.fixture(scope="session")
def run_model():
    """Return the named tensors of a model on pixels, as a list."""

    def run(model: onnx.ModelProto, names: list[str], pixels: np.ndarray, **types: int) -> list[np.ndarray]:
        with open_probe(model, names, types=types) as probe:
            return probe.run(pixels)

    return run
