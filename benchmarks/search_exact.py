"""Exact 64-bit search by multi-index hashing against a scan: where it is faster, and that it is chosen only there.

Three kinds of codes: the two corpora of _trained_codes.py and uniformly random bits, the worst case, since a random
query has no near neighbours. Both ways give the same hits, which is checked.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from _harness import THREADS, Figure, interleave, milliseconds, paired_ratio, report
from _trained_codes import LENGTHS, HashCodes, corpora, to_codes

from admth_runtime import HashIndex
from admth_runtime.console import track

SIZES = (300_000, 1_000_000, 4_000_000)
QUERIES = 100
NEIGHBOURS = (1, 10)
TARGET = 0.8  # of a scan's speed, at worst: looking into the tables first must not cost much
FEWEST_GROUPS = 1 << 18  # below, the index scans anyway, and the ratio is only noise


def main() -> None:
    """Measure and print the figure."""
    report(figure())


def figure(sizes: tuple[int, ...] = SIZES) -> Figure:
    """Measure every kind of codes at every size."""
    facts: dict[str, Any] = {}
    for size in track(sizes, "exact search"):
        for kind in (*corpora(), "random"):
            facts[f"{kind}, {size:,}"] = measure(kind, size)
    ratios = {
        f"{name}, k = {k}": of[f"k = {k}"]["ratio"]["median"]
        for name, of in facts.items()
        if of["distinct codes"] >= FEWEST_GROUPS
        for k in NEIGHBOURS
    }
    best, worst = max(ratios, key=lambda name: ratios[name]), min(ratios, key=lambda name: ratios[name])
    return Figure(
        name="exact 64-bit search with the tables of multi-index hashing against a scan of the same index",
        value=f"{ratios[best]:.1f} times faster at best ({best}), {ratios[worst]:.2f} at worst ({worst})",
        target=f"at least {TARGET:g} at worst",
        met=ratios[worst] >= TARGET,
        details={**facts, "FAISS threads of long scans": THREADS},
    )


def measure(kind: str, size: int) -> dict[str, Any]:
    """Time both ways in turn on one batch of queries."""
    if kind == "random":
        generator = np.random.default_rng(4)
        codes = HashCodes({n: generator.integers(0, 256, (size, n // 8), dtype=np.uint8) for n in LENGTHS})
        queries = generator.integers(0, 256, (QUERIES, 8), dtype=np.uint8)
    else:
        corpus = corpora()[kind]()
        codes = HashCodes.concatenate([to_codes(logits, keep_logits=False) for logits in corpus.chunks(size)])
        queries = corpus.query_codes(QUERIES)[64]
    index = HashIndex.from_codes(codes)
    index.add_multi_index()
    facts: dict[str, Any] = {"distinct codes": index.facts()["distinct_codes"]}
    for k in NEIGHBOURS:
        chosen, scan = index.search(queries, k), index.search(queries, k, mode="flat")
        assert np.array_equal(chosen.ids, scan.ids)
        times = interleave(
            [lambda k=k: index.search(queries, k), lambda k=k: index.search(queries, k, mode="flat")],
            rounds=7,
            warmup=1,
            seconds=20,
        )
        facts[f"k = {k}"] = {
            "ratio": paired_ratio(times[1], times[0]),
            "ms a query": [round(milliseconds(of) / QUERIES, 4) for of in times],
            "distance of the k-th, mean": round(float(scan.distances[:, -1].mean()), 2),
        }
    return facts


if __name__ == "__main__":
    main()
