"""Calibration: an FP32 model and some images become an INT8 model, explicitly quantised for its target.

Names are imported when they are first used, so importing this package loads nothing heavy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from admth_runtime.lazy import lazy_names

if TYPE_CHECKING:
    from admth_calibration.calibrating import CalibrationResult, calibrate
    from admth_calibration.options import CalibrationOptions

__all__ = ["CalibrationOptions", "CalibrationResult", "calibrate"]

__getattr__, __dir__ = lazy_names(
    __name__, {"calibrating": ("CalibrationResult", "calibrate"), "options": ("CalibrationOptions",)}
)
