"""What every benchmark shares: interleaved timing, ratios, the machine's name and the form of a result."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DEMO_RUN = ROOT / "runs" / "demo"
THREADS = 2


@dataclass(frozen=True)
class Figure:
    """One row of docs/benchmarks.md.

    Attributes:
        name: what is measured.
        value: the figure in words, such as ``"1.21 times faster"``.
        target: the target in words.
        met: whether the figure meets it.
        details: everything needed to judge the figure: medians, spreads, settings.
    """

    name: str
    value: str
    target: str
    met: bool
    details: dict[str, Any] = field(default_factory=dict)


def report(figure: Figure) -> None:
    """Print a figure as one JSON line on standard output, the form that run.py reads."""
    print(json.dumps(asdict(figure)), flush=True)


def interleave(
    candidates: Sequence[Callable[[], object]], *, rounds: int, warmup: int = 3, seconds: float = 120.0
) -> list[list[float]]:
    """Time several functions in turn, A B B A, so that a drift of the machine's speed hits all of them alike.

    Every second round runs in reverse: what runs after a certain neighbour finds other caches than the neighbour does.

    Args:
        candidates: functions without arguments.
        rounds: how often each is timed.
        warmup: rounds before that are not counted.
        seconds: no new round starts after this many seconds.

    Returns:
        Seconds of every counted round, a list for each function.
    """
    for _ in range(warmup):
        for function in candidates:
            function()
    times: list[list[float]] = [[] for _ in candidates]
    end = time.perf_counter() + seconds
    for done in range(rounds):
        if done >= 5 and time.perf_counter() > end:
            break
        order = range(len(candidates)) if done % 2 == 0 else reversed(range(len(candidates)))
        for index in order:
            function, record = candidates[index], times[index]
            start = time.perf_counter()
            function()
            record.append(time.perf_counter() - start)
    return times


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float]:
    """Summarise the ratios of pairs that were timed one after the other: median and quartiles."""
    ratios = sorted(a / b for a, b in zip(numerator, denominator, strict=True))
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"median": round(middle, 4), "lower_quartile": round(low, 4), "upper_quartile": round(high, 4)}


def milliseconds(times: Sequence[float]) -> float:
    """Return the median in milliseconds."""
    return round(1e3 * statistics.median(times), 3)


def require_demo_run() -> Path:
    """Return the demo's run folder, or stop with the command that makes it."""
    if not (DEMO_RUN / "model.onnx").is_file():
        sys.exit("error: runs/demo holds no model.onnx: run  make demo  first")
    return DEMO_RUN


def machine() -> dict[str, str]:
    """Name the machine and the versions that figures depend on."""
    facts = {
        "cpu": _cpu_name(),
        "cores usable": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    return facts | {name: version(name) for name in ("torch", "onnxruntime", "onnx", "numpy", "pillow")}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
