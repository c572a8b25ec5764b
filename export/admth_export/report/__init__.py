"""A run's report as one HTML page that needs nothing else.

:func:`write_report` reads what the other commands left in a run's folder, searches some images with the exported
model, measures its latency, and writes the page. Names are imported when they are first used, so that the command
line's help stays fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from admth_runtime.lazy import lazy_names

if TYPE_CHECKING:
    from admth_export.report.facts import ReportOptions
    from admth_export.report.writing import WrittenReport, write_report

__all__ = ["ReportOptions", "WrittenReport", "write_report"]

__getattr__, __dir__ = lazy_names(__name__, {"facts": ("ReportOptions",), "writing": ("WrittenReport", "write_report")})
