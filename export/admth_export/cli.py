"""``admth-export``: trained runs to ONNX models and TensorRT engines, with proof that their bits are PyTorch's bits.

Everything heavy is imported inside the commands, so that ``--help`` is instant.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from admth_export.arguments import (
    AsJson,
    Data,
    DatabaseImages,
    Images,
    MinBitParity,
    NoiseThreshold,
    Root,
    Seed,
    StripPrefix,
    make_choice,
    make_gate,
)
from admth_export.inspect_command import inspect_command
from admth_export.report.command import report_command
from admth_export.tensorrt.command import trt_command
from admth_runtime.console import new_app, print_json, run_app, say, warn
from admth_training.torch_start import start_torch

if TYPE_CHECKING:
    from admth_export.exporting import ExportResult
__all__ = ["app", "main"]

app = new_app("Export trained runs to ONNX, and prove that the engine's bits are PyTorch's bits.")


@app.command()
def onnx(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the training run.")] = Path(),
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The file to write.  [default: model.onnx in the run's folder]")
    ] = None,
    opset: Annotated[int, typer.Option(help="Operator set version, 18 to 23.")] = 20,
    ir_version: Annotated[int, typer.Option(help="File format version, 8 to 12.")] = 10,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Pass the parity gate, or leave it out and record that.")
    ] = True,
    data: Data = None,
    root: Root = None,
    strip_prefix: StripPrefix = None,
    images: Images = 1000,
    database_images: DatabaseImages = 1000,
    seed: Seed = 0,
    noise_threshold: NoiseThreshold = None,
    min_bit_parity: MinBitParity = None,
    as_json: AsJson = False,
) -> None:
    """Export a run to one ONNX file, if its bits prove to be PyTorch's."""
    from admth_export.options import OnnxOptions, check_target

    # Everything that can be refused is, before PyTorch is imported, which takes seconds.
    options = OnnxOptions(opset, ir_version)
    gate = make_gate("fp32", noise_threshold, min_bit_parity)
    choice = make_choice(data, root, strip_prefix, images, database_images, seed)
    if out is not None:
        check_target(out)

    start_torch(extra="export", purpose="exporting and verifying")
    from admth_export.exporting import export_onnx

    result = export_onnx(run, out, options=options, gate=gate, images=choice, verify=verify)
    if as_json:
        print_json(_export_fields(result))
        return
    if result.parity is not None:
        say(result.parity.table())
    else:
        warn(
            "the parity gate was left out, and the model's manifest says so: run  admth-export verify "
            + str(result.model)
        )
    say(f"wrote {result.model} ({result.bytes / 1e6:,.1f} MB, opset {opset}, IR {ir_version}, {result.sha256[:12]})")
    if result.report is not None:
        say(f"wrote {result.report} and {result.picture}")
    say(f"next: admth-run encode IMAGES --model {result.model} --out codes.npz")
    say(f"      admth-run info {result.model}")


@app.command()
def verify(
    candidate: Annotated[Path, typer.Argument(metavar="CANDIDATE", help="The ONNX model, or engine, to check.")],
    run: Annotated[
        Path | None, typer.Option("--run", help="Folder of its training run.  [default: the candidate's folder]")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The report's .json file.  [default: NAME.parity.json beside the candidate]"),
    ] = None,
    data: Data = None,
    root: Root = None,
    strip_prefix: StripPrefix = None,
    images: Images = 1000,
    database_images: DatabaseImages = 1000,
    seed: Seed = 0,
    noise_threshold: NoiseThreshold = None,
    min_bit_parity: MinBitParity = None,
    device: Annotated[
        str | None,
        typer.Option(help="Where the candidate runs: auto, cpu or cuda.  [default: cpu, cuda for an engine]"),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads of the candidate.  [default: physical cores]")
    ] = None,
    any_checkpoint: Annotated[
        bool, typer.Option("--any-checkpoint", help="Compare with a run that the candidate did not come from.")
    ] = False,
    against: Annotated[
        Path | None,
        typer.Option(
            "--against",
            help="Another run to compare with besides, without limits.  [default: for INT8 after QAT, its FP32 run]",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check the bits of an exported model or engine against PyTorch's; exit 1 when the gate fails."""
    from admth_export.candidate_file import read_candidate
    from admth_export.gate import Gate
    from admth_runtime.errors import OutputError, ParityError

    # Everything that can be refused is, before PyTorch is imported, which takes seconds.
    if out is not None and out.suffix != ".json":
        raise OutputError(f"cannot write {out}: a report's name ends with .json; pass for example --out report.json")
    if out is not None and not out.parent.is_dir():
        raise OutputError(f"cannot write {out}: its folder does not exist; create it first")
    choice = make_choice(data, root, strip_prefix, images, database_images, seed)
    gate = Gate.of_model(
        read_candidate(candidate).manifest, noise_threshold=noise_threshold, minimum_bit_parity=min_bit_parity
    )

    start_torch(extra="export", purpose="exporting and verifying")
    from admth_export.exporting import report_paths, write_report
    from admth_export.verification import verify as check

    report = check(
        candidate,
        run,
        gate=gate,
        images=choice,
        device=device,
        threads=threads,
        any_checkpoint=any_checkpoint,
        against=against,
    )
    json_path, picture = report_paths(candidate) if out is None else (out, out.with_suffix(".png"))
    write_report(report, json_path, picture)
    if as_json:
        print_json({**report.to_dict(), "report": str(json_path), "picture": str(picture)})
    else:
        say(report.table())
        say(f"wrote {json_path} and {picture}")
    if report.passed:
        if not as_json:
            say(f"passed: {candidate} is within the gate")
        return
    more = f" (and {len(report.failures) - 1:,} more)" if len(report.failures) > 1 else ""
    raise ParityError(f"{candidate} fails the parity gate: {report.failures[0]}{more}: see {json_path}")


app.command("trt")(trt_command)
app.command("inspect")(inspect_command)
app.command("report")(report_command)


def main() -> None:
    """Run ``admth-export``."""
    run_app(app)


def _export_fields(result: ExportResult) -> dict[str, Any]:
    return {
        "model": str(result.model),
        "bytes": result.bytes,
        "sha256": result.sha256,
        "code_lengths": list(result.manifest.code_lengths),
        "parity": None if result.parity is None else result.parity.to_dict(),
        "report": None if result.report is None else str(result.report),
        "picture": None if result.picture is None else str(result.picture),
    }
