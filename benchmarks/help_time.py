"""Seconds that --help of every command takes, and whether it imports torch or onnxruntime."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time

from _harness import Figure, report

HEAVY = ("torch", "onnxruntime", "onnx")
ROUNDS = 7
PROGRAM = """
import importlib, json, sys
name = sys.argv.pop(1)
sys.argv[0] = name
try:
    importlib.import_module(name + ".cli").main()
except SystemExit as stop:
    assert not stop.code, stop.code
print(json.dumps([module for module in {heavy} if module in sys.modules]), file=sys.stderr)
"""
COMMANDS = {
    "admth_training": ((), ("fit",), ("evaluate",)),
    "admth_calibration": ((),),
    "admth_export": ((), ("onnx",), ("trt",), ("verify",), ("inspect",), ("report",)),
    "admth_runtime": ((), ("encode",), ("search",), ("info",), ("doctor",), ("bench",)),
}


def help_of(package: str, words: tuple[str, ...]) -> tuple[float, list[str]]:
    """Run one --help in a new process; return its seconds and the heavy packages that it imported."""
    program = PROGRAM.replace("{heavy}", repr(HEAVY))
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", program, package, *words, "--help"], check=True, capture_output=True, text=True
    )
    return time.perf_counter() - begin, json.loads(done.stderr.splitlines()[-1])


def main() -> None:
    """Take every command's median and report the slowest."""
    medians, imported = {}, set()
    for package, commands in COMMANDS.items():
        for words in commands:
            runs = [help_of(package, words) for _ in range(ROUNDS)]
            medians[" ".join((package, *words))] = round(statistics.median(seconds for seconds, _ in runs), 3)
            imported.update(name for _, names in runs for name in names)
    slowest = max(medians, key=lambda name: medians[name])
    report(
        Figure(
            name="--help of every command",
            value=f"{medians[slowest]:.2f} s ({slowest}); heavy imports: {', '.join(sorted(imported)) or 'none'}",
            target="no torch or onnxruntime imported; under 0.5 s",
            met=medians[slowest] < 0.5 and not imported,
            details={"median seconds": medians},
        )
    )


if __name__ == "__main__":
    main()
