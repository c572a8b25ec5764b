"""Sixteen threads call one runtime 100,000 times, as a camera loop does in months; prints memory and mistakes as JSON.

    python _endurance.py MODEL PICTURES CALLS

Each call takes one to four images of the network's own size; one in a hundred takes image files. Resident memory is
read after a warm-up of a tenth of the calls, and then after every further tenth.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

import numpy as np

from admth_runtime import HashRuntime

THREADS = 16


def resident_kib() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 1024


def main(model: str, pictures: str, calls: int) -> None:
    files = sorted(Path(pictures).iterdir())
    wrong: list[str] = []
    with HashRuntime(model, threads=1, decode_threads=2) as runtime:
        shape = runtime.manifest.preprocessing.shape
        pixels = np.random.default_rng(0).integers(0, 256, (64, *shape), dtype=np.uint8)
        expected, expected_files = runtime.encode(pixels), runtime.encode(files)
        memory = []
        barrier = threading.Barrier(THREADS, action=lambda: memory.append(resident_kib()))

        def check(number: int) -> None:
            if number % 100 == 0:
                codes, wanted, rows = runtime.encode(files), expected_files, slice(None)
            else:
                start = number % 60
                rows = slice(start, start + 1 + number % 4)
                codes, wanted = runtime.encode(pixels[rows]), expected
            if not all(np.array_equal(codes[length], wanted[length][rows]) for length in codes):
                wrong.append(f"call {number}")

        def work(thread: int) -> None:
            for tenth in range(10):
                for number in range(thread + tenth * calls // 10, (tenth + 1) * calls // 10, THREADS):
                    check(number)
                barrier.wait()

        threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    print(json.dumps({"resident_kib": memory, "wrong": wrong[:10]}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
