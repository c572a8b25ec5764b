"""Handing 100,000 images over: bytes and time for each server, and the queries in a real PostgreSQL with pgvector."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _harness import ROOT, Figure, milliseconds, report

from admth_runtime.console import note
from admth_runtime.handover import TARGETS, export_index
from admth_runtime.index import HashIndex

sys.path.insert(0, str(ROOT / "tests" / "runtime"))
from _postgres import Postgres, PostgresMissingError

IMAGES = 100_000
QUERIES = 50
K = 10
LENGTHS = (16, 32, 48, 64)
CLASSES = 100


def main() -> None:
    """Export to every target, load one of them, and report."""
    index = clustered_index()
    details: dict[str, Any] = {"images": IMAGES, "code lengths": list(LENGTHS), "path, bytes": 42}
    with tempfile.TemporaryDirectory() as temporary:
        for target in TARGETS:
            start = time.perf_counter()
            made = export_index(index, target, Path(temporary) / target)
            seconds = time.perf_counter() - start
            rows = sum(size for name, size in made.files.items() if name.startswith("rows-"))
            details[f"export to {target}"] = {
                "bytes an image": round(rows / IMAGES, 1),
                "images/s": round(IMAGES / seconds),
            }
        try:
            measured = in_postgres(index, Path(temporary) / "pgvector")
        except PostgresMissingError as reason:
            sys.exit(f"error: {reason}")
    details["pgvector"] = measured
    report(
        Figure(
            name=f"hand-over of {IMAGES:,} images to PostgreSQL with pgvector, k = {K} at 64 bits",
            value=(
                f"exact answers equal on {measured['equal']} of {QUERIES} queries; HNSW "
                f"{measured['exact, ms'] / measured['HNSW, ms']:.0f} times faster at recall {measured['HNSW recall']}"
            ),
            target="every exact answer equal to the index's; HNSW recall at least 0.95",
            met=measured["equal"] == QUERIES and measured["HNSW recall"] >= 0.95,
            details=details,
        )
    )


def clustered_index() -> HashIndex:
    """Codes that gather around classes: each bit of a class's centre is flipped with a probability of its own."""
    generator = np.random.default_rng(11)
    of = generator.integers(0, CLASSES, IMAGES)
    codes = {}
    for length in LENGTHS:
        centres = generator.integers(0, 2, (CLASSES, length), dtype=np.uint8)
        rates = generator.beta(0.4, 8.0, (CLASSES, length)).astype(np.float32)
        flips = generator.random((IMAGES, length), dtype=np.float32) < rates[of]
        codes[length] = np.packbits(centres[of] ^ flips, axis=1)
    uris = [f"photos/2026/{number % 997:03}/image-{number:016}.jpg" for number in range(IMAGES)]
    return HashIndex.from_codes(codes, uris=uris)


def in_postgres(index: HashIndex, folder: Path) -> dict[str, Any]:
    """Load the folder, and ask QUERIES of its own images exactly, by the graph, and coarse to fine."""
    server = Postgres()
    try:
        note("loading PostgreSQL")
        seconds = {}
        for name in ("schema", "load"):
            start = time.perf_counter()
            server.psql("-c", "SET maintenance_work_mem = '1GB'", "-f", f"{name}.sql", cwd=folder, timeout=900)
            seconds[name] = time.perf_counter() - start
        sizes = server.psql(
            "-c",
            "SELECT pg_table_size('images'), pg_relation_size('images_pkey'), pg_relation_size('images_bucket'), "
            "pg_relation_size('images_hnsw')",
            cwd=folder,
        )
        names = ("table", "primary key", "bucket index", "HNSW index")
        measured: dict[str, Any] = {
            "load and index, s": round(seconds["load"], 1),
            "bytes an image": {
                name: round(int(size) / IMAGES, 1) for name, size in zip(names, sizes.split("|"), strict=True)
            },
        }
        return measured | asked(server, index, folder)
    finally:
        server.close()


def asked(server: Postgres, index: HashIndex, folder: Path) -> dict[str, Any]:
    """Compare answers and times; times are the server's own, without psql's start."""
    rows = np.random.default_rng(2).choice(IMAGES, QUERIES, replace=False)
    times: dict[str, list[float]] = {"exact": [], "HNSW": [], "coarse": []}
    recalls: dict[str, list[float]] = {"HNSW": [], "coarse": []}
    equal = 0
    for row in rows:
        codes = index.codes_of(index.ids[row : row + 1])
        hits = index.search(codes, K)
        given = [f"-vcode_{length}={''.join(map(str, np.unpackbits(codes[length])))}" for length in (16, 64)]
        printed = server.psql(*given, f"-vk={K}", "-c", r"\timing on", "-f", "query.sql", cwd=folder).splitlines()
        answers = [line.split("|") for line in printed if "|" in line]
        took = [float(line.split()[1]) for line in printed if line.startswith("Time:")]
        exact, graph, coarse = (answers[start : start + K] for start in (0, K, 2 * K))
        equal += [int(answer[0]) for answer in exact] == hits.ids[0].tolist()
        worst = int(hits.distances[0, -1])
        for name, found in (("HNSW", graph), ("coarse", coarse)):
            recalls[name].append(sum(int(answer[2]) <= worst for answer in found) / K)
        for name, place in (("exact", 0), ("HNSW", 2), ("coarse", 3)):  # SET has a time too
            times[name].append(took[place] / 1e3)
    return {
        "equal": equal,
        **{f"{name}, ms": milliseconds(values) for name, values in times.items()},
        **{f"{name} recall": round(statistics.mean(values), 4) for name, values in recalls.items()},
    }


if __name__ == "__main__":
    main()
