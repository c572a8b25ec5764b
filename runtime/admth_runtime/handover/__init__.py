"""Handing an index over to a search server: its rows in bulk form, the schema, and the query that uses them.

::

    from admth_runtime.handover import export_index

    export_index(index, "pgvector", "pgvector/")

Every target is a module with a class of the protocol in ``rows.py``; ``export.py`` writes the folder. docs/scale.md
says when to move, and how each target was checked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from admth_runtime.lazy import lazy_names

if TYPE_CHECKING:
    from admth_runtime.handover.buckets import nearest_buckets
    from admth_runtime.handover.export import TARGETS, HandoverSummary, export_index

__all__ = ["TARGETS", "HandoverSummary", "export_index", "nearest_buckets"]

__getattr__, __dir__ = lazy_names(
    __name__, {"buckets": ("nearest_buckets",), "export": ("TARGETS", "HandoverSummary", "export_index")}
)
