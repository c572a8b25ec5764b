"""``admth-run stream``: a camera, a video or a folder in, codes out, frame by frame."""

from __future__ import annotations

from collections.abc import Sized
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from admth_runtime.command_options import DEFAULT_MODEL, AsJson, Device, Model, Provider, SelfTest, Threads
from admth_runtime.console import note, print_json, progress, say
from admth_runtime.errors import ImageError, InputError

if TYPE_CHECKING:
    from admth_runtime.pipeline import NdjsonSink, ParquetSink, PipelineStats, Source

__all__ = ["stream"]


def stream(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE", help="Images, folders of them and patterns; or a video, a camera, a network stream."
        ),
    ],
    model: Model = DEFAULT_MODEL,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write Parquet instead of JSON lines on standard output."),
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Go on with images that arrive in the folder.")] = False,
    every: Annotated[int, typer.Option(help="Video: encode every so manieth frame.")] = 1,
    batch: Annotated[int, typer.Option(help="The most images in one inference call.")] = 8,
    max_wait_ms: Annotated[float, typer.Option(help="How long a batch waits to be full, in milliseconds.")] = 10.0,
    policy: Annotated[
        str | None,
        typer.Option(
            help="When the queue is full: block, drop-oldest or reject.  [default: drop-oldest for a camera or network "
            "stream, else block]"
        ),
    ] = None,
    queue_size: Annotated[int, typer.Option("--queue", help="Frames that may wait to be decoded.")] = 64,
    limit: Annotated[int | None, typer.Option(help="Stop after so many frames.")] = None,
    idle_timeout: Annotated[
        float | None, typer.Option(help="--watch: stop after so many seconds without a new image.")
    ] = None,
    settle: Annotated[
        float, typer.Option(help="--watch: an image is whole when it has not changed for so many seconds.")
    ] = 1.0,
    video_format: Annotated[
        str | None, typer.Option("--format", help="Video: FFmpeg's name of the input format, such as v4l2.")
    ] = None,
    reconnect: Annotated[
        float | None, typer.Option(help="Camera or stream: open it again so many seconds after it is gone.")
    ] = None,
    rows_per_file: Annotated[
        int | None, typer.Option(help="--out is a folder: begin another file after so many rows.")
    ] = None,
    logits: Annotated[bool, typer.Option("--logits", help="--out: keep the logits of every length too.")] = False,
    self_test: SelfTest = False,
    threads: Threads = None,
    device: Device = "auto",
    provider: Provider = None,
    as_json: AsJson = False,
) -> None:
    """Encode the frames of a camera, a video or a folder as they come.

    Ctrl-C, or a termination signal, delivers what was read and completes the file.
    """
    from admth_runtime.pipeline import HashPipeline, PipelineOptions, next_id
    from admth_runtime.runtime import HashRuntime

    if idle_timeout is not None and not watch:
        raise InputError("--idle-timeout is for --watch: leave it out, or watch the folder")
    source = _source(
        sources,
        watch={"idle_timeout_s": idle_timeout, "settle_s": settle} if watch else None,
        video={"every": every, "format": video_format, "reconnect_s": reconnect},
    )
    sink = _sink(out, rows_per_file=rows_per_file, logits=logits, as_json=as_json)
    options = PipelineOptions(
        batch_size=batch,
        max_wait_ms=max_wait_ms,
        queue_size=queue_size,
        policy=policy or ("drop-oldest" if getattr(source, "live", False) else "block"),
        max_frames=limit,
        first_id=next_id(out) if out is not None and rows_per_file else 0,
    )
    ends = [end for end in (len(source) if isinstance(source, Sized) else None, limit) if end is not None]
    with HashRuntime(
        model, device=device, provider=provider, threads=threads, batch_size=batch, self_test=self_test
    ) as runtime:
        pipeline = HashPipeline(runtime, source, sink, options)
        try:
            with progress("encoding", min(ends, default=None), unit="frames") as advance:
                pipeline.run(advance)
        finally:
            if (stats := pipeline.stats()).frames:
                _report(stats, out, as_json=as_json)
    if getattr(sink, "reader_gone", False):
        raise BrokenPipeError  # so that the command ends as any does whose reader has enough
    if stats.errors and not stats.delivered:
        raise ImageError(f"none of {stats.errors:,} frames could be encoded: the reasons are in the output")


def _source(sources: list[str], watch: dict[str, Any] | None, video: dict[str, Any]) -> Source:
    """Return the source that the arguments mean."""
    from admth_runtime.pipeline import FileSource, VideoSource, WatchedFolder
    from admth_runtime.preprocessing import IMAGE_SUFFIXES

    of_video = [f"--{name.split('_')[0]}" for name, value in video.items() if value not in (None, 1)]
    if watch is not None:
        if len(sources) != 1 or of_video:
            raise InputError(f"--watch takes one folder, and no {' '.join(of_video) or 'other'}: {' '.join(sources)}")
        return WatchedFolder(sources[0], recursive=True, **watch)
    name = sources[0]
    images = len(sources) > 1 or any(character in name for character in "*?[") or Path(name).is_dir()
    if "://" in name or not (images or Path(name).suffix.lower() in IMAGE_SUFFIXES):
        if len(sources) > 1:
            raise InputError(f"one video at a time: {' '.join(sources)}")
        return VideoSource(name, **video)
    if of_video:
        raise InputError(f"{' '.join(of_video)} is for a video, and {name} is not one: leave it out")
    return FileSource(sources)


def _sink(out: Path | None, *, rows_per_file: int | None, logits: bool, as_json: bool) -> NdjsonSink | ParquetSink:
    from admth_runtime.pipeline import NdjsonSink, ParquetSink

    if out is not None:
        return ParquetSink(out, rows_per_file=rows_per_file, logits=logits)
    if rows_per_file or logits:
        raise InputError("--rows-per-file and --logits are for Parquet: name the file or folder with --out")
    if as_json:
        raise InputError("--json is for the summary of --out: without it the output is JSON lines already")
    return NdjsonSink()


def _report(stats: PipelineStats, out: Path | None, *, as_json: bool) -> None:
    """Say what became of the frames: on standard output when that is free, else beside it."""
    if as_json:
        print_json({"out": str(out), **stats.to_dict()})
        return
    left_out = {
        "unreadable": stats.errors,
        "dropped": stats.dropped,
        "rejected": stats.rejected,
        "discarded": stats.discarded,
    }
    parts = [f"{stats.delivered:,} frames encoded", *(f"{count:,} {what}" for what, count in left_out.items() if count)]
    summary = f"{', '.join(parts)}, {stats.frames_per_second:,.1f} frames/s, p90 {stats.latency.p90_ms:.1f} ms"
    if out is None:
        note(summary)
    else:
        say(f"wrote {out}: {summary}")
