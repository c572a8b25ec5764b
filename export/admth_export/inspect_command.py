"""``admth-export inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from admth_export.arguments import AsJson
from admth_runtime.console import print_json, say

__all__ = ["inspect_command"]


def inspect_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An ONNX model or a TensorRT engine.")],
    layers: Annotated[bool, typer.Option("--layers", help="List the layers with their precision.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say what an ONNX model or an engine is, from header and sidecar, without loading it into an engine."""
    from admth_export.inspection import inspect_file, lines_of

    facts = inspect_file(file, layers=layers)
    if as_json:
        print_json(facts)
        return
    for line in lines_of(facts):
        say(line)
