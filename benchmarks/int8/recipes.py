"""How each INT8 model is made: a command in a process of its own, whose time and memory are kept beside the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from _harness import ROOT

from admth_runtime.console import note
from admth_runtime.files import write_json
from int8.networks import Network
from int8.processes import Spent, WorkError, admth, execute
from int8.reference import Reference
from int8.settings import Settings

__all__ = ["OPENVINO", "RECIPES", "Made", "Recipe", "make_models", "nncf_environment", "nncf_python"]

_LONGEST_FACT = 1000  # characters of JSON
WORKER = Path(__file__).with_name("nncf_worker.py")


@dataclass(frozen=True)
class Recipe:
    """One way to INT8.

    Attributes:
        name: of the model file, without its ending.
        title: for the tables.
        maker: ``"admth"``, ``"ort"`` or ``"nncf"``.
        target: ``"cpu"``, ``"trt"`` or ``"weights"``.
        words: options of ``admth-calibrate``, or the command of the NNCF worker.
        engine: what runs the model, ``"onnxruntime"`` or ``"openvino"``.
        ending: of the file.
        qat: target of the quantisation-aware run that the model is made from, or None for the FP32 run.
        backbones: where it is measured.
    """

    name: str
    title: str
    maker: str
    target: str
    words: tuple[str, ...] = ()
    engine: str = "onnxruntime"
    ending: str = ".onnx"
    qat: str | None = None
    backbones: tuple[str, ...] = ("efficientnet_lite0", "cnnf")


_ORT_TITLES = {
    "ort-minmax": "ONNX Runtime, min-max (its default)",
    "ort-float-logits": "the same, logits left in float",
    "ort-percentile": "ONNX Runtime, percentile",
    "ort-entropy": "ONNX Runtime, entropy",
    "ort-tensorrt": "ONNX Runtime, form for TensorRT",
}
GATE = ("--min-bit-parity", "0.995")
_LITE0 = ("efficientnet_lite0",)
RECIPES = (
    *(
        Recipe(name, title, "ort", "trt" if name == "ort-tensorrt" else "cpu", (name,))
        for name, title in _ORT_TITLES.items()
    ),
    Recipe("nncf", "NNCF, run by ONNX Runtime", "nncf", "cpu", ("make-onnx",)),
    Recipe("nncf-openvino", "NNCF, run by OpenVINO", "nncf", "cpu", ("make-openvino",), "openvino", ".xml"),
    Recipe("admth", "admth, all layers INT8", "admth", "cpu", ("--target", "cpu", "--all-int8")),
    Recipe("admth-mixed", "admth, mixed precision to 99.5 %", "admth", "cpu", ("--target", "cpu", *GATE)),
    Recipe("admth-qat", "admth, quantisation-aware", "admth", "cpu", ("--target", "cpu"), qat="cpu", backbones=_LITE0),
    Recipe("admth-trt", "admth, all layers INT8", "admth", "trt", ("--target", "trt", "--all-int8")),
    Recipe("admth-trt-mixed", "admth, mixed precision to 99.5 %", "admth", "trt", ("--target", "trt", *GATE)),
    Recipe(
        "admth-trt-qat", "admth, quantisation-aware", "admth", "trt", ("--target", "trt"), qat="trt", backbones=_LITE0
    ),
    Recipe("admth-w8", "admth, weights in 8 bits", "admth", "weights", ("--weights-only", "int8"), backbones=("cnnf",)),
    Recipe("admth-w4", "admth, weights in 4 bits", "admth", "weights", ("--weights-only", "int4"), backbones=("cnnf",)),
)
"""Everything that is compared, in the order of the tables."""

OPENVINO = [recipe.name for recipe in RECIPES if recipe.engine == "openvino"]


@dataclass(frozen=True)
class Made:
    """What a recipe gave.

    Attributes:
        path: the model, or None where the command failed.
        error: the command's last line, where it failed.
        seconds: wall clock.
        peak_bytes: most resident memory.
        bytes: size of the model.
        facts: what an admth model's manifest says of its calibration.
    """

    path: Path | None
    error: str | None = None
    seconds: float = 0.0
    peak_bytes: int = 0
    bytes: int = 0
    facts: dict[str, Any] | None = None


def make_models(
    network: Network, reference: Reference, qat_runs: dict[str, Path], settings: Settings
) -> dict[str, Made]:
    """Make what is missing; a recipe that fails is kept as its error, since that is a result too."""
    made = {}
    for recipe in RECIPES:
        if network.case.backbone not in recipe.backbones or (recipe.qat and recipe.qat not in qat_runs):
            continue
        source = qat_runs[recipe.qat] / "model.onnx" if recipe.qat else network.onnx
        made[recipe.name] = _make(recipe, source, network.models, reference, settings)
    return made


def _make(recipe: Recipe, source: Path, folder: Path, reference: Reference, settings: Settings) -> Made:
    out = folder / f"{recipe.name}{recipe.ending}"
    record = folder / f"{recipe.name}.json"
    words = list(recipe.words)
    if settings.fresh or not (out.is_file() and _words(record) == words):
        for path in (out, record):
            path.unlink(missing_ok=True)
        try:
            spent = _run(recipe, source, out, reference, settings)
        except WorkError as error:
            note(f"{recipe.title}: {error}")
            return Made(None, str(error))
        write_json(record, {**asdict(spent), "words": words})
    took = json.loads(record.read_text())
    size = out.stat().st_size + (out.with_suffix(".bin").stat().st_size if recipe.ending == ".xml" else 0)
    return Made(
        out, None, took["seconds"], took["peak_bytes"], size, _manifest_facts(out) if recipe.maker == "admth" else None
    )


def _words(record: Path) -> list[str] | None:
    """Return the options that a model was made with."""
    try:
        words: list[str] = json.loads(record.read_text())["words"]
    except (OSError, ValueError, KeyError):
        return None
    return words


def _run(recipe: Recipe, source: Path, out: Path, reference: Reference, settings: Settings) -> Spent:
    log = out.with_suffix(".log")
    if recipe.maker == "ort":
        command = [sys.executable, "-W", "ignore", "-m", "int8.make_ort", *recipe.words]
        environment = {"PYTHONPATH": os.pathsep.join([str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])}
        return execute([*command, str(source), str(reference.pixels), str(out)], environment=environment, log=log)
    if recipe.maker == "nncf":
        command = [str(nncf_python(settings)), "-W", "ignore", str(WORKER), *recipe.words]
        return execute(
            [*command, str(source), str(reference.pixels), str(out)], environment=nncf_environment(), log=log
        )
    data = ["--data", reference.calibration_spec, "--images", str(settings.calibration_images), "--seed", "0"]
    if reference.unseen_spec is not None and recipe.target != "weights":
        data += ["--check-data", reference.unseen_spec, "--check-images", "1000"]
    return execute([*admth("admth-calibrate"), str(source), *recipe.words, *data, "--out", str(out)], log=log)


def _manifest_facts(path: Path) -> dict[str, Any]:
    """Return what the manifest says of the calibration, without its long tables."""
    from admth_runtime.model import read_model

    facts = read_model(path).manifest.calibration or {}
    return {name: value for name, value in facts.items() if len(json.dumps(value)) <= _LONGEST_FACT}


def nncf_python(settings: Settings) -> Path:
    """Return an interpreter that has NNCF; its environment is made in the cache where none was named.

    Raises:
        WorkError: it cannot be made.
    """
    if settings.nncf_python is not None:
        return settings.nncf_python
    folder = settings.cache / "nncf-venv"
    python = folder / "bin" / "python"
    stamp = folder / ".installed"
    if not stamp.is_file():
        note("installing NNCF and OpenVINO into an environment of their own: some minutes")
        execute([sys.executable, "-m", "venv", "--clear", str(folder)])
        execute([str(python), "-m", "pip", "install", "--quiet", f"{ROOT}[bench]"])
        stamp.touch()
    return python


def nncf_environment() -> dict[str, str]:
    """Return variables without which OpenVINO fails on some processors, for its own process alone.

    On virtual machines that announce AVX-512 FP16 or AMX without offering them, oneDNN's kernels for these are
    illegal instructions. AVX-512 with bfloat16 covers all that INT8 needs.
    """
    return {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16", "PYTHONPATH": ""}


def nncf_versions(settings: Settings) -> dict[str, str]:
    """Return the versions in NNCF's environment."""
    code = (
        "import json; from importlib.metadata import version as v; "
        "print(json.dumps({n: v(n) for n in ('nncf', 'openvino', 'onnxruntime', 'onnx')}))"
    )
    done = subprocess.run([str(nncf_python(settings)), "-c", code], check=True, capture_output=True, text=True)
    versions: dict[str, str] = json.loads(done.stdout)
    return versions
