"""``admth-calibrate`` as a function: an FP32 model and images to INT8 models that keep its signs."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from admth_calibration.drawing import Sample, draw
from admth_calibration.graph import Graph, load_graph
from admth_calibration.images import CalibrationImages, open_images
from admth_calibration.layers import find_layers, select_layers
from admth_calibration.learned import LearnedQuantization, read_learned
from admth_calibration.making import Made, Maker
from admth_calibration.options import CalibrationOptions, check_out, default_out
from admth_calibration.pictures import draw_front, draw_sensitivity
from admth_calibration.retrieval import relevance
from admth_calibration.sensitivity import sensitivity_rows
from admth_calibration.writing import int8_manifest, with_golden, write_model
from admth_runtime.errors import InputError, ModelError, require
from admth_runtime.files import atomic_path, sha256_of_file, write_json
from admth_runtime.manifest import Manifest
from admth_runtime.model import ModelFile, read_model

__all__ = ["CalibrationResult", "calibrate"]


@dataclass(frozen=True)
class CalibrationResult:
    """What a calibration made for one target.

    Attributes:
        model: the INT8 ONNX file.
        bytes: its size.
        sha256: its SHA-256.
        manifest: its manifest; ``calibration`` holds the facts and the predicted parity.
        layers: names of the layers in INT8.
        kept: names of the layers with weights that stay in float.
        report: the JSON file with every measurement of the search, or None where there was none.
        pictures: the pictures beside it.
    """

    model: Path
    bytes: int
    sha256: str
    manifest: Manifest
    layers: tuple[str, ...]
    kept: tuple[str, ...]
    report: Path | None = None
    pictures: tuple[Path, ...] = ()


def calibrate(
    model: str | Path,
    data: str | None = None,
    out: str | Path | None = None,
    *,
    options: CalibrationOptions | None = None,
    root: Path | None = None,
    strip_prefix: str | None = None,
    check_data: str | None = None,
) -> tuple[CalibrationResult, ...]:
    """Calibrate an FP32 model to INT8.

    Images are decoded one batch at a time and values are counted as they come, so memory does not grow with them.

    Args:
        model: the FP32 ONNX model. Of a network that was trained with quantisation, its learned scales are taken.
        data: images, such as ``folder:pictures``; labels are read for ``gates.min_map_ratio`` alone. A model with
            learned scales needs none.
        out: the file to write; None is ``model.int8.onnx`` or ``model.int8.trt.onnx`` beside ``model.onnx``.
        options: how; None is the CPU, ranges of 512 images, every layer in INT8.
        root: for a list, the folder that relative paths start from.
        strip_prefix: for a list, a text that is cut from the start of each path.
        check_data: images to compare on, best such as the network has not been trained on; None takes others of
            ``data``.

    Returns:
        One result for each target.

    Raises:
        ModelError: the model is missing, broken, or not FP32; or it misses a gate, and nothing is written.
        DataError: the images are missing, broken, constant, or fewer than 128.
        InputError: an option is out of range, or a layer to keep does not exist.
        OutputError: a file cannot be written.
    """
    options = options or CalibrationOptions()
    path = Path(model)
    source = _source(path)
    require("onnxruntime", extra="calibrate", purpose="calibrating")
    graph = Graph(load_graph(str(path)))
    learned = read_learned(graph)
    options = _checked(graph, learned, options, data, path)
    targets = _targets(path, out, options)
    sample = _sample(source, data, check_data, options, root, strip_prefix)
    maker = Maker(graph, source, sample, options, learned)
    made = {target: maker.make(target) for target in targets}
    with ExitStack() as files:  # all of them, or none
        temporaries = {target: files.enter_context(atomic_path(place)) for target, place in targets.items()}
        results = [
            _write(maker, made[target], targets[target], temporaries[target], source, sample, options)
            for target in targets
        ]
    return tuple(_with_report(maker, made[target], result) for target, result in zip(targets, results, strict=True))


def _source(path: Path) -> ModelFile:
    source = read_model(path)
    if source.manifest.precision != "fp32":
        raise ModelError(f"{path} is {source.manifest.precision} already: pass the FP32 model of  admth-export onnx")
    return source


def _checked(
    graph: Graph, learned: LearnedQuantization | None, options: CalibrationOptions, data: str | None, path: Path
) -> CalibrationOptions:
    """Check options against the model, and set those that learned scales settle."""
    if not select_layers(find_layers(graph), options.keep_fp32):
        raise ModelError(f"{path}: no layer is left to quantise: keep fewer in FP32")
    if learned is None:
        if data is None:
            raise InputError(f"{path} needs images for its ranges: pass --data folder:DIR, or such")
        return options
    if options.target not in (learned.target, "cpu"):
        raise InputError(
            f"{path} was trained with the integers of --target {learned.target}: pass that, or train again with "
            f"admth-train fit --qat-target {options.target}"
        )
    measured = (options.gates.min_map_ratio, options.gates.max_latency_ratio)
    if data is None and any(value is not None for value in measured):
        raise InputError(
            "--min-map-ratio and --max-latency-ratio are measured on images: pass --data folder:DIR, or such"
        )
    if options.keep_fp32:
        raise InputError("--keep-fp32 means nothing for a model with learned scales: every layer was trained in INT8")
    # Every layer was trained in INT8, and is held to its own network: none is kept in float for the sake of another.
    gates = replace(options.gates, min_bit_parity=None)
    return replace(options, target=learned.target, rounding="nearest", correct_bias=False, equalise=False, gates=gates)


def _targets(path: Path, out: str | Path | None, options: CalibrationOptions) -> dict[str, Path]:
    if out is not None and len(options.targets) > 1:
        raise InputError(f"--out {out} names one file and --target both makes two: leave --out out, or make one target")
    places = {target: Path(out) if out is not None else default_out(path, target) for target in options.targets}
    for place in places.values():
        check_out(path, place)
    return places


def _sample(
    source: ModelFile,
    data: str | None,
    check_data: str | None,
    options: CalibrationOptions,
    root: Path | None,
    strip_prefix: str | None,
) -> Sample | None:
    if data is None:
        return None
    images = open_images(data, root=root, strip_prefix=strip_prefix)
    compared: CalibrationImages | None = None if check_data is None else open_images(check_data)
    sample = draw(images, options, source.manifest.preprocessing, compared)
    if options.gates.min_map_ratio is not None:  # before minutes of work
        relevance(sample)
    return sample


def _write(
    maker: Maker,
    made: Made,
    place: Path,
    temporary: Path,
    source: ModelFile,
    sample: Sample | None,
    options: CalibrationOptions,
) -> CalibrationResult:
    manifest = int8_manifest(source, made, {} if sample is None else sample.facts, options, maker.learned)
    write_model(temporary, made.candidate.model, manifest)
    manifest = with_golden(temporary, manifest)
    write_model(temporary, made.candidate.model, manifest)
    size, digest = temporary.stat().st_size, sha256_of_file(temporary)
    kept = tuple(layer for layer in maker.graph.layers() if layer not in made.candidate.layers)
    return CalibrationResult(place, size, digest, manifest, made.candidate.layers, kept)


def _with_report(maker: Maker, made: Made, result: CalibrationResult) -> CalibrationResult:
    """Write the measurements and the pictures beside the model, where anything was measured."""
    if len(made.points) < 2 and not made.sensitivities:
        return result
    stem = result.model.name.removesuffix(".onnx")
    report = result.model.with_name(f"{stem}.calibration.json")
    pictures: list[Path] = []
    write_json(
        report,
        {
            "model": result.model.name,
            "sha256": result.sha256,
            "calibration": dict(result.manifest.calibration or {}),
            "points": [point.to_dict() for point in made.points],
            "sensitivity": sensitivity_rows(made.sensitivities),
        },
    )
    title = f"{result.model.name}: INT8 for {'TensorRT' if made.target == 'trt' else 'the CPU'}"
    if len(made.points) > 1:
        pictures.append(result.model.with_name(f"{stem}.pareto.png"))
        draw_front(pictures[-1], made.points, made.point, maker.options.gates, title)
    if made.sensitivities:
        pictures.append(result.model.with_name(f"{stem}.sensitivity.png"))
        flipped = 1 - made.points[0].score.mean
        draw_sensitivity(pictures[-1], made.sensitivities, flipped, title)
    return replace(result, report=report, pictures=tuple(pictures))
