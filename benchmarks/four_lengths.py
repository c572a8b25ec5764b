"""One call for four code lengths against four single-length models, EfficientNet-Lite0, batch 1."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from _harness import THREADS, Figure, interleave, milliseconds, paired_ratio, report
from _models import bare_session, export_seeded

LENGTHS = (16, 32, 48, 64)


def measure(size: int) -> dict[str, Any]:
    """Time one call of the four-length model and one call of each single-length model, in turn."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [
            export_seeded(Path(folder) / f"{'-'.join(map(str, lengths))}.onnx", "efficientnet_lite0", size, lengths)
            for lengths in (LENGTHS, *((length,) for length in LENGTHS))
        ]
        together, *single = [bare_session(path, THREADS) for path in paths]
    images = np.random.default_rng(0).integers(0, 256, (1, size, size, 3), dtype=np.uint8)
    one, four = interleave(
        [
            lambda: together.run(None, {"images": images}),
            lambda: [session.run(None, {"images": images}) for session in single],
        ],
        rounds=300,
        warmup=20,
    )
    return {
        "ratio": paired_ratio(four, one),
        "one call, ms": milliseconds(one),
        "four models, ms": milliseconds(four),
    }


def main() -> None:
    """Measure at the backbone's own 224 pixels, which is the figure, and at the demo's 96 pixels."""
    details = {f"{size} pixels": measure(size) for size in (224, 96)}
    figure, small = (facts["ratio"]["median"] for facts in details.values())
    report(
        Figure(
            name="one call for four lengths against four single-length models, EfficientNet-Lite0 at 224, batch 1",
            value=f"{figure:.2f} times faster (at 96 pixels {small:.2f})",
            target="at least 3.5 times faster",
            met=figure >= 3.5,
            details={**details, "threads": THREADS},
        )
    )


if __name__ == "__main__":
    main()
