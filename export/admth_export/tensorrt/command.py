"""``admth-export trt``."""

from __future__ import annotations

import logging
import sys
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
from admth_runtime.console import print_json, say, warn

if TYPE_CHECKING:
    from admth_export.tensorrt.building import EngineResult

__all__ = ["trt_command"]


def trt_command(
    model: Annotated[
        Path | None,
        typer.Argument(
            metavar="[MODEL]", help="The ONNX model.  [default: model.onnx, or model.int8.trt.onnx for --int8]"
        ),
    ] = None,
    fp32: Annotated[bool, typer.Option("--fp32", help="Single precision.")] = False,
    fp16: Annotated[bool, typer.Option("--fp16", help="Half precision; with --int8, for the rest.")] = False,
    int8: Annotated[bool, typer.Option("--int8", help="8-bit integers, from a calibrated model.")] = False,
    flavor: Annotated[str, typer.Option("--flavor", help="auto, tensorrt or rtx.")] = "auto",
    batch: Annotated[
        tuple[int, int, int],
        typer.Option("--batch", metavar="MIN OPT MAX", help="Batch sizes: smallest, the one to tune for, largest."),
    ] = (1, 8, 32),
    workspace: Annotated[
        int | None, typer.Option("--workspace", metavar="MiB", help="Most scratch memory.  [default: TensorRT's]")
    ] = None,
    optimization_level: Annotated[
        int | None, typer.Option("--optimization-level", help="0 to 5.  [default: TensorRT's, 3]")
    ] = None,
    timing_cache: Annotated[
        Path | None, typer.Option("--timing-cache", help="File with measurements that later builds use again.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="Compute capabilities to build for, such as sm86,sm89.")
    ] = None,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Let later versions, and the lean runtime, read the engine.")
    ] = False,
    tf32: Annotated[bool, typer.Option("--tf32", help="Let FP32 layers round to TF32; costs parity.")] = False,
    keep_fp32: Annotated[
        list[str] | None,
        typer.Option("--keep-fp32", help="Layers to leave in FP32: auto, names, or both.  [default: auto]"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The engine to write.  [default: model.PRECISION.plan or .rtx]"),
    ] = None,
    onnx_only: Annotated[
        bool, typer.Option("--onnx-only", help="Write the typed ONNX model, to build on another machine.")
    ] = False,
    run: Annotated[
        Path | None, typer.Option("--run", help="Folder of the training run.  [default: the model's folder]")
    ] = None,
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
    verbose: Annotated[bool, typer.Option("--verbose", help="Show TensorRT's own messages.")] = False,
    as_json: AsJson = False,
) -> None:
    """Build a TensorRT engine, if the bits of its typed model prove to be PyTorch's."""
    from admth_export.tensorrt.options import EngineOptions, EnginePrecision, parse_gpus, parse_layers
    from admth_runtime.errors import InputError
    from admth_runtime.sidecar import BatchProfile

    precision = EnginePrecision.of_flags(fp32=fp32, fp16=fp16, int8=int8)
    options = EngineOptions(
        batch=BatchProfile(*batch),
        workspace_mib=workspace,
        optimization_level=optimization_level,
        timing_cache=timing_cache,
        gpus=parse_gpus(gpu),
        version_compatible=version_compatible,
        tf32=tf32,
    )
    auto, layers = parse_layers(keep_fp32 or [])
    if keep_fp32 and not (precision.name == "fp16" or precision.half_rest):
        raise InputError(f"--keep-fp32 means nothing for {precision.flags}: it is for --fp16, or --int8 --fp16")
    # Without limits of its own the command leaves them to the model's manifest, which may tell of training for INT8.
    given = noise_threshold is not None or min_bit_parity is not None
    gate = make_gate(precision.name, noise_threshold, min_bit_parity) if given else None
    choice = make_choice(data, root, strip_prefix, images, database_images, seed)
    if verbose:
        _show_messages()

    from admth_export.tensorrt.building import export_engine
    from admth_export.tensorrt.typed_model import HalfChoice

    result = export_engine(
        model,
        out,
        precision=precision,
        flavour=flavor,
        options=options,
        keep=HalfChoice(auto, layers),
        onnx_only=onnx_only,
        run=run,
        gate=gate,
        images=choice,
        verify=verify,
    )
    if as_json:
        print_json(_fields(result))
    else:
        _tell(result, precision.flags)


def _tell(result: EngineResult, flags: str) -> None:
    for report in (result.parity, result.measured):
        if report is not None:
            say(report.table())
    if result.predicted is None:
        warn(f"the parity gate was left out, and the sidecar says so: {result.file} may give other bits than PyTorch")
    elif result.parity is None:
        shares = ", ".join(f"{length}: {100 * share:.3f} %" for length, share in result.predicted["bit_parity"].items())
        say(f"predicted parity, from the model's manifest: {shares}")
    if result.layers_kept:
        say(f"kept in FP32: {', '.join(result.layers_kept)}")
    if result.sidecar is None:
        say(f"wrote {result.file} ({result.bytes / 1e6:,.1f} MB, {result.sha256[:12]})")
        say(f"next, where the engine is to run: admth-export trt {result.file.name} {flags}")
        return
    sidecar = result.sidecar
    say(
        f"wrote {result.file} ({result.bytes / 1e6:,.1f} MB, {sidecar.flavour} {sidecar.tensorrt_version}, "
        f"{', '.join(sidecar.compute_capabilities)}, batch {sidecar.profiles[0]}, built in "
        f"{sidecar.build_seconds:,.1f} s) and its sidecar {result.file.name}.json"
    )
    for path in result.reports:
        say(f"wrote {path}")
    if result.measured is None:
        say(f"not run here, since {result.unmeasured}: the figures above are those of its ONNX model on the CPU")
    say(f"next: admth-run encode IMAGES --model {result.file} --out codes.npz")


def _fields(result: EngineResult) -> dict[str, Any]:
    return {
        "engine" if result.sidecar is not None else "model": str(result.file),
        "bytes": result.bytes,
        "sha256": result.sha256,
        "layers_kept": result.layers_kept,
        "sidecar": None if result.sidecar is None else result.sidecar.to_dict(),
        "predicted_parity": result.predicted,
        "parity": None if result.parity is None else result.parity.to_dict(),
        "measured": None if result.measured is None else result.measured.to_dict(),
        "unmeasured": result.unmeasured,
        "reports": [str(path) for path in result.reports],
    }


def _show_messages() -> None:
    logger = logging.getLogger("admth_export.tensorrt")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("TensorRT %(levelname)s: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
