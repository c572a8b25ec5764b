"""Options that several commands of ``admth-run`` share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["DEFAULT_MODEL", "AsJson", "Device", "Model", "Provider", "SelfTest", "Threads"]

Model = Annotated[
    Path, typer.Option("--model", "-m", help="The ONNX model, or a TensorRT engine, as admth-export writes them.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N; only auto falls back to the CPU.")]
Provider = Annotated[
    str | None,
    typer.Option(help="ONNX Runtime's provider: cpu, cuda, tensorrt or rtx.  [default: the device's own]"),
]
Threads = Annotated[int | None, typer.Option(help="CPU threads of one inference call.  [default: physical cores]")]
SelfTest = Annotated[
    bool,
    typer.Option("--self-test", help="First encode the model's golden pictures, and stop if a code is not as it was."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]

DEFAULT_MODEL = Path("model.onnx")
