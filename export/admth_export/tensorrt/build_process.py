"""Our side of the building process: start :mod:`admth_export.tensorrt.build_worker`, show its progress and messages."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from admth_export.tensorrt.build_worker import request_line
from admth_export.tensorrt.flavours import Flavour
from admth_export.tensorrt.options import EngineOptions
from admth_export.worker_process import crash_error, same_error, started_worker

__all__ = ["BuildOutcome", "run_build"]

_WORKER = "admth_export.tensorrt.build_worker"

_log = logging.getLogger("admth_export.tensorrt")
# An application that sets logging up sees TensorRT's messages; without that nothing is printed.
logging.getLogger("admth_export").addHandler(logging.NullHandler())

_LEVELS = {
    "INTERNAL_ERROR": logging.ERROR,
    "ERROR": logging.ERROR,
    "WARNING": logging.WARNING,
    "INFO": logging.INFO,
    "VERBOSE": logging.DEBUG,
}


@dataclass(frozen=True)
class BuildOutcome:
    """What a build took.

    Attributes:
        seconds: of TensorRT alone.
        version: the TensorRT that built.
    """

    seconds: float
    version: str


class _Bars(Protocol):
    def start(self, name: str, parent: str | None, steps: int) -> None: ...

    def step(self, name: str) -> None: ...

    def finish(self, name: str) -> None: ...


def run_build(
    flavour: Flavour,
    model: Path,
    engine: Path,
    *,
    shape: tuple[int, int, int],
    targets: tuple[str, ...],
    options: EngineOptions,
    cache: Path | None = None,
    names: dict[Path, str] | None = None,
) -> BuildOutcome:
    """Build an engine in a process of its own, with a bar for each phase that TensorRT reports.

    Args:
        flavour: what builds.
        model: the typed ONNX model.
        engine: where the engine goes.
        shape: of one image, ``(H, W, 3)``.
        targets: compute capabilities.
        options: the rest.
        cache: where the updated timing cache goes, or None.
        names: what messages call files that have temporary names.

    Raises:
        AdmthError: what the builder says; see :func:`admth_export.tensorrt.builder.build_engine`.
        DeviceError: the process crashed or was killed.
    """
    request = request_line(
        flavour=flavour.name, model=model, engine=engine, cache=cache, shape=shape, targets=targets, options=options
    )
    named = names or {}
    with tempfile.TemporaryFile() as complaints, started_worker(_WORKER, complaints) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        # A process that died before it has read everything is told from its exit code below.
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(request)
            process.stdin.close()
        with _bars(f"{flavour.title} builds") as bars:
            for line in iter(process.stdout.readline, b""):
                message: dict[str, Any] = json.loads(line)
                if "result" in message:
                    return BuildOutcome(message["result"]["seconds"], message["result"]["version"])
                if "error" in message:
                    error = message["error"]
                    for path, name in named.items():
                        error["message"] = error["message"].replace(str(path), name)
                    raise same_error(error, str(model), None)
                _show(message, bars)
        task = f"built {named.get(engine, engine)}"
        raise crash_error(process.wait(), complaints, task, "run  admth-run doctor , and look with --verbose")


def _show(message: dict[str, Any], bars: _Bars) -> None:
    if "message" in message:
        severity, text = message["message"]
        _log.log(_LEVELS.get(severity, logging.INFO), "%s", text)
    elif "phase" in message:
        bars.start(*message["phase"])
    elif "step" in message:
        bars.step(message["step"])
    elif "finished" in message:
        bars.finish(message["finished"])


@contextlib.contextmanager
def _bars(title: str) -> Iterator[_Bars]:
    if not sys.stderr.isatty():
        yield _Silence()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = [
        TextColumn("{task.description:<44.44}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    ]
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield _RichBars(progress, title)


class _Silence:
    def start(self, name: str, parent: str | None, steps: int) -> None:
        pass

    def step(self, name: str) -> None:
        pass

    def finish(self, name: str) -> None:
        pass


class _RichBars:
    """A bar for each phase that is under way, those inside another one indented."""

    def __init__(self, progress: Any, title: str) -> None:
        self._progress = progress
        self._title = title
        self._tasks: dict[str, tuple[Any, int]] = {}

    def start(self, name: str, parent: str | None, steps: int) -> None:
        self.finish(name)  # a name may come again without having been finished
        depth = self._tasks[parent][1] + 1 if parent in self._tasks else 0
        text = f"{self._title}: {name}" if depth == 0 else f"{'  ' * depth}{name}"
        self._tasks[name] = (self._progress.add_task(text, total=max(steps, 1)), depth)

    def step(self, name: str) -> None:
        if name in self._tasks:
            self._progress.update(self._tasks[name][0], advance=1)

    def finish(self, name: str) -> None:
        if name in self._tasks:
            self._progress.remove_task(self._tasks.pop(name)[0])
