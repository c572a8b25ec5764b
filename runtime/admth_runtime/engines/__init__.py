"""Engines that run TensorRT plans, and the CUDA layer below them; see :mod:`admth_runtime.engine` for the protocol."""

__all__ = ()
