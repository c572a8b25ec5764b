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


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"admth {__version__}")
        raise typer.Exit


@app.command()
def calibrate(
    data: Annotated[
        str, typer.Option("--data", help="Images: folder:DIR, list:FILE or fashion-mnist:DIR; labels are not needed.")
    ],
    model: Annotated[Path, typer.Argument(metavar="[MODEL]", help="The FP32 ONNX model.")] = Path("model.onnx"),
    target: Annotated[str, typer.Option("--target", help="What the INT8 model is for: trt.")] = "trt",
    images: Annotated[int, typer.Option("--images", help="Images that give the ranges, 128 or more.")] = 512,
    check_images: Annotated[int, typer.Option("--check-images", help="Other images to compare with FP32 on.")] = 500,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the choice of images.")] = 0,
    keep_fp32: Annotated[
        list[str] | None, typer.Option("--keep-fp32", help="Layers to leave in FP32, such as trunk.stem.")
    ] = None,
    root: Annotated[Path | None, typer.Option("--root", help="Folder of the relative paths of a list:FILE.")] = None,
    strip_prefix: Annotated[
        str | None, typer.Option("--strip-prefix", help="Text to cut from the start of each path of such a list.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The file to write.  [default: model.int8.trt.onnx]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop."),
    ] = False,
) -> None:
    """Make an INT8 model of an FP32 one, with the ranges of its values on real images."""
    from admth_calibration.options import CalibrationOptions

    names = tuple(part.strip() for text in keep_fp32 or [] for part in text.split(",") if part.strip())
    options = CalibrationOptions(target, images, check_images, seed, names)

    from admth_calibration.calibrating import calibrate as make

    result = make(model, data, out, options=options, root=root, strip_prefix=strip_prefix)
    if as_json:
        print_json(_fields(result))
    else:
        _tell(result)


def main() -> None:
    """Run ``admth-calibrate``."""
    run_app(app)


def _tell(result: CalibrationResult) -> None:
    facts = dict(result.manifest.calibration or {})
    predicted = facts["predicted"]
    kept = len(result.kept)
    say(f"{len(result.layers)} layers in INT8, {kept} with weights in FP32, ranges of {facts['images']} images")
    say(f"predicted parity with the FP32 model, on {predicted['images']} images on the CPU ({predicted['engine']}):")
    for length, share in predicted["bit_parity"].items():
        exact = predicted["exact_code_rate"][length]
        say(f"{length:>6} bits: {100 * share:.3f} % of the bits equal, {100 * exact:.2f} % of the codes")
    say(
        "images that the network was trained on have wider margins, so new ones lose more bits: the gate of "
        "admth-export trt measures the run's queries"
    )
    say(f"wrote {result.model} ({result.bytes / 1e6:,.1f} MB, {result.sha256[:12]})")
    say(f"next: admth-export trt {result.model} --int8")


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
    }
