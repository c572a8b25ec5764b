"""Giving freed memory back to the system after a model was loaded."""

from __future__ import annotations

__all__ = ["return_freed_memory"]


def return_freed_memory() -> None:
    """Ask the C library to return freed memory to the system, where it can.

    Loading a model parses it, copies its weights and lays them out anew; the GNU C library keeps what that frees, up
    to the model's own size, for later allocations that a process which only encodes never makes. ``malloc_trim``
    takes a millisecond. Elsewhere this does nothing.
    """
    try:
        import ctypes

        trim = ctypes.CDLL(None).malloc_trim
    except (ImportError, OSError, AttributeError, TypeError):  # no ctypes, or not the GNU C library
        return
    trim(0)
