"""Training of multi-length hashing networks with PyTorch.

Nothing is imported here, so that ``admth-train --help`` stays fast: import :mod:`admth_training.fit`,
:mod:`admth_training.checkpoint`, :mod:`admth_training.encode` and the others by name.
"""

__all__: list[str] = []
