"""``admth-calibrate --weights-only``: what it prints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from admth_calibration.weights_only import WeightsOnlyResult, weights_only
from admth_calibration.weights_options import WeightsOnlyOptions
from admth_runtime.console import print_json, say
from admth_runtime.errors import InputError

__all__ = ["compress_weights", "refuse_others"]


def refuse_others(given: Mapping[str, bool]) -> None:
    """Refuse options that mean nothing where no activation is quantised for good.

    Args:
        given: whether each option was given.

    Raises:
        InputError: one was.
    """
    for option, present in given.items():
        if present:
            raise InputError(f"{option} means nothing with --weights-only: leave one of them out")


def compress_weights(
    model: Path,
    weights: str,
    data: str | None,
    out: Path | None,
    keep_fp32: tuple[str, ...],
    images: int,
    check_images: int,
    seed: int,
    root: Path | None,
    strip_prefix: str | None,
    *,
    check_data: str | None = None,
    as_json: bool,
) -> None:
    """Compress the weights of a model and say what came of it; the arguments are those of the command."""
    options = WeightsOnlyOptions(
        weights=weights, keep_fp32=keep_fp32, images=images, check_images=check_images, seed=seed
    )
    result = weights_only(
        model, out, data=data, options=options, root=root, strip_prefix=strip_prefix, check_data=check_data
    )
    if as_json:
        print_json(
            {
                "model": str(result.model),
                "bytes": result.bytes,
                "source_bytes": result.source_bytes,
                "sha256": result.sha256,
                "precision": result.manifest.precision,
                "calibration": dict(result.manifest.calibration or {}),
                "layers": dict(result.layers),
                "kept": list(result.kept),
            }
        )
    else:
        _tell(result)


def _tell(result: WeightsOnlyResult) -> None:
    facts = dict(result.manifest.calibration or {})
    kinds = ", ".join(f"{count} in {kind}" for kind, count in facts["weights"].items())
    say(f"weights of {len(result.layers)} layers: {kinds}; {len(result.kept)} kept in FP32")
    if predicted := facts.get("predicted"):
        say(f"parity with the FP32 model, on {predicted['images']} images on the CPU:")
        for length, share in predicted["bit_parity"].items():
            say(f"{length:>6} bits: {100 * share:.3f} % of the bits equal")
    say(
        f"wrote {result.model} ({result.bytes / 1e6:,.1f} MB, {result.bytes / result.source_bytes:.2f} of the FP32 "
        f"model, {result.sha256[:12]})"
    )
    say(f"next: admth-export verify {result.model}")
