"""HashRuntime.encode on ready uint8 arrays against a bare session.run, batch 1."""

from __future__ import annotations

import numpy as np
from _harness import THREADS, Figure, interleave, milliseconds, paired_ratio, report, require_demo_run
from _models import bare_session

from admth_runtime import HashRuntime


def main() -> None:
    """Time both on the demo's model, small enough at 96 pixels to make any overhead show."""
    model = require_demo_run() / "model.onnx"
    session = bare_session(model, THREADS)
    with HashRuntime(model, device="cpu", threads=THREADS) as runtime:
        height, width, _ = runtime.manifest.preprocessing.shape
        images = np.random.default_rng(0).integers(0, 256, (1, height, width, 3), dtype=np.uint8)
        encode, bare = interleave(
            [lambda: runtime.encode(images), lambda: session.run(None, {"images": images})], rounds=3000, warmup=50
        )
    ratio = paired_ratio(encode, bare)
    overhead = 100 * (ratio["median"] - 1)
    report(
        Figure(
            name="HashRuntime.encode on ready uint8 arrays against bare session.run, batch 1",
            value=f"{overhead:+.1f} %",
            target="at most 3 % more",
            met=overhead <= 3.0,
            details={
                "ratio": ratio,
                "encode, ms": milliseconds(encode),
                "session.run, ms": milliseconds(bare),
                "threads": THREADS,
            },
        )
    )


if __name__ == "__main__":
    main()
