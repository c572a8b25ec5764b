"""Watch a folder: encode every picture that arrives, and say which earlier one it repeats.

    python examples/watch_folder.py incoming/ --model model.onnx --codes codes/

One JSON line a picture on standard output: its code, and the nearest earlier picture when at most ``--threshold`` of 64
bits differ. With ``--codes`` the codes are kept as Parquet files too, which  admth-run search  and the index read.
Ctrl-C ends it and completes the last file. Needs  pip install 'admth[cpu,parquet]'.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import deque
from collections.abc import Sequence

import numpy as np

from admth_runtime import AdmthError, HashPipeline, HashRuntime, PipelineOptions, hamming_distance
from admth_runtime.pipeline import FrameResult, ParquetSink, WatchedFolder, next_id


class Repeats:
    """A sink that prints every result with the nearest earlier one, and hands it on to another sink.

    It remembers the latest ``memory`` pictures only: a program that runs for months must not grow.
    """

    def __init__(self, threshold: int, memory: int, then: ParquetSink | None) -> None:
        self._threshold, self._then = threshold, then
        self._codes = np.zeros((memory, 8), np.uint8)
        self._uris: deque[str] = deque(maxlen=memory)
        self._count = 0

    def open(self, runtime: HashRuntime) -> None:
        """Get ready."""
        if self._then:
            self._then.open(runtime)

    def write(self, results: Sequence[FrameResult]) -> None:
        """Take the results of one batch."""
        for result in results:
            line = result.to_dict() | (self._nearest(result) if result.ok else {})
            print(json.dumps(line), flush=True)
        if self._then:
            self._then.write(results)

    def close(self, failed: bool) -> None:
        """Complete the last file."""
        if self._then:
            self._then.close(failed)

    def _nearest(self, result: FrameResult) -> dict[str, object]:
        known, code = len(self._uris), result[64]
        found: dict[str, object] = {}
        if known:
            distances = hamming_distance(self._codes[:known], code[None])
            best = int(distances.argmin())
            if distances[best] <= self._threshold:
                # The rows are a ring; the latest picture is in row count - 1, and the last of the uris.
                age = (self._count - 1 - best) % len(self._codes)
                found = {"repeats": self._uris[-1 - age], "distance": int(distances[best])}
        self._codes[self._count % len(self._codes)] = code
        self._uris.append(result.uri)
        self._count += 1
        return found


def main() -> int:
    """Run until Ctrl-C, or until nothing has come for ``--idle-timeout`` seconds."""
    arguments = parse()
    source = WatchedFolder(
        arguments.folder,
        recursive=True,
        settle_s=arguments.settle,
        idle_timeout_s=arguments.idle_timeout,
    )
    kept, first_id = None, 0
    if arguments.codes:
        kept = ParquetSink(arguments.codes, rows_per_file=100_000, seconds_per_file=600)
        first_id = next_id(arguments.codes)
    with HashRuntime(arguments.model, threads=arguments.threads) as runtime:
        options = PipelineOptions(max_wait_ms=50, first_id=first_id)
        pipeline = HashPipeline(runtime, source, Repeats(arguments.threshold, 10_000, kept), options)
        try:
            stats = pipeline.run()
        except KeyboardInterrupt:
            stats = pipeline.stats()
    print(f"{stats.delivered} pictures encoded, {stats.errors} unreadable", file=sys.stderr)
    return 0


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Encode the pictures that arrive in a folder, and find repeats.")
    parser.add_argument("folder", help="the folder to watch")
    parser.add_argument("--model", default="model.onnx", help="the ONNX model or TensorRT engine")
    parser.add_argument("--codes", default=None, help="a folder for Parquet files of codes")
    parser.add_argument("--threshold", type=int, default=4, help="of 64 bits, how many may differ in a repeat")
    parser.add_argument("--settle", type=float, default=1.0, help="a picture is whole when unchanged for so long")
    parser.add_argument("--idle-timeout", type=float, default=None, help="end after so many seconds without a picture")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads of one inference call")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except AdmthError as error:
        sys.exit(f"error: {error}")
