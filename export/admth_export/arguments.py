"""Options that several commands of ``admth-export`` share, and what they mean together."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from admth_export.gate import Gate
    from admth_export.options import ImageChoice

__all__ = [
    "AsJson",
    "Data",
    "DatabaseImages",
    "Images",
    "MinBitParity",
    "NoiseThreshold",
    "Root",
    "Seed",
    "StripPrefix",
    "make_choice",
    "make_gate",
]

Data = Annotated[
    str | None,
    typer.Option("--data", help="Images for the gate, such as fashion-mnist:DIR.  [default: those of the run]"),
]
Root = Annotated[Path | None, typer.Option("--root", help="Folder of the relative paths of a --data list:FILE.")]
StripPrefix = Annotated[
    str | None, typer.Option("--strip-prefix", help="Text to cut from the start of each path of such a list.")
]
Images = Annotated[int, typer.Option("--images", help="Query images to compare.")]
DatabaseImages = Annotated[
    int, typer.Option("--database-images", help="Database images for the effect on mAP; 0 leaves it out.")
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the choice of images.")]
NoiseThreshold = Annotated[
    float | None,
    typer.Option(
        "--noise-threshold",
        help="Margin |z| up to which a flipped bit is noise.  [default: 0.001 FP32, 0.25 FP16, none INT8]",
    ),
]
MinBitParity = Annotated[
    float | None,
    typer.Option(
        "--min-bit-parity",
        help="Least share of equal bits.  [default: 0.9999 FP32, 0.998 FP16, 0.95 INT8, 0.999 INT8 after QAT]",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


def make_gate(precision: str, noise_threshold: float | None, min_bit_parity: float | None) -> Gate:
    """Return the gate of a precision with the limits of the command line in place of its own."""
    from admth_export.gate import Gate

    return Gate.of_precision(precision, noise_threshold=noise_threshold, minimum_bit_parity=min_bit_parity)


def make_choice(
    data: str | None, root: Path | None, strip_prefix: str | None, images: int, database_images: int, seed: int
) -> ImageChoice:
    """Return what the command line says about the gate's images."""
    from admth_export.options import ImageChoice

    return ImageChoice(data, None if root is None else str(root), strip_prefix, images, database_images, seed)
