"""One network from its training to all its figures."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from _harness import ROOT
from _models import export_plain

from admth_runtime.console import note
from int8.measuring import compare, onnx_logits, openvino_results, own_map, retrieval, speeds
from int8.networks import Network, prepare_network
from int8.processes import WorkError
from int8.qat import prepare_qat
from int8.recipes import RECIPES, Made, make_models
from int8.reference import CodedDatabase, Logits, Reference, code, database_pixels, prepare_reference, run_logits
from int8.settings import Case, Settings

__all__ = ["measure_case"]

_LOADS = {"efficientnet_lite0": 1, "cnnf": 3}
_SECONDS = {"efficientnet_lite0": 60.0, "cnnf": 40.0}


def measure_case(case: Case, settings: Settings) -> dict[str, Any]:
    """Return everything that the page says of a case, in JSON's types.

    Raises:
        WorkError: the FP32 network cannot be made; what fails later is part of the result.
    """
    network = prepare_network(case, settings)
    reference = prepare_reference(network, settings)
    qat_runs, qat_errors = prepare_qat(network, settings)
    made = make_models(network, reference, qat_runs, settings)
    logits, found = _logits(network, reference, made, settings)
    result: dict[str, Any] = {
        "title": case.title,
        "test images": len(reference.test),
        "database images": len(reference.database.labels),
        "calibration images": settings.calibration_images,
        "gate on unseen images": reference.unseen_spec is not None,
        "threads": settings.threads,
        "fp32 bytes": network.onnx.stat().st_size,
        "fp32 on onnxruntime": compare(reference.logits, logits.pop("fp32")),
        "fp32 mAP": own_map(reference, reference.logits, reference.database),
        "qat errors": qat_errors,
        **found,
    }
    models = {name: _describe(name, item, reference, logits.get(name)) for name, item in made.items()}
    for target, folder in qat_runs.items():
        name = "admth-qat" if target == "cpu" else "admth-trt-qat"
        if name in logits:
            path = made[name].path
            assert path is not None
            models[name]["qat"] = _qat_figures(folder, path, network, reference, logits[name], settings)
    result["models"] = models
    result["pictures"] = _keep_pictures(case, made)
    result["speed"] = _speeds(network, made, reference, settings)
    return result


def _keep_pictures(case: Case, made: Mapping[str, Made]) -> dict[str, str]:
    """Copy the fronts that mixed precision drew to the documents; return their names by what they show."""
    kept = {}
    for name, target in (("admth-mixed", "CPU"), ("admth-trt-mixed", "TensorRT")):
        path = made[name].path if name in made else None
        if path is not None and (picture := path.with_name(f"{path.stem}.pareto.png")).is_file():
            kept[f"{case.title}, {target}"] = f"int8-{case.name}-{name.removeprefix('admth-')}.png"
            shutil.copyfile(picture, ROOT / "docs" / "images" / kept[f"{case.title}, {target}"])
    return kept


def _logits(
    network: Network, reference: Reference, made: Mapping[str, Made], settings: Settings
) -> tuple[dict[str, Logits], dict[str, Any]]:
    """Run every model on the test images."""
    logits = {"fp32": onnx_logits(network.onnx, reference.test, settings.threads)}
    for recipe in RECIPES:
        path = made[recipe.name].path if recipe.name in made else None
        if path is not None and recipe.engine == "onnxruntime":
            logits[recipe.name] = onnx_logits(path, reference.test, settings.threads)
    found: dict[str, Any] = {}
    try:
        others, ratios = openvino_results(network, reference, made, settings)
        found = {"openvino speed": ratios, "openvino fp32": compare(reference.logits, others.pop("openvino-fp32"))}
        logits |= others
    except WorkError as error:
        note(f"OpenVINO: {error}")
        found = {"openvino error": str(error)}
    return logits, found


def _describe(name: str, made: Made, reference: Reference, logits: Logits | None) -> dict[str, Any]:
    recipe = next(recipe for recipe in RECIPES if recipe.name == name)
    fields: dict[str, Any] = {"title": recipe.title, "maker": recipe.maker, "target": recipe.target}
    if made.path is None or logits is None:
        return {**fields, "error": made.error or "not run"}
    facts = made.facts or {}
    same = facts.get("data_sha256")
    return {
        **fields,
        **compare(reference.logits, logits),
        "mAP": retrieval(reference, logits),
        "bytes": made.bytes,
        "seconds": made.seconds,
        "peak bytes": made.peak_bytes,
        "calibration": facts or None,
        "same calibration images": None if same is None else same == reference.calibration_sha256,
    }


def _qat_figures(
    folder: Path, model: Path, network: Network, reference: Reference, logits: Logits, settings: Settings
) -> dict[str, Any]:
    """Compare the INT8 model with its own PyTorch network, and its codes on both sides of a search with FP32's."""
    database = onnx_logits(model, database_pixels(network), settings.threads)
    coded = CodedDatabase(code(database), reference.database.labels)
    return {
        "own network": compare(run_logits(folder, reference.test), logits),
        "own mAP": own_map(reference, logits, coded),
    }


def _speeds(
    network: Network, made: Mapping[str, Made], reference: Reference, settings: Settings
) -> dict[str, dict[str, Any]]:
    """Time what ONNX Runtime runs on the CPU; models for TensorRT would show nothing there."""
    timed = {
        recipe.name: path
        for recipe in RECIPES
        if recipe.target != "trt" and recipe.engine == "onnxruntime" and recipe.name in made
        if (path := made[recipe.name].path) is not None
    }
    if network.case.backbone == "cnnf":
        from admth_training.checkpoint import load_run

        plain = network.models / "plain.onnx"
        if not plain.is_file():
            export_plain(plain, load_run(network.folder).network)
        timed = {"plain": plain, **timed}
    backbone = network.case.backbone
    loads = []
    for _ in range(_LOADS[backbone]):
        # Where large weights land in memory moves a session's speed for as long as it lives.
        note(f"timing {len(timed) + 1} models in turn, two batch sizes, {_SECONDS[backbone]:.0f} s each")
        loads.append(speeds(network.onnx, timed, reference.test, threads=settings.threads, seconds=_SECONDS[backbone]))
    return {name: _summary(name, loads) for name in loads[0]}


def _summary(name: str, loads: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Return ratios to FP32, and to every other model, as the median over the loads."""
    summary: dict[str, Any] = {}
    for batch in ("batch 1", "batch 8"):
        summary[batch] = round(statistics.median(load[name][batch] for load in loads), 4)
        summary[f"{batch}, ms"] = round(statistics.median(np.median(load[name]["rounds"][batch]) for load in loads), 3)
        summary[f"{batch}, against"] = {
            other: round(
                statistics.median(_pairs(load[other]["rounds"][batch], load[name]["rounds"][batch]) for load in loads),
                4,
            )
            for other in loads[0]
            if other != name
        }
    return summary


def _pairs(slow: list[float], fast: list[float]) -> float:
    return float(np.median(np.asarray(slow) / np.asarray(fast)))
