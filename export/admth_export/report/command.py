"""``admth-export report``: a run as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from admth_runtime.console import print_json, say
from admth_runtime.errors import require

__all__ = ["report_command"]


def report_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.", show_default="here")] = Path(),
    model: Annotated[
        Path | None, typer.Option("--model", "-m", help="The ONNX model.", show_default="model.onnx of the run")
    ] = None,
    database_codes: Annotated[
        Path | None,
        typer.Option(
            help="Encoded images to search, of admth-run encode.", show_default="the run's database, encoded now"
        ),
    ] = None,
    query_codes: Annotated[
        Path | None,
        typer.Option(
            help="Encoded queries, of admth-run encode.", show_default="some of the run's queries, encoded now"
        ),
    ] = None,
    queries: Annotated[int, typer.Option(help="Queries to show, 1 to 50.")] = 8,
    latency: Annotated[
        Path | None,
        typer.Option(
            help="What admth-run bench --json printed, on the device that matters.", show_default="measured now, here"
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The page.", show_default="report.html in the run's folder")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False,
) -> None:
    """Write a run's report: figures, sign parity, queries with their nearest images, latency, in one HTML file."""
    for package in ("torch", "safetensors", "matplotlib", "jinja2"):
        require(package, extra="export", purpose="writing a report")
    from admth_export.report import ReportOptions, write_report

    options = ReportOptions(
        run=run,
        model=model,
        database_codes=database_codes,
        query_codes=query_codes,
        queries=queries,
        latency=latency,
    )
    target = run / "report.html" if out is None else out
    written = write_report(options, target)
    if as_json:
        print_json({"out": str(target), "bytes": written.size, "missing": list(written.missing)})
        return
    for line in written.missing:
        say(f"not in the report: {line}")
    say(f"wrote {target}: one page, {written.size / 1e6:.1f} MB; open it in a browser")
