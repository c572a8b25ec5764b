"""Tests on a real GPU: without one, each is skipped with the driver's own reason before anything is prepared."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from admth_runtime.driver import ask_driver

REPOSITORY = Path(__file__).resolve().parents[2]
FLAVOURS = {"tensorrt": ("tensorrt",), "rtx": ("tensorrt_rtx",)}
PRECISIONS = ("fp32", "fp16", "int8")
BATCH = (2, 8, 16)
DATA = f"fashion-mnist:{REPOSITORY / 'examples' / 'fashion-mnist-mini'}"
DEMO = REPOSITORY / "runs" / "demo"
TRAINING = {
    "efficientnet_lite0": ["--backbone", "efficientnet_lite0", "--input-size", "96", "--freeze-trunk"],
    "cnnf": ["--backbone", "cnnf", "--hidden", "256", "--epochs", "5"],
}


def pytest_runtest_setup(item: pytest.Item) -> None:
    facts = ask_driver()
    if facts.problem is not None:
        pytest.skip(f"needs an NVIDIA GPU: {facts.problem}")


def gate_images(count: int = 400):
    """The query images that the gates take here."""
    from admth_export import ImageChoice

    return ImageChoice(data=DATA, images=count, database_images=0)


@dataclass(frozen=True)
class Case:
    """An engine and what PyTorch gives for the same pixels.

    Attributes:
        engine: the engine's path.
        onnx: the FP32 model that it came from.
        precision: ``"fp32"``, ``"fp16"`` or ``"int8"``.
        pixels: uint8 ``[n, H, W, 3]``.
        reference: float32 logits ``[n, L]`` by code length, of PyTorch in FP32 on the CPU.
    """

    engine: Path
    onnx: Path
    precision: str
    pixels: np.ndarray
    reference: dict[int, np.ndarray]


@pytest.fixture(scope="session", params=FLAVOURS)
def flavour(request) -> str:
    name = request.param
    module = FLAVOURS[name][0]
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    if name == "rtx" and ask_driver().gpus[0][1] not in ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121"):
        pytest.skip(f"TensorRT-RTX does not run on {ask_driver().gpus[0]}")
    return name


@pytest.fixture(scope="session", params=["efficientnet_lite0", "cnnf"])
def backbone(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def run_of(tmp_path_factory) -> Callable[[str], tuple[Path, np.ndarray, dict[int, np.ndarray]]]:
    """Gives a trained run with its ONNX model, 64 query images, and PyTorch's logits for them, once a backbone.

    It is trained, since the signs of a network with fresh weights hang on the last digit. The demo's run is taken where
    it is there.
    """
    made: dict[str, tuple[Path, np.ndarray, dict[int, np.ndarray]]] = {}

    def make(backbone: str) -> tuple[Path, np.ndarray, dict[int, np.ndarray]]:
        if backbone not in made:
            import torch

            from admth_export import export_onnx
            from admth_export.gate_images import load_gate_images
            from admth_training.checkpoint import load_run

            run = tmp_path_factory.mktemp(backbone) / "run"
            if backbone == "efficientnet_lite0" and (DEMO / "model.safetensors").is_file():
                run.mkdir()
                for name in ("model.safetensors", "config.json", "splits.json"):
                    shutil.copy(DEMO / name, run / name)
            else:
                command = [sys.executable, "-m", "admth_training", "fit", "--data", DATA, "--out", str(run)]
                subprocess.run([*command, *TRAINING[backbone]], check=True)
            export_onnx(run, images=gate_images())
            trained = load_run(run)
            pixels = load_gate_images(trained, gate_images(64)).pixels
            network = trained.network.eval()
            with torch.inference_mode():
                logits = network(torch.from_numpy(pixels))
            lengths = network.config.code_lengths
            reference = {length: value.numpy() for length, value in zip(lengths, logits, strict=True)}
            made[backbone] = (run, pixels, reference)
        return made[backbone]

    return make


@pytest.fixture(scope="session")
def build(flavour, run_of) -> Callable[[str, str], Case]:
    """Builds an engine of a backbone and a precision for this GPU, once."""
    made: dict[tuple[str, str], Case] = {}

    def make(backbone: str, precision: str) -> Case:
        key = (backbone, precision)
        if key not in made:
            from admth_calibration import CalibrationOptions, calibrate
            from admth_export.tensorrt.building import export_engine
            from admth_export.tensorrt.options import EngineOptions, EnginePrecision
            from admth_runtime.sidecar import BatchProfile

            run, pixels, reference = run_of(backbone)
            source = run / "model.onnx"
            if precision == "int8":
                source = run / "model.int8.trt.onnx"
                if not source.exists():
                    calibrate(run / "model.onnx", DATA, source, options=CalibrationOptions(target="trt"))
            gpus = (ask_driver().gpus[0][1],) if flavour == "rtx" else ()
            result = export_engine(
                source,
                run / f"{flavour}.{precision}{'.rtx' if flavour == 'rtx' else '.plan'}",
                precision=EnginePrecision.of_flags(**{name: name == precision for name in PRECISIONS}),
                flavour=flavour,
                options=EngineOptions(batch=BatchProfile(*BATCH), gpus=gpus),
                run=run,
                images=gate_images(),
            )
            made[key] = Case(result.file, run / "model.onnx", precision, pixels, reference)
        return made[key]

    return make


@pytest.fixture(params=PRECISIONS)
def case(request, build) -> Case:
    """An EfficientNet-Lite0 engine of each precision."""
    return build("efficientnet_lite0", request.param)


@pytest.fixture
def check():
    """Holds codes against PyTorch's logits with the gate of the precision."""
    from admth_export.gate import Gate
    from admth_export.parity import compare_run

    def compare(case: Case, codes, rows=slice(None), batch_size: int = 1) -> None:
        reference = {length: logits[rows] for length, logits in case.reference.items()}
        count = len(next(iter(reference.values())))
        run = compare_run(
            reference,
            codes.logits,
            {length: codes[length] for length in codes},
            batch_size=batch_size,
            names=[f"picture {number}" for number in range(count)],
            indices=np.arange(count),
        )
        assert Gate.of_precision(case.precision).judge([run]) == ()

    return compare


@pytest.fixture
def free_memory() -> Callable[[], int]:
    """Bytes of the GPU's memory that nobody uses."""
    from cuda.bindings import driver

    def ask() -> int:
        driver.cuInit(0)
        _, device = driver.cuDeviceGet(0)
        _, context = driver.cuDevicePrimaryCtxRetain(device)
        driver.cuCtxPushCurrent(context)
        code, free, _ = driver.cuMemGetInfo()
        driver.cuCtxPopCurrent()
        driver.cuDevicePrimaryCtxRelease(device)
        assert int(code) == 0
        return int(free)

    return ask
