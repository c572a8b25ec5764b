"""Encoding a corpus of JPEG files: against the sum of its unavoidable parts, and against a loop of Pillow and PyTorch.

All of it on two cores, in turn, on the same files. The unavoidable parts are decoding, resizing and inference, each
done by two processes at once and nothing else, so that what two cores take from each other is in the sum.

    python benchmarks/corpus_encoding.py                        # both figures in FP32
    python benchmarks/corpus_encoding.py --int8 model.int8.onnx # and the same model in INT8
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _harness import THREADS, Figure, report
from _models import export_seeded, seeded_network
from PIL import Image

from admth_runtime import HashRuntime
from admth_runtime.corpus import CorpusOptions, encode_corpus
from admth_runtime.corpus.options import default_batch
from admth_runtime.preprocessing import load_image, resize

LENGTHS = (16, 32, 48, 64)
BACKBONE, SIZE = "efficientnet_lite0", 224
WIDTH, HEIGHT = 500, 375
BATCH = default_batch(SIZE, SIZE, gpu=False)  # of the corpus and of its unavoidable parts
TARGET_SHARE, TARGET_FP32, TARGET_INT8 = 85.0, 2.5, 4.0


def main() -> None:
    """Measure and print one JSON line a figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--int8", type=Path, help="an INT8 model for the CPU, measured against the same loop")
    parser.add_argument("--images", type=int, default=3072, help="images of one measurement")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each")
    arguments = parser.parse_args()
    for figure in measure(arguments.images, arguments.rounds, arguments.int8):
        report(figure)


def measure(images: int, rounds: int, int8: Path | None) -> list[Figure]:
    """Return the figures: share of the unavoidable, speed against the loop in FP32, and in INT8 where it is given."""
    with tempfile.TemporaryDirectory(prefix="admth-corpus-") as name:
        folder = Path(name)
        model = export_seeded(folder / "model.onnx", BACKBONE, SIZE, LENGTHS)
        pictures = photographs(folder / "pictures", images)
        models = {"fp32": model} | ({"int8": int8} if int8 is not None else {})
        loop = PlainLoop()
        seconds: dict[str, list[float]] = {}
        loop.run(pictures[:16])
        for done in range(rounds):
            steps: list[tuple[str, int, Callable[[], float]]] = [
                ("loop", images // 4, lambda: loop.run(pictures[: images // 4]))
            ]
            for precision, path in models.items():
                steps.append((f"corpus {precision}", images, lambda path=path: corpus_seconds(folder, path)))
                steps.append((f"parts {precision}", images, lambda path=path: parts_seconds(path, pictures)))
            for what, count, function in steps if done % 2 == 0 else reversed(steps):
                before = processor_seconds()
                seconds.setdefault(what, []).append(function() / count)
                seconds.setdefault(f"{what}, processor", []).append((processor_seconds() - before) / count)
    return figures(seconds, images, list(models))


def figures(seconds: dict[str, list[float]], images: int, precisions: Sequence[str]) -> list[Figure]:
    """Make the rows of the table from seconds an image."""
    details: dict[str, Any] = {
        "images a measurement": images,
        "picture": f"JPEG {WIDTH}x{HEIGHT}",
        "model": f"{BACKBONE} at {SIZE}, batch {BATCH}",
        "milliseconds an image, medians": {what: round(1e3 * statistics.median(s), 3) for what, s in seconds.items()},
    }
    rows = []
    for precision in precisions:
        name = precision.upper()
        share = ratio(seconds[f"parts {precision}"], seconds[f"corpus {precision}"])
        rows.append(
            Figure(
                name=f"corpus encoding with 2 workers, {name}, against decode + resize + inference on 2 cores",
                value=f"{100 * share['median']:.1f} %",
                target=f"at least {TARGET_SHARE:.0f} %",
                met=100 * share["median"] >= TARGET_SHARE,
                details={"ratio": share, **details},
            )
        )
        speed, target = ratio(seconds["loop"], seconds[f"corpus {precision}"]), TARGET_FP32
        if precision == "int8":
            target = TARGET_INT8
        rows.append(
            Figure(
                name=f"corpus encoding in {name} against a loop of Pillow and PyTorch, batch 1",
                value=f"{speed['median']:.2f} times faster",
                target=f"at least {target:g}",
                met=speed["median"] >= target,
                details={"ratio": speed, **details},
            )
        )
    return rows


def processor_seconds() -> float:
    """Return the processor time that this process and its children that have ended took."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in usage)


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float]:
    """Summarise the ratios of measurements of the same round."""
    ratios = sorted(a / b for a, b in zip(numerator, denominator, strict=True))
    return {
        "median": round(statistics.median(ratios), 4),
        "lowest": round(ratios[0], 4),
        "highest": round(ratios[-1], 4),
    }


def photographs(folder: Path, count: int) -> list[Path]:
    """Write JPEG files with smooth areas, edges and grain, about as large as photographs of that size are."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    grain = generator.normal(0, 1, (HEIGHT, WIDTH)).astype(np.float32)
    paths = []
    for number in range(count):
        coarse = generator.integers(0, 256, (11, 14, 3), dtype=np.uint8)
        fine = generator.integers(0, 256, (60, 80, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.float32)
        edges = np.asarray(Image.fromarray(fine).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.float32)
        noise = 6 * np.roll(grain, number, axis=1)[..., None]
        pixels = (0.8 * smooth + 0.2 * edges + noise).clip(0, 255).astype(np.uint8)
        path = folder / f"{number:05}.jpg"
        Image.fromarray(pixels).save(path, quality=90)
        paths.append(path)
    return paths


def corpus_seconds(folder: Path, model: Path) -> float:
    """Return the seconds of encoding all pictures: listing, worker start, encoding, parts and summary."""
    out = folder / "corpus"
    shutil.rmtree(out, ignore_errors=True)
    start = time.perf_counter()
    options = CorpusOptions(workers=THREADS, device="cpu", shard_size=256)
    encode_corpus([folder / "pictures"], model, out, options)
    return time.perf_counter() - start


def parts_seconds(model: Path, pictures: Sequence[Path]) -> float:
    """Return the seconds of decoding, then resizing, then inference alone, each on two processes at once."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(THREADS), context.Queue()
    processes = [
        context.Process(target=_parts, args=(model, pictures[number::THREADS], barrier, results))
        for number in range(THREADS)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=600) for _ in processes]
    for process in processes:
        process.join()
    return sum(max(spans) for spans in zip(*found, strict=True))


def _parts(model: Path, pictures: Sequence[Path], barrier: Any, results: Any) -> None:
    """Time the three parts in one process, batch after batch, starting each together with the other processes."""
    with HashRuntime(model, device="cpu", threads=1, batch_size=BATCH) as runtime:
        spec = runtime.manifest.preprocessing
        runtime.encode_pixels(np.zeros((BATCH, *spec.shape), np.uint8))
        spans = [0.0, 0.0, 0.0]
        for start in range(0, len(pictures), BATCH):
            work: Any = pictures[start : start + BATCH]
            for index, part in enumerate(
                (
                    lambda paths: [load_image(path) for path in paths],
                    lambda images: np.stack([resize(image, spec) for image in images]),
                    runtime.encode_pixels,
                )
            ):
                barrier.wait()
                begin = time.perf_counter()
                work = part(work)
                spans[index] += time.perf_counter() - begin
        results.put(spans)


class PlainLoop:
    """What one writes first: open, convert, resize, to a tensor, network, sign, one image after the other."""

    def __init__(self) -> None:
        torch.set_num_threads(THREADS)
        self._network = seeded_network(BACKBONE, SIZE, LENGTHS)

    def run(self, pictures: Sequence[Path]) -> float:
        """Return the seconds of encoding pictures."""
        start = time.perf_counter()
        for path in pictures:
            self._encode(path)
        return time.perf_counter() - start

    @torch.inference_mode()
    def _encode(self, path: Path) -> list[Any]:
        image = Image.open(path).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(image)).unsqueeze(0)  # the network normalises
        return [np.packbits((logits > 0).numpy(), axis=1) for logits in self._network(pixels)]


if __name__ == "__main__":
    main()
