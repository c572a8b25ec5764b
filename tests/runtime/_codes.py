"""Codes, logits and brute force for the tests of the index."""

from __future__ import annotations

import numpy as np

from admth_runtime import HashCodes, hamming_matrix
from admth_runtime.codes_file import EncodedImages

LENGTHS = (16, 32, 48, 64)


def random_tables(count, lengths=LENGTHS, *, seed=0, values=256):
    """Random codes; few values make many equal codes and ties."""
    generator = np.random.default_rng([seed, count])
    return {length: generator.integers(0, values, (count, length // 8), dtype=np.uint8) for length in lengths}


def trained_codes(count, lengths=LENGTHS, *, seed=0, classes=20, spread=0.25):
    """Codes and logits as of one network: a class centre and noise in a feature space, then a linear map a length."""
    world = np.random.default_rng(5)
    centres = world.normal(size=(classes, 32))
    maps = {length: world.normal(size=(32, length)) for length in lengths}
    generator = np.random.default_rng([seed, 1])
    features = centres[generator.integers(0, classes, count)] + spread * generator.normal(size=(count, 32))
    logits = {length: (features @ maps[length]).astype(np.float32) for length in lengths}
    return HashCodes({length: np.packbits(table > 0, axis=1) for length, table in logits.items()}, logits)


def encoded_images(codes, *, ids=None, model_sha256=None):
    """Encoded images whose uris name their ids."""
    codes = codes if isinstance(codes, HashCodes) else HashCodes(codes)
    ids = np.arange(codes.count, dtype=np.int64) if ids is None else np.asarray(ids, dtype=np.int64)
    return EncodedImages(ids, tuple(f"images/{number}.jpg" for number in ids), codes, model_sha256)


def brute_force(queries, database, ids, k):
    """All distances, sorted by (distance, id)."""
    distances = hamming_matrix(np.ascontiguousarray(queries), np.ascontiguousarray(database))
    order = np.lexsort((np.broadcast_to(ids, distances.shape), distances), axis=1)[:, :k]
    return np.asarray(ids)[order], np.take_along_axis(distances, order, axis=1)


def same_hits(hits, expected):
    """Whether hits are what brute force found."""
    return np.array_equal(hits.ids, expected[0]) and np.array_equal(hits.distances, expected[1])
