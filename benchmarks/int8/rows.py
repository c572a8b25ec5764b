"""The figures with targets, one function each: from what was measured to a row of the table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["ROWS", "Row", "best_rival"]

Results = Mapping[str, Any]
LENGTHS = ("16", "32", "48", "64")


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        figure: what is measured.
        target: in words.
        measured: in words; where nothing was measured, why.
        met: whether the target is met; None where nothing was measured.
    """

    figure: str
    target: str
    measured: str
    met: bool | None


def mixed_cpu(results: Results) -> Row:
    """Judge mixed precision after training, CPU."""
    figure = "EfficientNet-Lite0, Fashion-MNIST, post-training, CPU, every length"
    target = "at least 99.5 % of bits equal, at 1.3 times the speed of FP32 or better"

    def judge(case: Results) -> tuple[str, bool]:
        model = _model(case, "admth-mixed")
        parity, speed = _worst(model), case["speed"]["admth-mixed"]["batch 1"]
        return f"{_percent(parity)} at the worst length, {speed:.2f} times the speed", parity >= 0.995 and speed >= 1.3

    return _row(figure, target, results, "efficientnet-fashion", judge)


def all_cpu(results: Results) -> Row:
    """Judge all layers in INT8 after training, CPU."""
    figure = "the same with all layers INT8"
    target = "at least 99.0 %, within 5 % of the speed of ONNX Runtime's default recipe"

    def judge(case: Results) -> tuple[str, bool]:
        parity = _worst(_model(case, "admth"))
        speed = case["speed"]["admth"]["batch 1, against"]["ort-minmax"]
        return f"{_percent(parity)} at the worst length, {speed:.2f} times its speed", parity >= 0.99 and speed >= 0.95

    return _row(figure, target, results, "efficientnet-fashion", judge)


def qat_own(results: Results) -> Row:
    """Judge quantisation-aware training against its own network."""

    def judge(case: Results) -> tuple[str, bool]:
        parity = _worst(_model(case, "admth-qat")["qat"]["own network"])
        return f"{_percent(parity)} at the worst length", parity >= 0.999

    figure = "quantisation-aware training, all layers INT8, CPU, against its own PyTorch network"
    return _row(figure, "at least 99.9 %", results, "efficientnet-fashion", judge)


def qat_map(results: Results) -> Row:
    """Judge what quantisation-aware training does to retrieval."""

    def judge(case: Results) -> tuple[str, bool]:
        own, exact = _model(case, "admth-qat")["qat"]["own mAP"], case["fp32 mAP"]
        changes = {length: 100 * (own[length] - exact[length]) for length in exact}
        text = ", ".join(f"{length} bits {change:+.2f}" for length, change in changes.items())
        return f"{text} points", min(changes.values()) >= -0.5

    figure = "the same, mAP at every length against FP32's, each network with codes of its own"
    return _row(figure, "at most 0.5 points lower", results, "efficientnet-fashion", judge)


def tensorrt(results: Results) -> Row:
    """Judge models for TensorRT, as ONNX Runtime predicts them."""

    def judge(case: Results) -> tuple[str, bool]:
        mixed = _worst(_model(case, "admth-trt-mixed"))
        qat = _worst(_model(case, "admth-trt-qat")["qat"]["own network"])
        return f"{_percent(mixed)} and {_percent(qat)}", mixed >= 0.995 and qat >= 0.999

    figure = (
        "model for TensorRT, predicted through ONNX Runtime: post-training (mixed), quantisation-aware (own network)"
    )
    return _row(figure, "99.5 % and 99.9 %", results, "efficientnet-fashion", judge)


def cnnf(results: Results) -> Row:
    """Judge the paper's network."""
    figure = "CNN-F INT8, CPU, batch 1, against a plain torch.onnx.export in FP32"
    target = "at least 3 times faster, at least 99.5 % of bits equal, at most 225 MB"

    def judge(case: Results) -> tuple[str, bool]:
        best: tuple[bool, float, str] | None = None
        for name in ("admth", "admth-mixed"):
            model = case["models"].get(name, {})
            if "bit_parity" not in model:
                continue
            speed = case["speed"][name]["batch 1, against"]["plain"]
            parity, size = _worst(model), model["bytes"] / 1e6
            met = speed >= 3 and parity >= 0.995 and size <= 225
            text = f"{model['title']}: {speed:.2f} times faster, {_percent(parity)} at the worst length, {size:.1f} MB"
            best = max(best, (met, parity, text)) if best else (met, parity, text)
        if best is None:
            raise KeyError(case["models"]["admth"]["error"])
        return best[2], best[0]

    return _row(figure, target, results, "cnnf-fashion", judge)


def side_by_side(results: Results) -> list[Row]:
    """Judge admth against the best of the others, for each network."""
    rows = []
    for name, case in results["cases"].items():

        def judge(case: Results) -> tuple[str, bool]:
            rival = best_rival(case)
            theirs = case["models"][rival]
            options = []
            for ours in ("admth", "admth-mixed"):
                model = case["models"].get(ours, {})
                if "flips" not in model:
                    continue
                ratio = theirs["flips"] / max(model["flips"], 1)
                speed = _speed_against(case, ours, rival)
                text = (
                    f"{model['title']}: {ratio:.1f} times fewer flipped bits ({_percent(_flipped(model))} against "
                    f"{_percent(_flipped(theirs))}) at {100 * speed:.0f} % of its speed (the best: {theirs['title']})"
                )
                options.append((ratio >= 3 and speed >= 0.8, min(ratio / 3, 1) * min(speed / 0.8, 1), text))
            if not options:
                raise KeyError(case["models"]["admth"]["error"])
            best = max(options)
            return best[2], best[0]

        figure = f"side by side: {case['title']}"
        target = "at least 3 times fewer flipped bits than the best of the others, at 80 % of its speed or more"
        rows.append(_row(figure, target, results, name, judge))
    return rows


def memory(results: Results) -> Row:
    """Judge the memory of a calibration."""
    figure, target = "peak memory of calibrating 2,000 images", "under 4 GiB"
    measured = results.get("memory")
    if measured is None:
        return Row(figure, target, "not measured", None)
    peaks = {
        name: item["peak bytes"] / 2**30
        for name, item in measured.items()
        if isinstance(item, dict) and "peak bytes" in item
    }
    if len(peaks) < 2:
        errors = [item["error"] for item in measured.values() if isinstance(item, dict) and "error" in item]
        return Row(figure, target, f"not measured: {errors[0]}", None)
    text = f"EfficientNet-Lite0 {peaks['efficientnet-fashion']:.2f} GiB, CNN-F {peaks['cnnf-fashion']:.2f} GiB"
    return Row(figure, target, text, max(peaks.values()) < 4)


ROWS: tuple[Callable[[Results], Row | list[Row]], ...] = (
    mixed_cpu,
    all_cpu,
    qat_own,
    qat_map,
    tensorrt,
    cnnf,
    side_by_side,
    memory,
)
"""Every row of the table of targets, in order."""


def best_rival(case: Results) -> str:
    """Return the competitor's CPU model with the fewest flipped bits.

    Raises:
        KeyError: no competitor made a model.
    """
    rivals = {
        name: model["flips"]
        for name, model in case["models"].items()
        if model["maker"] != "admth" and model["target"] == "cpu" and "flips" in model
    }
    if not rivals:
        raise KeyError("no other tool made a model")
    return min(rivals, key=lambda name: rivals[name])


def _speed_against(case: Results, ours: str, rival: str) -> float:
    """Return the speed of ours over the rival's at batch 1; over FP32's, where they ran in two processes."""
    speed: float = (
        case["speed"][ours]["batch 1, against"][rival]
        if rival in case["speed"]
        else case["speed"][ours]["batch 1"] / case["openvino speed"][rival]["batch 1"]
    )
    return speed


def _row(figure: str, target: str, results: Results, name: str, judge: Callable[[Results], tuple[str, bool]]) -> Row:
    case = results["cases"].get(name)
    if case is None:
        return Row(figure, target, "not measured", None)
    try:
        text, met = judge(case)
    except KeyError as error:
        return Row(figure, target, f"not measured: {error.args[0]}", None)
    return Row(figure, target, text, met)


def _model(case: Results, name: str) -> Results:
    """Return a model's figures.

    Raises:
        KeyError: there are none; its argument says why.
    """
    model: Results = case["models"].get(name, {"error": f"there is no {name}"})
    if "error" in model:
        raise KeyError(model["error"])
    return model


def _worst(model: Results) -> float:
    return float(min(model["bit_parity"].values()))


def _flipped(model: Results) -> float:
    return float(model["flips"] / model["bits"])


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"
