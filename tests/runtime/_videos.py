"""Small videos for the tests, made with PyAV."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np

RATE = 25


def scenes(count: int = 50, size: tuple[int, int] = (64, 48), length: int = 10) -> list[np.ndarray]:
    """Frames uint8 [height, width, 3]: every ``length`` frames another pattern of large cells."""
    width, height = size
    frames = []
    for number in range(count):
        cells = np.random.default_rng(number // length).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        frames.append(np.repeat(np.repeat(cells, height // 4, axis=0), width // 4, axis=1))
    return frames


def write_video(
    path: Path,
    frames: list[np.ndarray],
    *,
    codec: str = "mpeg4",
    rotation: int | None = None,
    options: dict[str, str] | None = None,
    format: str | None = None,
) -> Path:
    """Encode frames; the file's ending chooses the container."""
    with av.open(str(path), "w", format=format, options=options or {}) as container:
        stream = container.add_stream(codec, rate=RATE)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = 5
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path
