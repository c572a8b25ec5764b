"""Latency of TensorRT engines on this machine's GPU, beside ONNX Runtime, PyTorch and torch.compile.

Every candidate does the same work: uint8 pixels in the computer's memory to packed codes of all lengths in the
computer's memory. They are timed in turn, so that a drift of the clock hits all of them alike.

    python benchmarks/gpu_latency.py             print the table
    python benchmarks/gpu_latency.py --out FILE  write it, with the card's name
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from importlib import util
from pathlib import Path

import numpy as np
import torch
from _harness import interleave, machine
from numpy.typing import NDArray

from admth_calibration import CalibrationOptions, calibrate
from admth_export import export_onnx
from admth_export.tensorrt.building import export_engine
from admth_export.tensorrt.options import EngineOptions, EnginePrecision
from admth_runtime import AdmthError, HashRuntime
from admth_runtime.driver import CudaFacts, ask_driver
from admth_runtime.files import write_text
from admth_runtime.preprocessing import PreprocessingSpec
from admth_runtime.sidecar import BatchProfile
from admth_training.checkpoint import RunConfig, save_network, save_run_config
from admth_training.config import DataConfig, FitConfig, NetworkConfig, ObjectiveConfig
from admth_training.network import MultiLengthHashNetwork, build_network

PRECISIONS = ("fp32", "fp16", "int8")
BATCHES = (1, 8, 32)
FLAVOURS = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}

Run = Callable[[NDArray[np.uint8]], object]


@dataclass(frozen=True)
class Candidate:
    """One way to run the network.

    Attributes:
        name: as the table calls it.
        run: takes uint8 ``[n, H, W, 3]`` and returns codes in the computer's memory.
    """

    name: str
    run: Run


@dataclass(frozen=True)
class Absent:
    """A way that this machine does not have.

    Attributes:
        name: as the table calls it.
        reason: why not, in one line.
    """

    name: str
    reason: str


def main() -> None:
    """Measure, and print or write the table."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--out", type=Path, help="the Markdown file to write")
    arguments.add_argument("--backbone", choices=("efficientnet_lite0", "cnnf"), action="append")
    arguments.add_argument("--hidden", type=int, help="width of the branches  [default: the backbone's own]")
    arguments.add_argument("--rounds", type=int, default=200, help="timings of each candidate at each batch size")
    chosen = arguments.parse_args()
    facts = ask_driver()
    if facts.problem is not None:
        sys.exit(f"error: {facts.problem}, so nothing is measured or written: run this on a machine with a GPU")
    lines = header(facts)
    for backbone in chosen.backbone or ("efficientnet_lite0", "cnnf"):
        with tempfile.TemporaryDirectory(prefix="admth-latency-") as folder:
            lines += section(backbone, chosen.hidden, Path(folder), facts, chosen.rounds)
    text = "\n".join(lines) + "\n"
    sys.stdout.write(text)
    if chosen.out is not None:
        write_text(chosen.out, text)


def header(facts: CudaFacts) -> list[str]:
    """Say what was measured, on what."""
    names = ", ".join(f"{name} ({capability})" for name, capability in facts.gpus)
    return [
        "# Results on a GPU",
        "",
        f"Measured with `benchmarks/gpu_latency.py` on {datetime.now(timezone.utc):%Y-%m-%d} on **{names}**,",
        f"driver for CUDA {facts.version}, with "
        + ", ".join(f"{name} {value}" for name, value in machine().items())
        + ".",
        "",
        "Milliseconds a batch, median (90th percentile): uint8 pixels in the computer's memory to codes of every",
        "length there. Weights are seeded, which changes no speed; sign parity is what `make test-gpu` checks.",
    ]


def section(backbone: str, hidden: int | None, folder: Path, facts: CudaFacts, rounds: int) -> list[str]:
    """Measure one backbone."""
    config = NetworkConfig(backbone=backbone, hidden=hidden)
    network = build_network(config, seed=0).eval()
    model = exported(network, folder)
    lines = ["", f"## {backbone}, {config.size} pixels, hidden width {config.hidden}", ""]
    lines += ["| | " + " | ".join(f"batch {batch}" for batch in BATCHES) + " |", "| --- " * (len(BATCHES) + 1) + "|"]
    pixels = np.random.default_rng(0).integers(0, 256, (max(BATCHES), config.size, config.size, 3), dtype=np.uint8)
    with ExitStack() as stack:
        found = [*engines(model, folder, facts, stack), *onnx_runtime(model, stack), *pytorch(network)]
        ready = [candidate for candidate in found if isinstance(candidate, Candidate)]
        cells: dict[str, list[str]] = {candidate.name: [] for candidate in ready}
        for batch in BATCHES:
            part = pixels[:batch]
            times = interleave([partial(each.run, part) for each in ready], rounds=rounds, warmup=10)
            for candidate, seconds in zip(ready, times, strict=True):
                high = statistics.quantiles(seconds, n=10)[-1]
                cells[candidate.name].append(f"{1e3 * statistics.median(seconds):.3f} ({1e3 * high:.3f})")
    lines += [f"| {name} | {' | '.join(row)} |" for name, row in cells.items()]
    absent = [each for each in found if isinstance(each, Absent)]
    return [*lines, "", *(f"- {each.name}: not measured, {each.reason}" for each in absent)]


def exported(network: MultiLengthHashNetwork, folder: Path) -> Path:
    """Write a run of the network and its ONNX model, without the gate: fresh weights have no signs to compare."""
    size = network.config.size
    config = RunConfig(
        network=network.config,
        objective=ObjectiveConfig(),
        fit=FitConfig(),
        preprocessing=PreprocessingSpec(size, size),
        data=DataConfig(f"folder:{pictures(folder / 'pictures')}"),
        pretrained=False,
    )
    save_run_config(folder, config)
    save_network(folder / "model.safetensors", network)
    return export_onnx(folder, verify=False).model


def pictures(folder: Path) -> Path:
    """Write 160 pictures to calibrate INT8 with."""
    from PIL import Image

    generator = np.random.default_rng(1)
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for index in range(80):
            coarse = Image.fromarray(generator.integers(0, 256, (6, 6, 3), dtype=np.uint8))
            coarse.resize((96, 96), Image.Resampling.BICUBIC).save(folder / name / f"{index:02}.png")
    return folder


def engines(model: Path, folder: Path, facts: CudaFacts, stack: ExitStack) -> Iterator[Candidate | Absent]:
    """TensorRT engines of every installed flavour and precision, with CUDA graphs and without."""
    for flavour, module in FLAVOURS.items():
        if util.find_spec(module) is None:
            yield Absent(flavour, f"{module} is not installed")
            continue
        for precision in PRECISIONS:
            name = f"{flavour} {precision.upper()}"
            try:
                engine = built(model, folder, flavour, precision, facts)
                for graphs in (True, False):
                    runtime = stack.enter_context(HashRuntime(engine, batch_size=max(BATCHES), cuda_graphs=graphs))
                    yield Candidate(f"{name}{'' if graphs else ', no CUDA graph'}", runtime.encode_pixels)
            except AdmthError as error:
                yield Absent(name, str(error))


def built(model: Path, folder: Path, flavour: str, precision: str, facts: CudaFacts) -> Path:
    """Build an engine for this GPU."""
    source = model
    if precision == "int8":
        source = folder / "model.int8.trt.onnx"
        if not source.exists():
            calibrate(model, f"folder:{folder / 'pictures'}", source, options=CalibrationOptions(target="trt"))
    result = export_engine(
        source,
        folder / f"{flavour}.{precision}{'.rtx' if flavour == 'rtx' else '.plan'}",
        precision=EnginePrecision.of_flags(**{name: name == precision for name in PRECISIONS}),
        flavour=flavour,
        options=EngineOptions(batch=BatchProfile(1, 8, 32), gpus=(facts.gpus[0][1],) if flavour == "rtx" else ()),
        run=folder,
        verify=False,
    )
    return result.file


def onnx_runtime(model: Path, stack: ExitStack) -> Iterator[Candidate | Absent]:
    """ONNX Runtime's providers on the FP32 model."""
    for provider in ("cuda", "tensorrt", "rtx"):
        name = f"ONNX Runtime, {provider}, FP32"
        try:
            runtime = stack.enter_context(HashRuntime(model, provider=provider, batch_size=max(BATCHES)))
        except AdmthError as error:
            yield Absent(name, str(error))
        else:
            yield Candidate(name, runtime.encode_pixels)


def pytorch(network: MultiLengthHashNetwork) -> Iterator[Candidate | Absent]:
    """PyTorch, eager and compiled, in FP32 and FP16."""
    if not torch.cuda.is_available():
        yield Absent("PyTorch", f"PyTorch {torch.__version__} has no CUDA")
        return
    network = network.cuda()
    compiled = torch.compile(network, mode="reduce-overhead")
    for name, module in (("PyTorch eager", network), ("torch.compile", compiled)):
        for half in (False, True):
            yield Candidate(f"{name}, {'FP16' if half else 'FP32'}", _torch_run(module, half))


def _torch_run(module: Callable[[torch.Tensor], tuple[torch.Tensor, ...]], half: bool) -> Run:
    def run(pixels: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
        images = torch.from_numpy(pixels).cuda()
        with torch.inference_mode(), torch.autocast("cuda", torch.float16, enabled=half):
            logits = module(images)
        return [np.packbits((value > 0).cpu().numpy(), axis=1) for value in logits]

    return run


if __name__ == "__main__":
    main()
