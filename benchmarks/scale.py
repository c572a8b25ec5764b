"""Run the benchmarks of the edge and of scale, and write their table into docs/scale.md: ``make bench-scale``."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from _harness import ROOT, machine

from admth_runtime.console import note, track
from admth_runtime.files import write_text

BENCHMARKS = (
    "corpus_encoding",
    "pipeline_throughput",
    "search_scale",
    "search_quality",
    "search_exact",
    "jpeg_decoding",
    "handover",
)
PAGE = ROOT / "docs" / "scale.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def main() -> None:
    """Run the benchmarks that are named, or all, and write the table when all were run."""
    names = sys.argv[1:] or list(BENCHMARKS)
    if unknown := sorted(set(names) - set(BENCHMARKS)):
        sys.exit(f"error: no benchmark {unknown[0]!r}: use {', '.join(BENCHMARKS)}")
    start = time.perf_counter()
    figures = [(name, figure) for name in track(names, "benchmarks") for figure in run(name)]
    minutes = (time.perf_counter() - start) / 60
    for _, figure in figures:
        note(f"{'met   ' if figure['met'] else 'MISSED'}  {figure['name']}: {figure['value']} ({figure['target']})")
    if set(names) == set(BENCHMARKS):
        write_text(PAGE, inserted(PAGE.read_text(encoding="utf-8"), table(figures, minutes)))
        note(f"wrote the table of {PAGE.relative_to(ROOT)}")


def run(name: str) -> list[dict[str, Any]]:
    """Run one benchmark and return its figures, one for each line that it prints."""
    script = Path(__file__).with_name(f"{name}.py")
    done = subprocess.run([sys.executable, "-W", "ignore", str(script)], check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"error: benchmarks/{name}.py failed with exit code {done.returncode}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def table(figures: list[tuple[str, dict[str, Any]]], minutes: float) -> str:
    """Return the machine, the table and the details of every row."""
    facts = ", ".join(f"{key} {value}" for key, value in machine().items())
    lines = [
        "## Measured",
        "",
        f"Written by `make bench-scale` in {minutes:.0f} minutes, on: {facts}. Ratios are of things timed in turn in",
        "one run. Nothing here was run on a GPU.",
        "",
        "| figure | measured | target | met | script |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, figure in figures:
        met = "yes" if figure["met"] else "**no**"
        lines.append(f"| {figure['name']} | {figure['value']} | {figure['target']} | {met} | `benchmarks/{name}.py` |")
    lines += ["", "<details><summary>Details of every row</summary>", ""]
    for _, figure in figures:
        lines += [figure["name"], "", "```json", json.dumps(figure["details"], indent=1), "```", ""]
    return "\n".join([*lines, "</details>"])


def inserted(page: str, text: str) -> str:
    """Return the page with the text between its two marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


if __name__ == "__main__":
    main()
