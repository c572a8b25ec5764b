"""Build every engine of docs/tensorrt.md's table: both backbones, every precision, with size, time and parity.

TensorRT-RTX builds without a GPU, so this runs anywhere on x86-64. The parity is that of the typed ONNX models on the
CPU, the figure that the gate takes before a build; no engine is run.

    python benchmarks/tensorrt_builds.py            print the table
    python benchmarks/tensorrt_builds.py --write    write it into docs/tensorrt.md, between its two marks
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from _harness import DEMO_RUN, ROOT, machine, require_demo_run

from admth_calibration.images import open_images
from admth_export.model_file import write_graph, write_manifest
from admth_export.onnx_export import build_graph, manifest_of
from admth_export.options import OnnxOptions
from admth_runtime.preprocessing import PreprocessingSpec
from admth_training.checkpoint import RunConfig, load_run, save_network, save_run_config
from admth_training.config import DataConfig, FitConfig, NetworkConfig, ObjectiveConfig
from admth_training.network import build_network

DATA = f"fashion-mnist:{ROOT / 'examples' / 'fashion-mnist-mini'}"
DOCUMENT = ROOT / "docs" / "tensorrt.md"
START, END = "<!-- table of benchmarks/tensorrt_builds.py -->", "<!-- end of the table -->"
PRECISIONS = (
    ("FP32", ["--fp32"]),
    ("FP16", ["--fp16"]),
    ("INT8", ["--int8"]),
    ("INT8, rest FP16", ["--int8", "--fp16"]),
)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    backbone: str
    precision: str
    cells: tuple[str, ...]


def main() -> None:
    """Build, and print or write the table."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--write", action="store_true", help="write the table into docs/tensorrt.md")
    arguments.add_argument("--images", type=int, default=1000, help="query images of EfficientNet-Lite0")
    arguments.add_argument("--cnnf-images", type=int, default=200, help="query images of CNN-F, 50 times the work")
    arguments.add_argument("--backbone", choices=("efficientnet_lite0", "cnnf"), help="build one backbone's alone")
    chosen = arguments.parse_args()
    torch.set_num_threads(2)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="admth-builds-") as name:
        folder = Path(name)
        if chosen.backbone != "cnnf":
            require_demo_run()
            rows += build_all(DEMO_RUN, folder, "EfficientNet-Lite0, 96 px", chosen.images)
        if chosen.backbone != "efficientnet_lite0":
            rows += build_all(seeded_cnnf(folder / "cnnf"), folder, "CNN-F, 224 px, 221 M", chosen.cnnf_images)
    table = "\n".join(lines(rows))
    sys.stdout.write(table + "\n")
    if chosen.write:
        write(table)


def build_all(run: Path, folder: Path, backbone: str, images: int) -> list[Row]:
    """Build one backbone in every precision."""
    calibrated = folder / f"{run.name}.int8.trt.onnx"
    calibrate = [
        "admth_calibration",
        str(run / "model.onnx"),
        "--data",
        DATA,
        "--target",
        "trt",
        "--all-int8",
        "--images",
        "512",
        "--check-images",
        "64",
    ]
    call([*calibrate, "--out", str(calibrated)])
    rows = []
    for precision, flags in PRECISIONS:
        model = calibrated if "--int8" in flags else run / "model.onnx"
        out = folder / f"{run.name}.{len(rows)}.rtx"
        # The gate's limits are off: this table shows what is, and the text says what the gate would say.
        words = ["admth_export", "trt", str(model), *flags, "--flavor", "rtx", "--run", str(run), "--data", DATA]
        words += [
            "--images",
            str(images),
            "--database-images",
            "0",
            "--min-bit-parity",
            "0",
            "--noise-threshold",
            "1e9",
        ]
        made = call([*words, "--out", str(out)])
        rows.append(Row(backbone, precision, cells(made, model)))
        sys.stderr.write(f"{backbone}, {precision}: {' | '.join(rows[-1].cells)}\n")
    return rows


def cells(made: dict[str, object], model: Path) -> tuple[str, ...]:
    """Return the figures of one build."""
    sidecar, parity = made["sidecar"], made["predicted_parity"]
    assert isinstance(sidecar, dict)
    assert isinstance(parity, dict)
    shares, exact = parity["bit_parity"].values(), parity["exact_code_rate"]
    longest = max(exact, key=int)
    return (
        f"{model.stat().st_size / 1e6:,.1f}",
        f"{sidecar['engine']['bytes'] / 1e6:,.1f}",
        f"{sidecar['build_seconds']:,.1f}",
        " / ".join(f"{100 * share:.2f}" for share in shares),
        f"{100 * exact[longest]:.1f}",
        f"{parity['images']:,}",
    )


def seeded_cnnf(folder: Path) -> Path:
    """Make a run of the full CNN-F with fresh weights, whose logits are centred on real images as training does."""
    network = build_network(NetworkConfig(backbone="cnnf", input_size=224), seed=0).eval()
    spec = PreprocessingSpec(224, 224)
    source = open_images(DATA)
    pixels = torch.stack([torch.from_numpy(source.load(index, spec).copy()) for index in range(64)])
    with torch.no_grad():
        for branch, logits in zip(network.branches, network(pixels), strict=True):
            last, spread = branch[-1], logits.std(dim=0).clamp_min(1e-6) / 4
            last.weight.div_(spread[:, None])
            last.bias.copy_((last.bias - logits.median(dim=0).values) / spread)
    folder.mkdir(parents=True)
    config = RunConfig(network.config, ObjectiveConfig(), FitConfig(), spec, DataConfig(DATA), pretrained=False)
    save_run_config(folder, config)
    save_network(folder / "model.safetensors", network)
    del network
    trained = load_run(folder)
    size = write_graph(folder / "model.onnx", build_graph(trained.network, spec.shape, OnnxOptions()))
    write_manifest(folder / "model.onnx", size, manifest_of(trained))
    return folder


def call(words: list[str]) -> dict[str, object]:
    """Run one of the project's commands and return what it printed as JSON."""
    done = subprocess.run([sys.executable, "-m", *words, "--json"], stdout=subprocess.PIPE, check=True)
    result: dict[str, object] = json.loads(done.stdout)
    return result


def lines(rows: list[Row]) -> list[str]:
    """Return the table and its conditions."""
    facts = machine()
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    from importlib.metadata import version

    return [
        "| backbone | precision | ONNX, MB | engine, MB | build, s | equal bits of 16 / 32 / 48 / 64, % | "
        "exact 64-bit codes, % | images |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *(f"| {row.backbone} | {row.precision} | {' | '.join(row.cells)} |" for row in rows),
        "",
        f"TensorRT-RTX {version('tensorrt-rtx-cu13')} for sm80 to sm121, onnxruntime {facts['onnxruntime']}, "
        f"{facts['cores usable']} cores of {facts['cpu']}; largest process {peak:.1f} GB.",
    ]


def write(table: str) -> None:
    """Put the table between the two marks of the document."""
    text = DOCUMENT.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    DOCUMENT.write_text(f"{before}{START}\n{table}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
