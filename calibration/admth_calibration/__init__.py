"""Calibration: an FP32 model and some images become an INT8 model, explicitly quantised for its target.

Names are imported when they are first used, so importing this package loads nothing heavy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from admth_calibration.calibrating import CalibrationResult, calibrate
    from admth_calibration.options import CalibrationOptions

__all__ = ["CalibrationOptions", "CalibrationResult", "calibrate"]

_HOME_OF = {
    "CalibrationOptions": "options",
    "CalibrationResult": "calibrating",
    "calibrate": "calibrating",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
