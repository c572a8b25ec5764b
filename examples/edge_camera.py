"""A camera loop for the edge: say when the scene changes, and keep going.

    python examples/edge_camera.py /dev/video0 --model model.onnx
    python examples/edge_camera.py rtsp://camera/stream --model model.onnx --reconnect 5
    python examples/edge_camera.py clip.mp4 --model model.onnx --every 5

The 64-bit code of each frame is held against the code of the last scene. When more than ``--threshold`` bits differ for
``--confirm`` frames in a row, a new scene has begun and one JSON line says so. Needs  pip install 'admth[cpu,video]'.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time

import numpy as np

from admth_runtime import AdmthError, HashPipeline, HashRuntime, PipelineOptions, hamming_distance
from admth_runtime.pipeline import FrameResult, VideoSource


class SceneChanges:
    """Prints a line for every new scene; called by the pipeline with each frame's result, in order."""

    def __init__(self, threshold: int, confirm: int) -> None:
        self._threshold, self._confirm = threshold, confirm
        self._scene: np.ndarray | None = None
        self._unlike = 0
        self.scenes = 0

    def __call__(self, result: FrameResult) -> None:
        """Compare one frame with the scene."""
        if not result.ok:
            print(f"frame {result.id}: {result.error}", file=sys.stderr)
            return
        code = result[64]
        distance = None if self._scene is None else int(hamming_distance(code, self._scene))
        self._unlike = self._unlike + 1 if distance is None or distance > self._threshold else 0
        if distance is None or self._unlike >= self._confirm:
            # A copy, since a result's codes are a view of its whole batch.
            self._scene, self._unlike = code.copy(), 0
            self.scenes += 1
            event = {"scene": self.scenes, "frame": result.id, "uri": result.uri, "distance": distance}
            print(json.dumps({**event, "code": result.hex(64)}), flush=True)


def main() -> int:
    """Run until the video ends, or until Ctrl-C."""
    arguments = parse()
    logging.basicConfig(format="%(message)s")  # the source says here when it opens a camera again
    changes = SceneChanges(arguments.threshold, arguments.confirm)
    with HashRuntime(arguments.model, threads=arguments.threads, batch_size=arguments.batch) as runtime:
        source = VideoSource(arguments.source, every=arguments.every, reconnect_s=arguments.reconnect)
        # What a camera shows now matters more than what it showed a second ago; a file loses nothing.
        policy = "drop-oldest" if source.live else "block"
        options = PipelineOptions(max_wait_ms=5, queue_size=4, policy=policy)
        pipeline = HashPipeline(runtime, source, changes, options)
        report_at = time.monotonic() + arguments.report
        with pipeline:
            try:
                while not pipeline.join(timeout=0.5):
                    if time.monotonic() >= report_at:
                        report(pipeline)
                        report_at += arguments.report
            except KeyboardInterrupt:
                pass  # the end of the block delivers what has been read
        report(pipeline)
    return 0


def report(pipeline: HashPipeline) -> None:
    """Say how the loop is doing; a service would send this to its monitoring."""
    stats = pipeline.stats()
    stages = ", ".join(f"{name} {stats.stages[name].p90_ms:.1f}" for name in ("decode", "preprocess", "infer"))
    print(
        f"{stats.delivered} frames, {stats.dropped} dropped, {stats.errors} unreadable, "
        f"{stats.frames_per_second:.1f} frames/s, p90 in ms: {stages}, end to end {stats.latency.p90_ms:.1f}",
        file=sys.stderr,
    )


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Say when the scene before a camera changes.")
    parser.add_argument("source", help="a camera such as /dev/video0, a network stream, or a video file")
    parser.add_argument("--model", default="model.onnx", help="the ONNX model or TensorRT engine")
    parser.add_argument("--every", type=int, default=1, help="look at every so manieth frame")
    parser.add_argument("--threshold", type=int, default=16, help="of 64 bits, how many may differ within a scene")
    parser.add_argument("--confirm", type=int, default=2, help="frames in a row that must differ")
    parser.add_argument("--batch", type=int, default=4, help="the most frames in one inference call")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads of one inference call")
    parser.add_argument("--reconnect", type=float, default=None, help="open a lost camera again after so many seconds")
    parser.add_argument("--report", type=float, default=10.0, help="seconds between two reports on standard error")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except AdmthError as error:
        sys.exit(f"error: {error}")
