"""Cold start: a new process imports, loads the demo's model and encodes one image file; the runtime against PyTorch."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _harness import Figure, paired_ratio, report, require_demo_run
from PIL import Image

RUNTIME = """
import sys
from admth_runtime import HashRuntime
with HashRuntime(sys.argv[1] + "/model.onnx", device="cpu", threads=2) as runtime:
    code = runtime.encode(sys.argv[2])[64]
"""
PYTORCH = """
import sys
import torch
from admth_runtime.packing import pack_logits
from admth_runtime.preprocessing import preprocess
from admth_training.checkpoint import load_run
torch.set_num_threads(2)
run = load_run(sys.argv[1])
pixels = torch.from_numpy(preprocess(sys.argv[2], run.config.preprocessing).copy())[None]
with torch.inference_mode():
    code = pack_logits(run.network(pixels)[-1].numpy())
"""
FOOTER = """
import resource
print(code.tobytes().hex(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
ROUNDS = 11


def start(program: str, run: Path, image: Path) -> tuple[float, str, int]:
    """Run a program in a new process; return its seconds, its code and its peak memory in KiB."""
    begin = time.perf_counter()
    command = [sys.executable, "-c", program + FOOTER, str(run), str(image)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds = time.perf_counter() - begin
    code, peak = done.stdout.split()
    return seconds, code, int(peak)


def main() -> None:
    """Start both in turn, after one start of each that fills the file cache."""
    run = require_demo_run()
    seconds: dict[str, list[float]] = {"runtime": [], "pytorch": []}
    peaks: dict[str, list[int]] = {"runtime": [], "pytorch": []}
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "image.png"
        Image.linear_gradient("L").convert("RGB").save(image)
        for count in range(ROUNDS + 1):
            codes = set()
            for name, program in (("runtime", RUNTIME), ("pytorch", PYTORCH)):
                elapsed, code, peak = start(program, run, image)
                codes.add(code)
                if count:
                    seconds[name].append(elapsed)
                    peaks[name].append(peak)
            assert len(codes) == 1, f"the codes differ: {codes}"
    speed = paired_ratio(seconds["pytorch"], seconds["runtime"])
    memory = statistics.median(peaks["runtime"]) / statistics.median(peaks["pytorch"])
    report(
        Figure(
            name="cold start (import, load, first codes of one image) against the same through PyTorch",
            value=f"{speed['median']:.1f} times faster, {memory:.2f} of the memory",
            target="at least 6 times faster, at most a third of the memory",
            met=speed["median"] >= 6.0 and memory <= 1 / 3,
            details={
                "ratio": speed,
                "runtime, s": round(statistics.median(seconds["runtime"]), 3),
                "PyTorch, s": round(statistics.median(seconds["pytorch"]), 3),
                "runtime, peak MiB": round(statistics.median(peaks["runtime"]) / 1024, 1),
                "PyTorch, peak MiB": round(statistics.median(peaks["pytorch"]) / 1024, 1),
            },
        )
    )


if __name__ == "__main__":
    main()
