"""Writing a run's report: gather the facts, render the page, put it in place."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from admth_export.report.facts import Missing, ReportOptions, gather
from admth_export.report.render import render
from admth_runtime.files import atomic_path, write_text

__all__ = ["WrittenReport", "write_report"]


@dataclass(frozen=True)
class WrittenReport:
    """What :func:`write_report` made.

    Attributes:
        path: the page.
        size: its size in bytes.
        missing: one sentence for each part that is not in it.
    """

    path: Path
    size: int
    missing: tuple[str, ...]


def write_report(options: ReportOptions, out: Path) -> WrittenReport:
    """Write the report of a run, by rename.

    Args:
        options: which run, model and images.
        out: the HTML file.

    Raises:
        CheckpointError: the folder is no run, or one of its files is broken.
        InputError: a file that was named is unusable.
        ModelError: the model is broken, or belongs to another run.
        OutputError: the page cannot be written.
        MissingExtraError: Jinja2 or Matplotlib is not installed.
    """
    _check_writable(out)
    facts = gather(options)
    text = render(facts)
    write_text(out, text)
    parts = (facts.training, facts.evaluation, facts.model, facts.parity, facts.neighbours, facts.latency)
    missing = dict.fromkeys(part.what for part in parts if isinstance(part, Missing))
    return WrittenReport(out, len(text.encode()), tuple(missing))


class _ProbeError(Exception):
    """Leaves :func:`atomic_path` without writing."""


def _check_writable(out: Path) -> None:
    """Fail now, and not after minutes of work, where the page cannot be written."""
    with suppress(_ProbeError), atomic_path(out):
        raise _ProbeError
