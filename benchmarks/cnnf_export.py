"""The deployed graph of CNN-F against a plain torch.onnx.export of the same network, batch 1."""

from __future__ import annotations

import statistics
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
from _harness import THREADS, Figure, interleave, milliseconds, paired_ratio, report
from _models import bare_session, export_plain, export_seeded, seeded_network

LENGTHS = (16, 32, 48, 64)
LOADS = 7


def main() -> None:
    """Measure both graphs in turn and compare their logits.

    Where the 884 MB of weights land in memory moves a session's speed by several percent for as long as it lives. So
    both are loaded anew for each of several measurements, in alternating order, and the median of those counts.
    """
    images = np.random.default_rng(0).integers(0, 256, (1, 224, 224, 3), dtype=np.uint8)
    ratios, slow, fast = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        paths = Path(folder) / "plain.onnx", Path(folder) / "deployed.onnx"
        export_plain(paths[0], seeded_network("cnnf", 224, LENGTHS))
        export_seeded(paths[1], "cnnf", 224, LENGTHS)
        for load in range(LOADS):
            sessions = {path: bare_session(path, THREADS) for path in (paths if load % 2 == 0 else paths[::-1])}
            plain, deployed = (sessions[path] for path in paths)
            times = interleave([partial(run, plain, images), partial(run, deployed, images)], rounds=80, warmup=10)
            ratios.append(paired_ratio(*times)["median"])
            slow += times[0]
            fast += times[1]
            difference = max(
                float(np.abs(a - b).max()) for a, b in zip(run(plain, images), run(deployed, images), strict=True)
            )
            del sessions, plain, deployed
    ratio = statistics.median(ratios)
    report(
        Figure(
            name="CNN-F export against a plain torch.onnx.export of the same network, batch 1",
            value=f"{ratio:.2f} times faster",
            target="at least 1.15 times faster",
            met=ratio >= 1.15,
            details={
                "ratio of each load": ratios,
                "plain, ms": milliseconds(slow),
                "deployed, ms": milliseconds(fast),
                "largest logit difference": difference,
                "threads": THREADS,
            },
        )
    )


def run(session: onnxruntime.InferenceSession, images: np.ndarray) -> list[np.ndarray]:
    """Return the logits of every length; the deployed graph computes its codes for them all the same."""
    outputs = session.run(None, {"images": images})
    return [output for output in outputs if output.dtype == np.float32]


if __name__ == "__main__":
    main()
