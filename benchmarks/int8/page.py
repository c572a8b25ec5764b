"""docs/int8.md: tables made of the results, prose from the template."""

from __future__ import annotations

from pathlib import Path
from string import Template
from typing import Any

from int8.rows import LENGTHS, ROWS, Results, Row
from int8.settings import CASES

__all__ = ["all_rows", "page"]

_SEEN = (
    "training images, since there were no others; margins are wider there, so it promises more than test images keep."
)
_TEMPLATE = Path(__file__).with_name("page.template")


def page(results: Results) -> str:
    """Return the page."""
    return Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        machine=_machine(results),
        targets=_targets(all_rows(results)),
        cases="\n\n".join(_case(case) for case in results["cases"].values()),
        memory=_memory(results),
        remedies=_remedies(results),
        minutes=round(sum(results["minutes"].values())),
        training=sum(case.minutes for case in CASES.values()),
        names=", ".join(CASES),
    )


def all_rows(results: Results) -> list[Row]:
    """Return the rows of the table of targets."""
    rows: list[Row] = []
    for function in ROWS:
        found = function(results)
        rows.extend(found if isinstance(found, list) else [found])
    return rows


def _machine(results: Results) -> str:
    return "Machine: " + ", ".join(f"{key} {value}" for key, value in results["machine"].items()) + "."


def _targets(rows: list[Row]) -> str:
    lines = ["| figure | target | measured | met |", "| --- | --- | --- | --- |"]
    for row in rows:
        met = {True: "yes", False: "**no**", None: "not measured"}[row.met]
        lines.append(f"| {row.figure} | {row.target} | {_cell(row.measured)} | {met} |")
    return "\n".join(lines)


def _case(case: Results) -> str:
    lines = [
        f"### {case['title']}",
        "",
        f"{case['test images']:,} test images, database of {case['database images']:,}, FP32 model of "
        f"{case['fp32 bytes'] / 1e6:.1f} MB. mAP@all of FP32 by length: "
        + ", ".join(f"{length} bits {value:.4f}" for length, value in case["fp32 mAP"].items())
        + ".",
        "",
        "The gate of mixed precision was measured on "
        + ("images that were neither trained nor tested on." if case["gate on unseen images"] else _SEEN),
        "",
        "| model | for | bits equal, 16 / 32 / 48 / 64 | exact 64-bit codes | mAP, worst length | speed, batch 1 / 8 | "
        "MB | made in, peak memory |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [_model(name, model, case) for name, model in case["models"].items()]
    errors = [f"{model['title']} ({model['target']})" for model in case["models"].values() if "error" in model]
    notes = [f"- {title}: {error}" for title, error in _errors(case, errors)]
    if "plain" in case["speed"]:
        plain = case["speed"]["plain"]["batch 1"]
        notes.append(f"- Plain `torch.onnx.export`, FP32: {plain:.2f} times the deployed graph's speed at batch 1.")
    if "openvino speed" in case:
        own = case["openvino speed"]["openvino-fp32"]
        notes.append(f"- OpenVINO in FP32: {own['batch 1']:.2f} / {own['batch 8']:.2f} times ONNX Runtime's speed.")
    notes += _qat_notes(case)
    pictures = [f"\n![Parity, latency and size: {shown}](images/{name})" for shown, name in case["pictures"].items()]
    return "\n".join([*lines, "", *notes, *pictures]).rstrip()


def _remedies(results: Results) -> str:
    if "remedies" not in results:
        return "Not measured yet."
    lines = ["| all layers in INT8, for the CPU | bits equal, 16 / 32 / 48 / 64 | flipped bits | logit error |"]
    lines.append("| --- | --- | --- | --- |")
    for name, score in results["remedies"].items():
        shares = list(score["bit_parity"].values())
        bits = " / ".join(f"{100 * share:.2f}" for share in shares)
        flipped = 100 * (1 - sum(shares) / len(shares))
        lines.append(f"| {name} | {bits} | {flipped:.2f} % | {score['error']:.3f} |")
    return "\n".join(lines)


def _errors(case: Results, names: list[str]) -> list[tuple[str, str]]:
    failed = [model for model in case["models"].values() if "error" in model]
    found = [(name, model["error"]) for name, model in zip(names, failed, strict=True)]
    found += [(f"quantisation-aware training for {target}", text) for target, text in case["qat errors"].items()]
    return found


def _model(name: str, model: Results, case: Results) -> str:
    title, target = model["title"], {"cpu": "CPU", "trt": "TensorRT", "weights": "CPU"}[model["target"]]
    if "error" in model:
        return f"| {title} | {target} | not made | | | | | |"
    bits = " / ".join(f"{100 * model['bit_parity'][length]:.2f}" for length in LENGTHS)
    change = min(100 * (values["candidate"] - values["reference"]) for values in model["mAP"].values())
    made = f"{model['seconds']:.0f} s, {model['peak bytes'] / 2**30:.1f} GiB"
    cells = [title, target, bits, f"{100 * model['exact_codes']['64']:.1f} %", f"{change:+.2f} points"]
    size = f"{model['bytes'] / 1e6:.1f}"
    return f"| {' | '.join([*cells, _speed(name, case), size, made])} |"


def _speed(name: str, case: Results) -> str:
    speed = case["speed"].get(name) or case.get("openvino speed", {}).get(name)
    return "" if speed is None else f"{speed['batch 1']:.2f} / {speed['batch 8']:.2f}"


def _qat_notes(case: Results) -> list[str]:
    notes = []
    for model in case["models"].values():
        if "qat" in model:
            own = model["qat"]["own network"]
            bits = " / ".join(f"{100 * own['bit_parity'][length]:.3f}" for length in LENGTHS)
            target = "CPU" if model["target"] == "cpu" else "TensorRT"
            notes.append(f"- {model['title']}, {target}: {bits} % of bits equal to those of its own PyTorch network.")
    return notes


def _memory(results: Results) -> str:
    measured: Any = results.get("memory")
    if measured is None:
        return "Not measured."
    lines = [f"`admth-calibrate --target cpu --images {measured['images']}`, the process' most resident memory:", ""]
    for name, item in measured.items():
        if isinstance(item, dict):
            text = item.get("error") or f"{item['peak bytes'] / 2**30:.2f} GiB, {item['seconds']:.0f} s"
            lines.append(f"- {CASES[name].title}: {text}")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
