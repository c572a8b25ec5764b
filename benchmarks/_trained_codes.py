"""Codes and logits in any number, as a trained network gives them.

Two corpora, since networks differ in how much their codes repeat:

- ``fashion``: the demo's network on Fashion-MNIST. Its logits of the training images are resampled: an image, plus 0.35
  times the difference of two of its 16 nearest neighbours, in the space of all 160 logits. The factor was chosen so
  that 60,000 resampled images have about as many distinct codes as the 60,000 real ones have; :func:`distinct` counts
  both. Queries are real test images, which were never resampled.
- ``classes``: 2,000 classes in 100 families, for a network whose codes hardly repeat. A feature has 64 dimensions; a
  class centre is 0.8 times its family's plus 0.6 times its own; an image is its class's plus noise of 0.2 in each
  dimension. The logits of each length are an orthogonal map of the features, so those of 16 and of 64 bits belong
  together as those of one network do. Queries are new images of the classes.

Of each, half of the queries are near-duplicates: images of the corpus with a little noise.
"""

from __future__ import annotations

import gzip
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from _harness import ROOT, require_demo_run
from numpy.typing import NDArray

from admth_runtime import HashCodes, HashRuntime
from admth_runtime.console import track
from admth_runtime.files import sha256_of_file

LENGTHS = (16, 32, 48, 64)
CACHE = ROOT / "runs" / "scale"
FULL = Path("/usr/share/datasets/fashion-mnist")
MINI = ROOT / "examples" / "fashion-mnist-mini"

_ENDS = np.cumsum((0, *LENGTHS))
_NEIGHBOURS = 16
_SPREAD = np.float32(0.35)
_CHUNK = 100_000

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Fashion:
    """Fashion-MNIST as the demo's network sees it: logits of all lengths side by side, and classes."""

    train: Logits
    test: Logits
    train_classes: NDArray[np.uint8]
    test_classes: NDArray[np.uint8]


@dataclass(frozen=True)
class Corpus:
    """A corpus that is made chunk by chunk.

    Attributes:
        name: ``fashion`` or ``classes``.
        draw: gives logits ``[m, 160]`` of m images from a random generator.
        queries: logits of queries that are no near-duplicates, by number.
        noise: gives near-duplicates of logits, from a random generator.
    """

    name: str
    draw: Callable[[np.random.Generator, int], Logits]
    queries: Callable[[int], Logits]
    noise: Callable[[np.random.Generator, Logits], Logits]

    def chunks(self, count: int) -> Iterator[Logits]:
        """Yield the logits of ``count`` images, always the same."""
        for number, first in enumerate(range(0, count, _CHUNK)):
            yield self.draw(np.random.default_rng([number, 3]), min(_CHUNK, count - first))

    def query_codes(self, count: int) -> HashCodes:
        """Return queries: new images and near-duplicates, half and half."""
        images = next(self.chunks(_CHUNK))[:: _CHUNK // (count // 2)][: count // 2]
        near = self.noise(np.random.default_rng(8), images)
        return to_codes(np.concatenate([self.queries(count - len(near)), near]))


def to_codes(logits: Logits, *, keep_logits: bool = True) -> HashCodes:
    """Cut logits ``[n, 160]`` by code length and pack their signs."""
    parts = {length: np.ascontiguousarray(logits[:, _ENDS[i] : _ENDS[i + 1]]) for i, length in enumerate(LENGTHS)}
    codes = {length: np.packbits(part > 0, axis=1) for length, part in parts.items()}
    return HashCodes(codes, parts if keep_logits else None)


def corpora() -> dict[str, Callable[[], Corpus]]:
    """Return what makes each corpus."""
    return {"fashion": fashion_corpus, "classes": classes_corpus}


def fashion_corpus() -> Corpus:
    """Return the corpus resampled from Fashion-MNIST."""
    import faiss

    images = fashion()
    cells = faiss.IndexIVFFlat(faiss.IndexFlatL2(images.train.shape[1]), images.train.shape[1], 100)
    cells.train(images.train[:20_000])
    cells.add(images.train)
    cells.nprobe = 6
    nearest = cells.search(images.train, _NEIGHBOURS + 1)[1][:, 1:]
    nearest = np.where(nearest < 0, np.arange(len(nearest))[:, None], nearest)

    def differences(generator: np.random.Generator, rows: NDArray[np.int64]) -> Logits:
        a, b = (nearest[rows, generator.integers(0, _NEIGHBOURS, len(rows))] for _ in range(2))
        return images.train[a] - images.train[b]

    def draw(generator: np.random.Generator, count: int) -> Logits:
        rows = generator.integers(0, len(images.train), count)
        return images.train[rows] + _SPREAD * differences(generator, rows)

    def noise(generator: np.random.Generator, logits: Logits) -> Logits:
        rows = generator.integers(0, len(images.train), len(logits))
        return logits + np.float32(0.05) * differences(generator, rows)

    return Corpus("fashion", draw, lambda count: images.test[:: len(images.test) // count][:count], noise)


def classes_corpus() -> Corpus:
    """Return the corpus of many classes."""
    world = np.random.default_rng(3)
    families = world.normal(size=(100, 64))
    centres = (0.8 * families[world.integers(0, 100, 2000)] + 0.6 * world.normal(size=(2000, 64))).astype(np.float32)
    maps = [np.linalg.qr(world.normal(size=(64, 64)))[0][:, :length] for length in LENGTHS]
    to_logits = np.concatenate(maps, axis=1).astype(np.float32)

    def features(generator: np.random.Generator, count: int) -> Logits:
        spread = np.float32(0.2) * generator.standard_normal((count, 64), dtype=np.float32)
        return centres[generator.integers(0, len(centres), count)] + spread

    def noise(generator: np.random.Generator, logits: Logits) -> Logits:
        return logits + np.float32(0.05) * (generator.standard_normal((len(logits), 64), dtype=np.float32) @ to_logits)

    return Corpus(
        "classes",
        lambda generator, count: features(generator, count) @ to_logits,
        lambda count: features(np.random.default_rng(9), count) @ to_logits,
        noise,
    )


def distinct(logits: Logits) -> dict[str, int]:
    """Count the distinct codes of each length."""
    return {str(length): len(np.unique(codes, axis=0)) for length, codes in to_codes(logits).items()}


def fashion() -> Fashion:
    """Return what the demo's network gives for Fashion-MNIST, the full set where it is installed, else the small."""
    model = require_demo_run() / "model.onnx"
    folder = FULL if FULL.is_dir() else MINI
    cache = CACHE / f"fashion-{folder.name}-{sha256_of_file(model)[:12]}.npz"
    if not cache.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        sides = {"train": "train", "test": "t10k"}
        found: dict[str, NDArray[np.generic]] = {}
        with HashRuntime(model, batch_size=64) as runtime:
            for side, prefix in sides.items():
                pixels = _read_idx(folder, f"{prefix}-images-idx3-ubyte")
                blocks = range(0, len(pixels), 2000)
                parts = [
                    runtime.encode(list(np.repeat(pixels[first : first + 2000, :, :, None], 3, axis=3)))
                    for first in track(blocks, f"encoding Fashion-MNIST {side}")
                ]
                codes = HashCodes.concatenate(parts)
                found[side] = np.concatenate([codes.logits[length] for length in LENGTHS], axis=1)
                found[f"{side}_classes"] = _read_idx(folder, f"{prefix}-labels-idx1-ubyte")
        np.savez(cache, **found)
    with np.load(cache) as arrays:
        return Fashion(*(arrays[name] for name in ("train", "test", "train_classes", "test_classes")))


def _read_idx(folder: Path, name: str) -> NDArray[np.uint8]:
    for path, opened in ((folder / f"{name}.gz", gzip.open), (folder / name, open)):
        if path.is_file():
            with opened(path, "rb") as file:
                data = file.read()
            shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(data[3])]
            return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)
    sys.exit(f"error: {folder / name} is missing")
