"""Video files, cameras and network streams, through PyAV (FFmpeg)."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from admth_runtime.errors import InputError, PipelineError, require
from admth_runtime.pipeline.frames import Frame

__all__ = ["VideoSource"]

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")  # two letters or more: not a drive of Windows
_CAMERA = re.compile(r"/dev/video\d+")
_DEVICE_FORMATS = frozenset({"v4l2", "video4linux2", "dshow", "avfoundation", "vfwcap", "gdigrab", "x11grab"})
_MOST_BROKEN = 100  # packets in a row that cannot be decoded, after which the stream counts as broken

_log = logging.getLogger("admth_runtime")


class VideoSource:
    """Frames of a video file, a camera, or a stream of the network.

    A file ends with its last frame; a file that is shorter than it says fails at its end. A camera or stream does not
    end: when it does, or stays silent for ``timeout_s``, that is an error, or a reason to open it again. A packet that
    cannot be decoded becomes a frame with an error. Frames are turned as the file says, and converted to RGB in the
    decoding threads.

    Args:
        source: a file; a camera such as ``"/dev/video0"``; or an address such as ``"rtsp://camera/stream"``.
        every: give every so manieth frame only, beginning with the first. The others are decoded, since frames build
            on each other, and cost no more than that.
        format: FFmpeg's name of the input's format, such as ``"v4l2"``, ``"avfoundation"`` or ``"dshow"``; None
            finds out, and takes ``"v4l2"`` for ``/dev/video0`` and its like.
        options: FFmpeg's options of that format, such as ``{"framerate": "30", "video_size": "1280x720"}`` or
            ``{"rtsp_transport": "tcp"}``.
        live: whether it is a camera or stream; None goes by the name.
        timeout_s: how long opening, and waiting for a frame, may take, in seconds. Some devices do not heed it.
        reconnect_s: live: open it again so many seconds after it has ended or failed, again and again; None raises.

    Raises:
        InputError: there is no such file, or a number is out of range.
        MissingExtraError: PyAV is not installed.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        *,
        every: int = 1,
        format: str | None = None,
        options: Mapping[str, str] | None = None,
        live: bool | None = None,
        timeout_s: float = 5.0,
        reconnect_s: float | None = None,
    ) -> None:
        self.name = os.fspath(source)
        self._av: Any = require("av", extra="video", purpose="reading a video")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise InputError(f"every {every!r} is not an integer of 1 or more")
        if timeout_s <= 0 or (reconnect_s is not None and reconnect_s < 0):
            raise InputError(f"timeout_s {timeout_s!r} or reconnect_s {reconnect_s!r} is out of range")
        camera, address = _CAMERA.fullmatch(self.name) is not None, _SCHEME.match(self.name) is not None
        self._format = format or ("v4l2" if camera else None)
        self.live = (camera or address or self._format in _DEVICE_FORMATS) if live is None else live
        if not self.live and not address and self._format is None and not Path(self.name).is_file():
            state = "is a folder, not a video" if Path(self.name).is_dir() else "no such file"
            raise InputError(f"{self.name}: {state}: pass a video file, a camera such as /dev/video0, or an address")
        if reconnect_s is not None and not self.live:
            raise InputError(f"reconnect_s is for cameras and streams, and {self.name} is a file: leave it out")
        self._every, self._options = every, dict(options or {})
        self._timeout_s, self._reconnect_s = timeout_s, reconnect_s
        self._count = 0  # frames decoded, over all connections

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        """Yield frames; a frame's image is a function that converts it.

        Raises:
            PipelineError: the source cannot be opened, has vanished, or is broken.
        """
        while (problem := (yield from self._connection(stop))) is not None and not stop.is_set():
            if self._reconnect_s is None:
                raise problem
            _log.warning("%s; opening it again in %g s", problem, self._reconnect_s)
            stop.wait(self._reconnect_s)

    def _connection(self, stop: threading.Event) -> Generator[Frame, None, PipelineError | None]:
        """Yield the frames of one opening; return what was wrong with its end, if anything was."""
        try:
            with self._open() as container:
                if not container.streams.video:
                    raise PipelineError(f"{self.name} holds no video: {_holds(container)}")
                stream = container.streams.video[0]
                # Threads that work on several frames at once would keep a camera's newest frames back.
                stream.thread_type = "SLICE" if self.live else "AUTO"
                reached = yield from self._decoded(container, stream, stop)
                if not stop.is_set():
                    self._check_end(container, stream, reached)
        except PipelineError as problem:
            return problem
        return None

    def _decoded(self, container: Any, stream: Any, stop: threading.Event) -> Generator[Frame, None, float]:
        """Yield the frames of a stream; return the second of it that they reach."""
        broken, reached = 0, 0.0
        packets = container.demux(stream)
        while not stop.is_set():
            try:
                packet = next(packets, None)
            except self._av.FFmpegError as error:
                raise self._vanished(error) from error
            if packet is None:
                return reached
            try:
                pictures = packet.decode()
            except self._av.InvalidDataError as error:
                broken += 1
                if broken >= _MOST_BROKEN:
                    raise PipelineError(
                        f"{self.name} is broken: {broken} packets in a row cannot be decoded ({error.strerror})"
                    ) from error
                yield Frame(None, self.name, time.time(), f"a packet cannot be decoded ({error.strerror})")
                continue
            except self._av.EOFError:  # older versions say so when the decoder has been emptied
                return reached
            except self._av.FFmpegError as error:
                raise self._vanished(error) from error
            broken = 0
            for picture in pictures:
                reached = max(reached, _end(picture) - _start(stream))
                if self._count % self._every == 0:
                    yield Frame(_Converter(picture), self._uri(picture), time.time())
                self._count += 1
        return reached

    def _open(self) -> Any:
        try:
            return self._av.open(
                self.name,
                format=self._format,
                options=self._options,
                timeout=(self._timeout_s, self._timeout_s),
            )
        except self._av.FFmpegError as error:
            hint = "is it plugged in, free, and may you read it?" if self.live else "is it whole, and a video?"
            raise PipelineError(f"{self.name} cannot be opened ({_reason(error, self._timeout_s)}): {hint}") from error
        except ValueError as error:
            raise InputError(f"{self.name} cannot be opened with format {self._format!r}: {error}") from error

    def _check_end(self, container: Any, stream: Any, reached: float) -> None:
        """Raise unless this is where the source should end."""
        if self.live:
            raise PipelineError(
                f"{self.name} has ended: unplugged, or closed at the other end; "
                "connect it and start again, or use reconnect_s"
            )
        expected = _duration(container, stream)
        if expected - reached > max(1.0, 0.05 * expected):
            raise PipelineError(
                f"{self.name} ends after {reached:.1f} of {expected:.1f} s: it is truncated; copy it again"
            )

    def _vanished(self, error: Any) -> PipelineError:
        mend = "connect it and start again, or use reconnect_s" if self.live else "it is damaged, or has been removed"
        return PipelineError(f"{self.name} can no longer be read ({_reason(error, self._timeout_s)}): {mend}")

    def _uri(self, picture: Any) -> str:
        """Return where a frame is from, with its time as a media fragment (W3C): ``clip.mp4#t=1.250000``."""
        return self.name if picture.time is None else f"{self.name}#t={picture.time:.6f}"


class _Converter:
    """Turns one decoded video frame into uint8 ``[H, W, 3]``, RGB, upright, when it is called."""

    __slots__ = ("_picture",)

    def __init__(self, picture: Any) -> None:
        self._picture = picture

    def __call__(self) -> NDArray[np.uint8]:
        pixels: NDArray[np.uint8] = self._picture.to_ndarray(format="rgb24")
        # The display matrix, in degrees counter-clockwise; phones say so instead of turning the pixels.
        turns = round(getattr(self._picture, "rotation", 0) / 90) % 4
        return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels


def _start(stream: Any) -> float:
    return float((stream.start_time or 0) * stream.time_base)


def _end(picture: Any) -> float:
    """Return until when a frame is shown, in seconds; 0 where it does not say."""
    if picture.time is None:
        return 0.0
    return float(picture.time + (getattr(picture, "duration", None) or 0) * picture.time_base)


def _duration(container: Any, stream: Any) -> float:
    """Return how long a file says that its video is, in seconds; 0 where it says nothing of the video alone."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    return float(container.duration or 0) / 1e6 if len(container.streams) == 1 else 0.0


def _reason(error: Any, timeout_s: float) -> str:
    if type(error).__name__ in ("ExitError", "TimeoutError"):
        return f"nothing came for {timeout_s:g} s"
    return str(getattr(error, "strerror", None) or error)


def _holds(container: Any) -> str:
    kinds = sorted({stream.type for stream in container.streams})
    return f"its streams are {', '.join(kinds)}" if kinds else "it has no streams"
