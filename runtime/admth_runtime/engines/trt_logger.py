"""TensorRT's messages, through Python's logging, and the last errors of each thread for our own messages."""

from __future__ import annotations

import logging
import threading
from functools import cache
from typing import Any

__all__ = ["TensorRTMessages", "messages_of"]

_log = logging.getLogger("admth_runtime.tensorrt")

_KNOWN = (
    ("incompatible device", "the engine was built for another GPU"),
    ("expecting compute", "the engine was built for another GPU"),
    ("not compatible with this version", "the engine was built by another version of TensorRT"),
    ("version tag does not match", "the engine was built by another version of TensorRT"),
    ("platform specific tag mismatch", "the engine was built for another operating system or processor"),
    ("out of memory", "the GPU has no memory left"),
    ("outofmemory", "the GPU has no memory left"),
    ("unexpected call to stub", "the lean runtime cannot run a plan that is not version compatible"),
)


class TensorRTMessages:
    """A logger to hand to TensorRT, and what it reported as errors.

    TensorRT keeps the first logger that it is given until the process ends and calls it from any thread, so there is
    one for each TensorRT module and it is never freed; see :func:`messages_of`.

    Args:
        bindings: the TensorRT module.
    """

    def __init__(self, bindings: Any) -> None:
        self._local = threading.local()
        messages = self

        class Logger(bindings.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                bindings.ILogger.__init__(self)

            def log(self, severity: Any, msg: str) -> None:
                messages._take(severity.name, msg)

        self.logger: Any = Logger()

    def clear(self) -> None:
        """Forget the errors of this thread."""
        self._local.errors = []

    def reason(self) -> str:
        """Say in one line why TensorRT refused, by the errors that it reported in this thread since :meth:`clear`."""
        errors: list[str] = getattr(self._local, "errors", [])
        text = " ".join(" ".join(errors).split())
        for sign, meaning in _KNOWN:
            if sign in text.lower():
                return meaning
        first = " ".join(errors[0].split()) if errors else ""
        return f"TensorRT says: {first[:300]}" if first else "TensorRT gives no reason"

    def _take(self, severity: str, message: str) -> None:
        text = message.strip()
        if severity in ("ERROR", "INTERNAL_ERROR"):
            if not hasattr(self._local, "errors"):
                self._local.errors = []
            self._local.errors = [*self._local.errors[-15:], text]
            # The caller raises what it means; here it is for who wants to look closer.
            _log.info("%s: %s", severity, text)
        elif severity == "WARNING":
            _log.info("%s: %s", severity, text)
        else:
            _log.debug("%s: %s", severity, text)


@cache
def messages_of(bindings: Any) -> TensorRTMessages:
    """Return the one logger of a TensorRT module; see :class:`TensorRTMessages` for why there is one."""
    return TensorRTMessages(bindings)
