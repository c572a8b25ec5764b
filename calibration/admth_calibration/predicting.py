"""How an INT8 model's codes compare with those of the FP32 model that it came from, on images it was not made with.

This is a prediction and no proof: both run on the CPU. The proof, against PyTorch, is ``admth-export verify``.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from admth_runtime.errors import ModelError
from admth_runtime.packing import unpack_bits
from admth_runtime.runtime import HashRuntime

__all__ = ["predict_parity"]


def predict_parity(
    reference: Path, candidate: Path, batches: Iterable[NDArray[np.uint8]], *, threads: int | None = None
) -> dict[str, Any]:
    """Run both models on the same pixels and compare every code length.

    Args:
        reference: the FP32 model.
        candidate: the INT8 model.
        batches: pixels, uint8 ``[n, H, W, 3]`` each.
        threads: CPU threads; None takes one a physical core.

    Returns:
        By code length, as text: ``bit_parity`` and ``exact_code_rate`` (shares, 0 to 1), ``mean_hamming_distance``
        (bits), ``max_flip_margin`` (largest logit, without its sign, of the FP32 model at a bit that differs, or
        None); and ``images``, ``engine``.

    Raises:
        ModelError: a logit of the candidate is not finite, or there is no image.
        AdmthError: a model cannot be run.
    """
    distances: dict[int, list[NDArray[np.int64]]] = {}
    margins: dict[int, float] = {}
    with (
        HashRuntime(reference, device="cpu", threads=threads) as exact,
        HashRuntime(candidate, device="cpu", threads=threads) as rounded,
    ):
        for pixels in batches:
            wanted, found = exact.encode_pixels(pixels), rounded.encode_pixels(pixels)
            for length in exact.code_lengths:
                if not bool(np.isfinite(found.logits[length]).all()):
                    raise ModelError(f"{candidate.name}: a value of logits_{length} is not finite: use more images")
                different = unpack_bits(wanted[length]) != unpack_bits(found[length])
                distances.setdefault(length, []).append(different.sum(axis=1))
                largest = np.abs(wanted.logits[length])[different].max(initial=-1.0)
                margins[length] = max(margins.get(length, -1.0), float(largest))
        engine = f"{rounded.engine.name} {rounded.engine.version}"
    if not distances:
        raise ModelError("there is no image to compare the models on: pass more --data")
    joined = {length: np.concatenate(parts) for length, parts in distances.items()}
    return {
        "reference": "the FP32 model, on the CPU",
        "engine": engine,
        "images": len(next(iter(joined.values()))),
        "bit_parity": {str(length): 1.0 - float(found.mean()) / length for length, found in joined.items()},
        "exact_code_rate": {str(length): float((found == 0).mean()) for length, found in joined.items()},
        "mean_hamming_distance": {str(length): float(found.mean()) for length, found in joined.items()},
        "max_flip_margin": {str(length): margins[length] if margins[length] >= 0 else None for length in joined},
    }
