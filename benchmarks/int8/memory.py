"""Peak memory of calibrating 2,000 images, for both backbones."""

from __future__ import annotations

from typing import Any

from admth_runtime.console import note
from int8.networks import data_spec, prepare_network
from int8.processes import WorkError, admth, execute
from int8.settings import CASES, Settings

__all__ = ["IMAGES", "measure_memory"]

IMAGES = 2000


def measure_memory(settings: Settings) -> dict[str, Any]:
    """Calibrate each Fashion-MNIST network on 2,000 images and return time and peak memory of the process."""
    found: dict[str, Any] = {"images": IMAGES}
    for name in ("efficientnet-fashion", "cnnf-fashion"):
        network = prepare_network(CASES[name], settings)
        out = network.models / "memory.onnx"
        command = [*admth("admth-calibrate"), str(network.onnx), "--target", "cpu", "--images", str(IMAGES)]
        command += ["--data", data_spec(network.case, settings), "--out", str(out)]
        out.unlink(missing_ok=True)
        try:
            spent = execute(command, log=out.with_suffix(".log"))
            found[name] = {"seconds": spent.seconds, "peak bytes": spent.peak_bytes}
        except WorkError as error:
            note(f"{name}: {error}")
            found[name] = {"error": str(error)}
        out.unlink(missing_ok=True)
    return found
