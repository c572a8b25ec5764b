"""What is measured of every INT8 model: bits, codes, retrieval, speed and size."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from _harness import interleave, paired_ratio
from _models import bare_session
from numpy.typing import NDArray

from admth_export.parity import retrieval_effect
from admth_runtime.console import progress
from int8.networks import Network
from int8.processes import execute
from int8.recipes import RECIPES, WORKER, Made, nncf_environment, nncf_python
from int8.reference import CodedDatabase, Logits, Reference, code
from int8.settings import Settings

__all__ = ["compare", "onnx_logits", "openvino_results", "retrieval", "speeds"]

_BATCH = 50


def compare(reference: Logits, candidate: Logits) -> dict[str, Any]:
    """Return the shares of equal bits and of equal codes by code length, and the share of flips over all lengths.

    The bits are the signs of the logits; so a model whose own packing broke is judged by what it could have packed.
    """
    parity, exact = {}, {}
    flips = bits = 0
    for length, expected in reference.items():
        same = (expected > 0) == (candidate[length] > 0)
        parity[str(length)] = float(same.mean())
        exact[str(length)] = float(same.all(axis=1).mean())
        flips += int((~same).sum())
        bits += same.size
    return {"bit_parity": parity, "exact_codes": exact, "flips": flips, "bits": bits}


def retrieval(reference: Reference, candidate: Logits) -> dict[str, dict[str, float]]:
    """Return mAP@all by code length: the candidate's queries in the database that PyTorch coded."""
    effects = retrieval_effect(
        code(reference.logits),
        code(candidate),
        reference.database.codes,
        query_labels=reference.test_labels,
        database_labels=reference.database.labels,
    )
    return {
        str(length): {"reference": effect.reference_map, "candidate": effect.candidate_map}
        for length, effect in effects.items()
    }


def own_map(reference: Reference, queries: Logits, database: CodedDatabase) -> dict[str, float]:
    """Return mAP@all by code length where a network's queries search a database that it coded itself."""
    from admth_training.metrics import evaluate_codes

    packed = code(queries)
    found = {
        length: evaluate_codes(packed[length], codes, reference.test_labels, database.labels, precision_at=())
        for length, codes in database.codes.items()
    }
    return {str(length): metrics.mean_average_precision[None] or 0.0 for length, metrics in found.items()}


def onnx_logits(path: Path, pixels: NDArray[np.uint8], threads: int) -> Logits:
    """Return the logits of a model on ONNX Runtime."""
    session = bare_session(path, threads)
    names = [output.name for output in session.get_outputs() if output.name.startswith("logits_")]
    parts = []
    with progress(f"running {path.name}", len(pixels), unit="images") as advance:
        for start in range(0, len(pixels), _BATCH):
            parts.append(session.run(names, {"images": pixels[start : start + _BATCH]}))
            advance(len(parts[-1][0]))
    return {
        int(name.removeprefix("logits_")): np.concatenate(columns)
        for name, columns in zip(names, zip(*parts, strict=True), strict=True)
    }


def openvino_results(
    network: Network, reference: Reference, made: Mapping[str, Made], settings: Settings
) -> tuple[dict[str, Logits], dict[str, dict[str, float]]]:
    """Return logits and speeds of the models that OpenVINO runs, FP32 included, from one process of its own."""
    paths = {recipe.name: made[recipe.name].path for recipe in RECIPES if recipe.engine == "openvino"}
    candidates = {"openvino-fp32": network.onnx, **{name: path for name, path in paths.items() if path is not None}}
    out = network.models / "openvino.npz"
    command = [str(nncf_python(settings)), "-W", "ignore", str(WORKER), "run", str(network.onnx)]
    command += [str(reference.pixels), str(out), str(settings.threads), *map(str, candidates.values())]
    printed = execute(command, environment=nncf_environment(), log=out.with_suffix(".log")).output
    ratios = json.loads(printed.splitlines()[-1])
    arrays = np.load(out)
    logits, speed = {}, {}
    for name, path in candidates.items():
        logits[name] = {length: arrays[f"{path.name}/logits_{length}"] for length in reference.logits}
        speed[name] = {f"batch {size}": ratio for size, ratio in ratios[path.name].items()}
    return logits, speed


def speeds(
    base: Path, candidates: Mapping[str, Path], pixels: NDArray[np.uint8], *, threads: int, seconds: float
) -> dict[str, dict[str, Any]]:
    """Time models in turn, at batch 1 and 8.

    Args:
        base: the FP32 model.
        candidates: by name.
        pixels: uint8 ``[n, H, W, 3]``, n >= 8.
        threads: of ONNX Runtime.
        seconds: for each batch size; at least five rounds are made.

    Returns:
        For each name ``batch 1`` and ``batch 8``: the base's time over the model's, the median of pairs timed within
        one round; and under ``rounds`` the times themselves, so that any two models can be compared.
    """
    names = list(candidates)
    sessions = [bare_session(path, threads) for path in (base, *candidates.values())]
    found: dict[str, dict[str, Any]] = {name: {"rounds": {}} for name in ("fp32", *names)}
    for size in (1, 8):
        images = pixels[:size]
        times = interleave([_runner(session, images) for session in sessions], rounds=300, warmup=4, seconds=seconds)
        for name, record in zip(("fp32", *names), times, strict=True):
            found[name][f"batch {size}"] = paired_ratio(times[0], record)["median"]
            found[name]["rounds"][f"batch {size}"] = [round(1e3 * value, 4) for value in record]
    return found


def _runner(session: Any, images: NDArray[np.uint8]) -> Callable[[], object]:
    return lambda: session.run(None, {"images": images})
