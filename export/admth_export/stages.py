"""A step of the work that cannot be counted, shown as one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from admth_runtime.console import progress

__all__ = ["stage"]


@contextmanager
def stage(description: str) -> Iterator[None]:
    """Show a bar of one step while the block runs."""
    with progress(description, 1) as advance:
        yield
        advance(1)
