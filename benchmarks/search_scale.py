"""An index of ten million images: coarse-to-fine search against FAISS's scan, and what building and holding it costs.

The corpora are described in _trained_codes.py. Search is timed with one thread of ours against two of FAISS, in turn,
on one batch of queries. Recall counts a hit as right when it is as near as the tenth of exact 64-bit search, since
among equally near images any ten are the ten nearest.

    python benchmarks/search_scale.py               # ten million images of both corpora, about ten minutes
    python benchmarks/search_scale.py --images 1000000
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from _harness import THREADS, Figure, interleave, milliseconds, paired_ratio, report
from _trained_codes import CACHE, LENGTHS, Corpus, corpora, distinct, fashion, to_codes

from admth_runtime import HashCodes, HashIndex, write_codes
from admth_runtime.codes_file import EncodedImages
from admth_runtime.console import note, track
from admth_runtime.index import build_index

IMAGES = 10_000_000
QUERIES = 200
NEIGHBOURS = 10
TARGET_SPEED, TARGET_RECALL = 5.0, 0.99
TARGET_BUILD_S, TARGET_MEMORY, TARGET_LOAD_S = 60.0, 1.5, 1.0

RESIDENT = """
import json, sys, time
from pathlib import Path
import faiss, numpy as np
from admth_runtime import HashCodes, HashIndex
import admth_runtime.index.building, admth_runtime.index.coarse

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmRSS")).split()[1])

queries = np.load(sys.argv[2])
lengths = (16, 32, 48, 64)
codes = HashCodes({n: queries[f"code_{n}"] for n in lengths}, {n: queries[f"logits_{n}"] for n in lengths})
# The libraries' own buffers, which do not depend on the index, are made by a search of a small one.
small = HashIndex.from_codes(dict(codes))
small.search(codes, 10, rerank="asymmetric")
before = resident()
start = time.perf_counter()
index = HashIndex.load(sys.argv[1], memory_map=sys.argv[3] == "mapped")
load = time.perf_counter() - start
loaded = resident()
for length in lengths:
    index.search(codes, 10, length)
index.uris_of(index.search(codes, 10, mode="coarse", rerank="asymmetric").ids)
print(json.dumps({"load_s": load, "bytes_loaded": loaded - before, "bytes_searched": resident() - before}))
"""


def main() -> None:
    """Measure and print one JSON line a figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--corpus", choices=("fashion", "classes"), action="append", help="only this one")
    arguments = parser.parse_args()
    for figure in figures(arguments.images, arguments.corpus or ["fashion", "classes"]):
        report(figure)


def figures(images: int = IMAGES, names: list[str] | None = None) -> list[Figure]:
    """Return the figures of coarse-to-fine search and of the index's costs."""
    coarse, costs = {}, {}
    for name in names or ["fashion", "classes"]:
        folder = CACHE / f"search-{name}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            corpus = corpora()[name]()
            codes = make_sources(corpus, folder, images)
            costs[name] = measure_costs(folder, images, corpus.query_codes(QUERIES))
            coarse[name] = measure_coarse(folder, corpus.query_codes(2 * QUERIES), codes)
        finally:
            shutil.rmtree(folder)
    if "fashion" in coarse:
        sample = np.concatenate(list(corpora()["fashion"]().chunks(60_000)))
        coarse["fashion"]["distinct codes of 60,000 resampled images"] = distinct(sample)
        coarse["fashion"]["distinct codes of the real training images"] = distinct(fashion().train)
    return [coarse_figure(images, coarse), cost_figure(images, costs)]


def make_sources(corpus: Corpus, folder: Path, images: int) -> np.ndarray:
    """Write a corpus as Parquet files of encoded images, and return its 64-bit codes for FAISS."""
    codes = []
    first = 0
    for number, logits in enumerate(track(corpus.chunks(images), f"making the corpus {corpus.name}")):
        ids = np.arange(first, first + len(logits), dtype=np.int64)
        uris = tuple(f"photos/{image // 1000:06}/{image:09}.jpg" for image in ids.tolist())
        # Logits in one file in twenty: what an encoding with --logits gives, without 6 GB that are not read.
        part = to_codes(logits, keep_logits=number % 20 == 0)
        write_codes(folder / f"{number:04}.parquet", EncodedImages(ids, uris, part, "0" * 64))
        codes.append(part[64])
        first += len(logits)
    return np.concatenate(codes)


def measure_costs(folder: Path, images: int, queries: HashCodes) -> dict[str, Any]:
    """Build the index from the files, then load and search it in fresh processes."""
    sources = sorted(folder.glob("*.parquet"))
    start = time.perf_counter()
    index = build_index(sources, folder / "an.index")
    build = time.perf_counter() - start
    note(f"built in {build:.1f} s: {index.facts()}")
    arrays = {f"code_{n}": queries[n] for n in LENGTHS} | {f"logits_{n}": queries.logits[n] for n in LENGTHS}
    np.savez(folder / "queries.npz", **arrays)
    raw = images * sum(LENGTHS) // 8
    facts: dict[str, Any] = {"build_s": round(build, 1), "raw_bytes": raw, **index.facts()}
    facts["bytes_on_disk"] = sum(path.stat().st_size for path in (folder / "an.index").iterdir())
    for way in ("mapped", "loaded"):
        command = [sys.executable, "-c", RESIDENT, str(folder / "an.index"), str(folder / "queries.npz"), way]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        facts[way] = json.loads(done.stdout)
        facts[way]["times_raw"] = round(facts[way]["bytes_searched"] / raw, 3)
    return facts


def measure_coarse(folder: Path, queries: HashCodes, codes: np.ndarray) -> dict[str, Any]:
    """Time coarse-to-fine search and FAISS's scan in turn, and measure the recall."""
    import faiss

    index = HashIndex.load(folder / "an.index")
    scan = faiss.IndexBinaryFlat(64)
    scan.add(codes)
    faiss.omp_set_num_threads(THREADS)
    tenth = scan.search(queries[64], NEIGHBOURS)[0][:, -1:]
    hits = index.search(queries, NEIGHBOURS, mode="coarse")
    near = hits.distances <= tenth
    some = slice(0, queries.count, 2)
    batch = HashCodes(
        {n: np.ascontiguousarray(t[some]) for n, t in queries.items()},
        {n: np.ascontiguousarray(t[some]) for n, t in queries.logits.items()},
    )
    single = [
        HashCodes({n: t[i : i + 1] for n, t in batch.items()}, {n: t[i : i + 1] for n, t in batch.logits.items()})
        for i in range(0, batch.count, 4)
    ]
    ours, theirs, reranked, exact, alone = interleave(
        [
            lambda: index.search(batch, NEIGHBOURS, mode="coarse"),
            lambda: scan.search(batch[64], NEIGHBOURS),
            lambda: index.search(batch, NEIGHBOURS, mode="coarse", rerank="asymmetric"),
            lambda: index.search(batch, NEIGHBOURS),
            lambda: [index.search(query, NEIGHBOURS, mode="coarse") for query in single],
        ],
        rounds=7,
        warmup=1,
    )
    half = len(near) // 2
    return {
        "ratio": paired_ratio(theirs, ours),
        "ratio of exact search": paired_ratio(theirs, exact),
        "recall": round(float(near.mean()), 4),
        "recall of new images": round(float(near[:half].mean()), 4),
        "recall of near-duplicates": round(float(near[half:].mean()), 4),
        "distance of the tenth, mean": round(float(tenth.mean()), 2),
        "ms a query": {
            "coarse": round(milliseconds(ours) / batch.count, 4),
            "coarse, one query a call": round(milliseconds(alone) / len(single), 4),
            "coarse, reranked": round(milliseconds(reranked) / batch.count, 4),
            "exact": round(milliseconds(exact) / batch.count, 4),
            "FAISS IndexBinaryFlat": round(milliseconds(theirs) / batch.count, 4),
        },
        "threads": {"ours": 1, "FAISS": THREADS},
        "queries": batch.count,
    }


def coarse_figure(images: int, facts: dict[str, dict[str, Any]]) -> Figure:
    """Judge by the slower and the less complete of the corpora."""
    ratio = min(of["ratio"]["median"] for of in facts.values())
    recall = min(of["recall"] for of in facts.values())
    each = ", ".join(f"{name} {of['ratio']['median']:.1f} at {of['recall']:.3f}" for name, of in facts.items())
    return Figure(
        name=f"coarse to fine on {images:,} clustered codes with logits, k = {NEIGHBOURS}, against FAISS flat",
        value=f"{ratio:.1f} times faster at recall {recall:.3f} ({each})",
        target=f"at least {TARGET_SPEED:g} times faster at recall {TARGET_RECALL}",
        met=ratio >= TARGET_SPEED and recall >= TARGET_RECALL,
        details=facts,
    )


def cost_figure(images: int, facts: dict[str, dict[str, Any]]) -> Figure:
    """Judge by the more expensive of the corpora; memory counts every page that searches of all lengths touched."""
    build = max(of["build_s"] for of in facts.values())
    memory = max(of["mapped"]["times_raw"] for of in facts.values())
    load = max(of["mapped"]["load_s"] for of in facts.values())
    return Figure(
        name=f"index of {images:,} codes: build from Parquet, resident memory after searches of every length, load",
        value=f"{build:.0f} s; {memory:.2f} times the raw codes; {load:.3f} s",
        target=f"under {TARGET_BUILD_S:g} s; at most {TARGET_MEMORY} times; under {TARGET_LOAD_S:g} s",
        met=build < TARGET_BUILD_S and memory <= TARGET_MEMORY and load < TARGET_LOAD_S,
        details=facts,
    )


if __name__ == "__main__":
    main()
