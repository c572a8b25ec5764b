"""A pipeline from a camera, a folder or arrays to hash codes, to be embedded and left running.

::

    from admth_runtime import HashPipeline, HashRuntime, PipelineOptions
    from admth_runtime.pipeline import VideoSource

    with HashRuntime("model.onnx") as runtime:
        HashPipeline(runtime, VideoSource("/dev/video0"), print, PipelineOptions(policy="drop-oldest")).run()

Names are imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from admth_runtime.lazy import lazy_names

if TYPE_CHECKING:
    from admth_runtime.pipeline.frames import Frame, FrameResult
    from admth_runtime.pipeline.options import POLICIES, PipelineOptions
    from admth_runtime.pipeline.parquet_sink import ParquetSink, next_id
    from admth_runtime.pipeline.pipeline import HashPipeline
    from admth_runtime.pipeline.sinks import CallbackSink, NdjsonSink, Sink
    from admth_runtime.pipeline.sources import ArraySource, FileSource, Source
    from admth_runtime.pipeline.stats import PipelineStats, QueueStats, StageStats
    from admth_runtime.pipeline.video import VideoSource
    from admth_runtime.pipeline.watched_folder import WatchedFolder

__all__ = [
    "POLICIES",
    "ArraySource",
    "CallbackSink",
    "FileSource",
    "Frame",
    "FrameResult",
    "HashPipeline",
    "NdjsonSink",
    "ParquetSink",
    "PipelineOptions",
    "PipelineStats",
    "QueueStats",
    "Sink",
    "Source",
    "StageStats",
    "VideoSource",
    "WatchedFolder",
    "next_id",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "frames": ("Frame", "FrameResult"),
        "options": ("POLICIES", "PipelineOptions"),
        "parquet_sink": ("ParquetSink", "next_id"),
        "pipeline": ("HashPipeline",),
        "sinks": ("CallbackSink", "NdjsonSink", "Sink"),
        "sources": ("ArraySource", "FileSource", "Source"),
        "stats": ("PipelineStats", "QueueStats", "StageStats"),
        "video": ("VideoSource",),
        "watched_folder": ("WatchedFolder",),
    },
)
