"""A run's report as one HTML page that needs nothing else.

:func:`write_report` reads what the other commands left in a run's folder, searches some images with the exported
model, measures its latency, and writes the page. Names are imported when they are first used, so that the command
line's help stays fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from admth_export.report.facts import ReportOptions
    from admth_export.report.writing import WrittenReport, write_report

__all__ = ["ReportOptions", "WrittenReport", "write_report"]

_HOMES = {"ReportOptions": "facts", "WrittenReport": "writing", "write_report": "writing"}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
