"""Building TensorRT engines: one path for TensorRT 10.3 to 10.16, 11.x and TensorRT-RTX 1.x."""

from __future__ import annotations

__all__: list[str] = []
