"""``admth-calibrate``: an FP32 ONNX model and some images become an INT8 model.

Everything heavy is imported inside the command, so that ``--help`` is instant.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from admth_runtime._version import __version__
from admth_runtime.console import print_json, run_app, say

if TYPE_CHECKING:
    from admth_calibration.calibrating import CalibrationResult

__all__ = ["app", "main"]

# One command, so without the subcommands of the other programs.
app = typer.Typer(
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_GATE = 0.995


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"admth {__version__}")
        raise typer.Exit


@app.command()
def calibrate(
    model: Annotated[Path, typer.Argument(metavar="[MODEL]", help="The FP32 ONNX model.")] = Path("model.onnx"),
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="Images: folder:DIR, list:FILE, fashion-mnist:DIR or emoji:DIR. A model of a QAT run needs none.",
        ),
    ] = None,
    target: Annotated[
        str, typer.Option("--target", help="What the INT8 model is for: cpu (ONNX Runtime), trt (TensorRT) or both.")
    ] = "cpu",
    min_bit_parity: Annotated[
        float | None,
        typer.Option(
            help="Share of bits equal to FP32 at every code length; the layers that cost most bits stay in float until "
            f"it is met.  [default: {_GATE}]"
        ),
    ] = None,
    all_int8: Annotated[bool, typer.Option("--all-int8", help="Every layer in INT8, whatever the bits.")] = False,
    min_map_ratio: Annotated[
        float | None, typer.Option(help="Least mAP over that of FP32, at every code length; the data needs labels.")
    ] = None,
    max_latency_ratio: Annotated[
        float | None, typer.Option(help="Most time of one image over that of FP32, on this CPU, such as 0.75.")
    ] = None,
    images: Annotated[int, typer.Option("--images", help="Images that give the ranges, 128 or more.")] = 512,
    check_data: Annotated[
        str | None,
        typer.Option(
            help="Images to compare with FP32 on, best such as were not trained on.  [default: others of --data]"
        ),
    ] = None,
    check_images: Annotated[int, typer.Option("--check-images", help="How many of them.")] = 500,
    method: Annotated[
        str, typer.Option("--method", help="How ranges are chosen: min-max, percentile, entropy, mse or sign-aware.")
    ] = "mse",
    rounding: Annotated[
        str, typer.Option("--rounding", help="How weights are rounded: nearest, zero-sum or gptq.")
    ] = "gptq",
    correct_bias: Annotated[
        bool, typer.Option("--correct-bias/--no-correct-bias", help="Correct biases layer by layer.")
    ] = True,
    equalise: Annotated[
        bool, typer.Option("--equalise/--no-equalise", help="Equalise channels before quantising.")
    ] = True,
    reduce_range: Annotated[
        str, typer.Option(help="Weights of 7 bits, for x86 without VNNI: auto, yes or no.")
    ] = "auto",
    keep_fp32: Annotated[
        list[str] | None, typer.Option("--keep-fp32", help="Layers to leave in float, such as trunk.stem.")
    ] = None,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Measure every layer alone, and draw what each costs.")
    ] = False,
    weights_only: Annotated[
        str | None, typer.Option(help="Store the weights alone in few bits: int8 or int4; --data is optional then.")
    ] = None,
    block_images: Annotated[int, typer.Option(help="Images in memory at once; fewer take less memory.")] = 128,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the choice of images.")] = 0,
    root: Annotated[Path | None, typer.Option("--root", help="Folder of the relative paths of a list:FILE.")] = None,
    strip_prefix: Annotated[
        str | None, typer.Option("--strip-prefix", help="Text to cut from the start of each path of such a list.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The file to write.  [default: model.int8.onnx, model.int8.trt.onnx]"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop."),
    ] = False,
) -> None:
    """Make an INT8 model of an FP32 one that keeps the signs of its logits, or say by how much none does."""
    names = tuple(part.strip() for text in keep_fp32 or [] for part in text.split(",") if part.strip())
    if weights_only is not None:
        from admth_calibration.weights_command import compress_weights, refuse_others

        refuse_others(
            {
                f"--target {target}": target != "cpu",
                "--min-bit-parity": min_bit_parity is not None,
                "--all-int8": all_int8,
                "--min-map-ratio": min_map_ratio is not None,
                "--max-latency-ratio": max_latency_ratio is not None,
                "--sensitivity": sensitivity,
            }
        )
        compress_weights(
            model,
            weights_only,
            data,
            out,
            names,
            images,
            check_images,
            seed,
            root,
            strip_prefix,
            check_data=check_data,
            as_json=as_json,
        )
        return
    from admth_calibration.gates import Gates
    from admth_calibration.options import CalibrationOptions
    from admth_runtime.errors import InputError

    if all_int8 and min_bit_parity is not None:
        raise InputError("--all-int8 and --min-bit-parity exclude each other: leave one of them out")
    asked = None if all_int8 else _GATE if min_bit_parity is None else min_bit_parity
    options = CalibrationOptions(
        target=target,
        images=images,
        check_images=check_images,
        block_images=block_images,
        seed=seed,
        keep_fp32=names,
        method=method,
        rounding=rounding,
        correct_bias=correct_bias,
        equalise=equalise,
        reduce_range=reduce_range,
        gates=Gates(asked, min_map_ratio, max_latency_ratio),
        sensitivity=sensitivity,
    )

    from admth_calibration.calibrating import calibrate as make

    results = make(model, data, out, options=options, root=root, strip_prefix=strip_prefix, check_data=check_data)
    if as_json:
        print_json([_fields(result) for result in results])
        return
    for result in results:
        _tell(result)


def main() -> None:
    """Run ``admth-calibrate``."""
    run_app(app)


def _tell(result: CalibrationResult) -> None:
    facts = dict(result.manifest.calibration or {})
    looked = f", ranges of {facts['images']} images" if "images" in facts else ", ranges learned in training"
    say(f"{len(result.layers)} layers in INT8, {len(facts['kept_fp32'])} kept in float{looked}")
    if predicted := facts.get("predicted"):
        trt = result.manifest.target == "tensorrt"
        kind = "predicted parity with the FP32 model" if trt else "parity with the FP32 model"
        say(f"{kind}, on {predicted['images']} images on the CPU:")
        for length, share in predicted["bit_parity"].items():
            exact = predicted["exact_code_rate"][length]
            say(f"{length:>6} bits: {100 * share:.3f} % of the bits equal, {100 * exact:.2f} % of the codes")
        if "latency_ratio" in predicted:
            say(f"one image takes {predicted['latency_ratio']:.2f} of the FP32 model's time on this CPU")
        if predicted["images_blended"]:
            say("each blended with a tenth of another, in place of images that the network has not seen: --check-data")
    say(f"wrote {result.model} ({result.bytes / 1e6:,.1f} MB, {result.sha256[:12]})")
    for path in (*((result.report,) if result.report else ()), *result.pictures):
        say(f"wrote {path}")
    if result.manifest.target == "tensorrt":
        say(f"next: admth-export trt {result.model} --int8")
    else:
        say(f"next: admth-export verify {result.model}")


def _fields(result: CalibrationResult) -> dict[str, Any]:
    return {
        "model": str(result.model),
        "bytes": result.bytes,
        "sha256": result.sha256,
        "precision": result.manifest.precision,
        "target": result.manifest.target,
        "calibration": dict(result.manifest.calibration or {}),
        "layers": list(result.layers),
        "kept": list(result.kept),
        "report": None if result.report is None else str(result.report),
        "pictures": [str(path) for path in result.pictures],
    }
