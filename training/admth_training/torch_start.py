"""Importing PyTorch with its threads set up; every command that computes with it starts here."""

from __future__ import annotations

import os

from admth_runtime.errors import InputError, require

__all__ = ["start_torch"]


def start_torch(*, extra: str, purpose: str, threads: int | None = None) -> None:
    """Import PyTorch, or say how to install it.

    Args:
        extra: the extra of the distribution that brings it, for the message.
        purpose: what needs it, as the start of a sentence.
        threads: CPU threads of one operation; None leaves PyTorch's own number.

    Raises:
        InputError: ``threads`` is not positive.
        MissingExtraError: PyTorch or safetensors is not installed.
    """
    if threads is not None and threads < 1:
        raise InputError(f"--threads {threads} is not positive: use at least 1")
    # Threads that wait for each other sleep instead of spinning, which on busy processors is eight times faster. The
    # library reads this once, when it is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    torch = require("torch", extra=extra, purpose=purpose)
    require("safetensors", extra=extra, purpose=purpose)
    if threads is not None:
        torch.set_num_threads(threads)
