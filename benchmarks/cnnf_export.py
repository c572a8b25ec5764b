"""The deployed graph of CNN-F against a plain torch.onnx.export of the same network, batch 1."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from _harness import THREADS, Figure, interleave, milliseconds, paired_ratio, report
from _models import bare_session, export_seeded, seeded_network

LENGTHS = (16, 32, 48, 64)


def export_plain(path: Path) -> Path:
    """Export the network as it is trained, with the exporter's own optimiser and nothing else."""
    example = torch.zeros((2, 224, 224, 3), dtype=torch.uint8)
    torch.onnx.export(
        seeded_network("cnnf", 224, LENGTHS),
        (example,),
        path,
        dynamo=True,
        opset_version=20,
        input_names=["images"],
        output_names=[f"logits_{length}" for length in LENGTHS],
        dynamic_shapes={"pixels": {0: torch.export.Dim("batch")}},
        external_data=False,
        verbose=False,
    )
    return path


def main() -> None:
    """Measure both graphs in turn and compare their logits."""
    with tempfile.TemporaryDirectory() as folder:
        plain = bare_session(export_plain(Path(folder) / "plain.onnx"), THREADS)
        deployed = bare_session(export_seeded(Path(folder) / "deployed.onnx", "cnnf", 224, LENGTHS), THREADS)
    images = np.random.default_rng(0).integers(0, 256, (1, 224, 224, 3), dtype=np.uint8)
    names = [f"logits_{length}" for length in LENGTHS]
    pairs = zip(plain.run(names, {"images": images}), deployed.run(names, {"images": images}), strict=True)
    difference = max(float(np.abs(a - b).max()) for a, b in pairs)
    slow, fast = interleave(
        [lambda: plain.run(None, {"images": images}), lambda: deployed.run(None, {"images": images})],
        rounds=200,
        warmup=10,
    )
    ratio = paired_ratio(slow, fast)
    report(
        Figure(
            name="CNN-F export against a plain torch.onnx.export of the same network, batch 1",
            value=f"{ratio['median']:.2f} times faster",
            target="at least 1.15 times faster",
            met=ratio["median"] >= 1.15,
            details={
                "ratio": ratio,
                "plain, ms": milliseconds(slow),
                "deployed, ms": milliseconds(fast),
                "largest logit difference": difference,
                "threads": THREADS,
            },
        )
    )


if __name__ == "__main__":
    main()
