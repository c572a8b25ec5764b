"""HashPipeline on ready uint8 arrays against bare session.run on batches of the same size."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
from _harness import THREADS, Figure, interleave, milliseconds, paired_ratio, report, require_demo_run
from _models import bare_session

from admth_runtime import HashPipeline, HashRuntime, PipelineOptions

BATCHES = (1, 8, 32)
FRAMES = 512


def main() -> None:
    """Time both on the demo's model, small enough at 96 pixels to make any overhead show."""
    model = require_demo_run() / "model.onnx"
    session = bare_session(model, THREADS)
    details: dict[str, object] = {"frames a run": FRAMES, "threads": THREADS}
    shares: dict[int, float] = {}
    with HashRuntime(model, device="cpu", threads=THREADS, batch_size=max(BATCHES)) as runtime:
        shape = runtime.manifest.preprocessing.shape
        images = np.random.default_rng(0).integers(0, 256, (FRAMES, *shape), dtype=np.uint8)
        for size in BATCHES:
            options = PipelineOptions(batch_size=size)

            def bare(size: int = size) -> None:
                for start in range(0, FRAMES, size):
                    session.run(None, {"images": images[start : start + size]})

            def pipeline(options: PipelineOptions = options) -> None:
                taken = 0

                def count(result: object) -> None:
                    nonlocal taken
                    taken += 1

                HashPipeline(runtime, images, count, options).run()
                if taken != FRAMES:
                    raise SystemExit(f"error: the pipeline delivered {taken} of {FRAMES} frames")

            work: tuple[list[float], list[float]] = ([], [])
            candidates = [_clocked(bare, work[0]), _clocked(pipeline, work[1])]
            plain, piped = interleave(candidates, rounds=24, warmup=1, seconds=60)
            ratio = paired_ratio(plain, piped)
            shares[size] = 100 * ratio["median"]
            details[f"batch {size}"] = {
                "throughput ratio": ratio,
                "session.run, ms": milliseconds(plain),
                "pipeline, ms": milliseconds(piped),
                # All threads together; other programs on the machine hardly touch it.
                "processor time ratio": round(statistics.median(work[0]) / statistics.median(work[1]), 4),
            }
    worst = min(shares.values())
    report(
        Figure(
            name="pipeline against bare session.run throughput on ready arrays, batch 1, 8 and 32",
            value=", ".join(f"{share:.1f} % at batch {size}" for size, share in shares.items()),
            target="at least 95 % at each",
            met=worst >= 95.0,
            details=details,
        )
    )


def _clocked(function: Callable[[], None], seconds: list[float]) -> Callable[[], None]:
    """Note the processor time of every call."""

    def call() -> None:
        start = time.process_time()
        function()
        seconds.append(time.process_time() - start)

    return call


if __name__ == "__main__":
    main()
