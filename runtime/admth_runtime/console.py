"""What the command-line programs of all rooms share: errors as one line, exit codes, progress bars, JSON.

Only typer and the standard library are imported here, and rich when a bar is drawn, so that ``--help`` stays fast.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import typer

from admth_runtime._version import __version__
from admth_runtime.errors import AdmthError, InputError

__all__ = ["new_app", "note", "parse_integers", "print_json", "progress", "run_app", "say", "track", "warn"]

Item = TypeVar("Item")

_INTERRUPTED = 130  # 128 + SIGINT, by the shell's convention
_INTERRUPTION = "interrupted: nothing half-written was left behind"


def new_app(help_text: str) -> typer.Typer:
    """Return a typer application in the project's style, with ``--version``; run it with :func:`run_app`."""
    app = typer.Typer(
        help=help_text,
        no_args_is_help=True,
        add_completion=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    def show_version(value: bool) -> None:
        if value:
            typer.echo(f"admth {__version__}")
            raise typer.Exit

    @app.callback()
    def common(
        version: bool = typer.Option(
            False, "--version", callback=show_version, is_eager=True, help="Print the version and stop."
        ),
    ) -> None:
        pass

    return app


def run_app(app: typer.Typer) -> NoReturn:
    """Run an application and exit: 0 when it worked, 1 on any bad input, 130 when interrupted.

    Every error of ours, and every usage error, is one line on standard error without a traceback. A termination
    signal unwinds like Ctrl-C does, so that temporary files are removed.
    """
    signal.signal(signal.SIGTERM, _raise_interrupt)
    _quiet_libraries()
    try:
        result = app(standalone_mode=False)
        code = result if isinstance(result, int) else 0
        if code == _INTERRUPTED:  # newer versions of typer turn Ctrl-C into this code, older ones into Abort
            _fail(_INTERRUPTION)
        sys.stdout.flush()
    except AdmthError as error:
        code = _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        code = _fail(_INTERRUPTION, code=_INTERRUPTED)
    except BrokenPipeError:
        code = _drop_output()
    except SystemExit as error:  # what typer makes of a broken pipe
        code = _drop_output() if isinstance(error.__context__, BrokenPipeError) else _exit_code(error)
    except OSError as error:
        code = _fail(f"{error.filename or 'the system'}: {error.strerror or error}")
    except MemoryError:
        code = _fail("out of memory: use a smaller --batch, or fewer images")
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        code = _usage_error(error)
    sys.exit(code)


def say(text: str) -> None:
    """Print one line of result on standard output."""
    typer.echo(text)


def note(text: str) -> None:
    """Print one line about the work on standard error, where it does not mix with results."""
    typer.echo(text, err=True)


def warn(text: str) -> None:
    """Print one warning line on standard error."""
    typer.echo(f"warning: {' '.join(text.split())}", err=True)


def print_json(value: Any) -> None:
    """Print a result as indented JSON on standard output."""
    typer.echo(json.dumps(value, indent=2, allow_nan=False))


@contextmanager
def progress(description: str, total: int | None, *, unit: str = "") -> Iterator[Callable[[int], None]]:
    """Show a progress bar on standard error while the block runs; silent when that is not a terminal.

    Args:
        description: what is being done, such as ``"encoding"``.
        total: how many steps there are, or None when that is unknown.
        unit: what a step is, such as ``"images"``; shown as a rate.

    Yields:
        A function that advances the bar by a number of steps.
    """
    if not sys.stderr.isatty():
        yield lambda steps: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = [
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    ]
    with Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task(description, total=total, rate="")

        def advance(steps: int) -> None:
            speed = bars.tasks[0].speed
            bars.update(task, advance=steps, rate=f"{speed:,.0f} {unit}/s" if speed and unit else "")

        yield advance


def track(items: Iterable[Item], description: str, *, total: int | None = None, unit: str = "") -> Iterator[Item]:
    """Iterate while a progress bar counts the items; see :func:`progress`."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with progress(description, total, unit=unit) as advance:
        for item in items:
            yield item
            advance(1)


def parse_integers(text: str, *, name: str) -> tuple[int, ...]:
    """Read a comma-separated list such as ``16,32,48,64``.

    Raises:
        InputError: an entry is no integer.
    """
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise InputError(f"{name} {text!r} is not a list of integers: write it as 16,32,48,64") from error


def _fail(message: str, code: int = 1) -> int:
    typer.echo(f"error: {' '.join(message.split(chr(10)))}", err=True)
    return code


def _drop_output() -> int:
    """End well when the reader, such as head, has what it wanted; the interpreter's last flush must not fail either."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _exit_code(error: SystemExit) -> int:
    return error.code if isinstance(error.code, int) else int(error.code is not None)


def _usage_error(error: Any) -> int:
    """Report what typer says of wrong arguments, as one line with the way to the help."""
    context = getattr(error, "ctx", None)
    message = error.format_message().strip()
    if type(error).__name__ == "NoArgsIsHelpError":
        typer.echo(message)
        return 1
    command = f": see  {context.command_path} --help" if context is not None else ""
    return _fail(f"{message.rstrip('.')}{command}")


def _raise_interrupt(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _quiet_libraries() -> None:
    """Keep Pillow's size warning from standing beside our own one-line answer."""
    warnings.filterwarnings("ignore", message=".*decompression bomb.*")
