"""Sign parity of the demo's FP32 model on ONNX Runtime against PyTorch, 1,000 test images, every length."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from _harness import Figure, report, require_demo_run

IMAGES = 1000
MARGIN = 1e-3


def main() -> None:
    """Run ``admth-export verify`` on the demo's model, report what flipped, and let its own gate pass anything."""
    model = require_demo_run() / "model.onnx"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "admth_export", "verify", str(model), "--images", str(IMAGES), "--json"]
        command += ["--noise-threshold", "1e9", "--min-bit-parity", "0", "--out", str(Path(folder) / "parity.json")]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result = json.loads(done.stdout)
    run = result["runs"][0]
    flips = sum(length["flip_count"] for length in run["lengths"].values())
    margin = max((length["max_flip_margin"] or 0.0 for length in run["lengths"].values()), default=0.0)
    equal = min(length["bit_parity"] for length in run["lengths"].values())
    errors = {bits: length["max_logit_error"] for bits, length in run["lengths"].items()}
    largest = f", the largest with margin {margin:.1e}" if flips else ""
    report(
        Figure(
            name=f"sign parity ORT FP32 against PyTorch, {IMAGES:,} test images, every length",
            value=f"{100 * equal:.3f} % of bits equal at the worst length; {flips} flips{largest}",
            target="no flip with margin above 1e-3",
            met=margin <= MARGIN,
            details={
                "bit parity": {bits: length["bit_parity"] for bits, length in run["lengths"].items()},
                "largest logit error": errors,
                "images": result["images"]["images"],
                "engine": result["engine"],
                "retrieval": result["retrieval"],
            },
        )
    )


if __name__ == "__main__":
    main()
