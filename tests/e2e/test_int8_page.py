"""docs/int8.md is what ``make bench-int8`` wrote: its tables are those of docs/int8.json, and nobody edited it."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from copy import deepcopy
from types import ModuleType
from typing import Any

import pytest
from _rooms import REPOSITORY

RESULTS, PAGE = REPOSITORY / "docs" / "int8.json", REPOSITORY / "docs" / "int8.md"
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(["benchmarks", os.environ.get("PYTHONPATH", "")])}


def bench(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )


def test_the_page_is_made_of_the_results() -> None:
    code = f"import json; from int8.page import page; print(page(json.load(open({str(RESULTS)!r}))), end='')"
    done = bench("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == PAGE.read_text(encoding="utf-8"), "write it again: make bench-int8 ARGS=--page-only"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--only", "resnet"), "error: --only 'resnet' is no part: use efficientnet-fashion, efficientnet-emoji"),
        (("--only", ","), "error: --only ',' names no part"),
        (("--threads", "0"), "error: --threads 0 is not positive"),
        (("--nncf-python", "nowhere/python"), "error: --nncf-python nowhere/python does not exist"),
        (("--emoji", "nowhere"), "error: --emoji nowhere does not exist"),
        (("--fashion-mnist", "nowhere"), "error: --fashion-mnist nowhere does not exist"),
    ],
)
def test_bad_input_is_one_line(words: tuple[str, ...], message: str) -> None:
    done = bench("-m", "int8", *words)
    assert done.returncode == 1
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    return importlib.import_module("int8.rows")


def figures(flips: int, maker: str, worst: float = 0.996, **others: Any) -> dict[str, Any]:
    parity = {"16": 1.0, "32": worst, "48": 1.0, "64": 1.0}
    return {
        "title": maker,
        "maker": maker,
        "target": "cpu",
        "flips": flips,
        "bits": 1000,
        "bit_parity": parity,
        **others,
    }


CASE = {
    "title": "A network",
    "models": {
        "ort-minmax": figures(40, "ort"),
        "ort-entropy": figures(30, "ort"),
        "ort-tensorrt": {**figures(1, "ort"), "target": "trt"},  # no rival: it is for another engine
        "nncf-openvino": figures(35, "nncf"),
        "admth": figures(10, "admth", bytes=225_000_000),
        "admth-mixed": {"title": "admth", "maker": "admth", "target": "cpu", "error": "error: the gate is not met"},
    },
    "speed": {
        "admth": {"batch 1": 1.5, "batch 1, against": {"ort-minmax": 0.95, "ort-entropy": 0.8, "plain": 3.0}},
        **{name: {"batch 1": 1.5} for name in ("ort-minmax", "ort-entropy")},
    },
    "openvino speed": {"nncf-openvino": {"batch 1": 1.0}},
}


@pytest.mark.parametrize(
    ("change", "met"),
    [
        (lambda case: None, True),  # exactly on each target
        (lambda case: case["models"]["admth"].update(flips=11), False),
        (lambda case: case["speed"]["admth"]["batch 1, against"].update({"ort-entropy": 0.79}), False),
        (lambda case: case["models"]["nncf-openvino"].update(flips=29), False),  # then the best, and 10 flips too many
    ],
)
def test_side_by_side_is_judged_against_the_best_rival(rows: ModuleType, change: Any, met: bool) -> None:
    case = deepcopy(CASE)
    change(case)
    row = rows.side_by_side({"cases": {"x": case}})[0]
    assert row.met is met
    rival = min(("ort-entropy", "nncf-openvino"), key=lambda name: case["models"][name]["flips"])
    assert f"the best: {case['models'][rival]['title']}" in row.measured


@pytest.mark.parametrize(
    ("part", "value", "met"),
    [("bytes", 225_000_000, True), ("bytes", 225_100_000, False), ("worst", 0.9949, False), ("speed", 2.9, False)],
)
def test_cnnf_has_three_targets_at_once(rows: ModuleType, part: str, value: float, met: bool) -> None:
    case = deepcopy(CASE)
    if part == "speed":
        case["speed"]["admth"]["batch 1, against"]["plain"] = value
    elif part == "worst":
        case["models"]["admth"]["bit_parity"]["32"] = value
    else:
        case["models"]["admth"]["bytes"] = value
    assert rows.cnnf({"cases": {"cnnf-fashion": case}}).met is met


def test_what_failed_is_not_measured_and_says_why(rows: ModuleType) -> None:
    row = rows.mixed_cpu({"cases": {"efficientnet-fashion": CASE}})
    assert (row.met, row.measured) == (None, "not measured: error: the gate is not met")
    assert rows.memory({"cases": {}}).met is None
    assert rows.all_cpu({"cases": {"efficientnet-fashion": CASE}}).met is True
