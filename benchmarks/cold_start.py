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
import re
status = open("/proc/self/status").read()
memory = [re.search(field + r":\\s+(\\d+)", status).group(1) for field in ("VmRSS", "VmHWM")]
print(code.tobytes().hex(), *memory)
"""
ROUNDS = 11


def start(program: str, run: Path, image: Path) -> tuple[float, str, int, int]:
    """Run a program in a new process; return its seconds, its code, and its resident and peak memory in KiB."""
    begin = time.perf_counter()
    command = [sys.executable, "-c", program + FOOTER, str(run), str(image)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds = time.perf_counter() - begin
    code, resident, peak = done.stdout.split()
    return seconds, code, int(resident), int(peak)


def main() -> None:
    """Start both in turn, after one start of each that fills the file cache."""
    run = require_demo_run()
    starts: dict[str, list[tuple[float, str, int, int]]] = {"runtime": [], "PyTorch": []}
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "image.png"
        Image.linear_gradient("L").convert("RGB").save(image)
        for count in range(ROUNDS + 1):
            for name, program in (("runtime", RUNTIME), ("PyTorch", PYTORCH)):
                result = start(program, run, image)
                if count:
                    starts[name].append(result)
    codes = {code for results in starts.values() for _, code, _, _ in results}
    assert len(codes) == 1, f"the codes differ: {codes}"
    columns = {name: list(zip(*results, strict=True)) for name, results in starts.items()}
    speed = paired_ratio(columns["PyTorch"][0], columns["runtime"][0])
    medians = {name: [statistics.median(column[i]) for i in (0, 2, 3)] for name, column in columns.items()}
    resident, peak = (medians["runtime"][i] / medians["PyTorch"][i] for i in (1, 2))
    report(
        Figure(
            name="cold start (import, load, first codes of one image) against the same through PyTorch",
            value=f"{speed['median']:.1f} times faster, {resident:.2f} of the memory held ({peak:.2f} at the peak)",
            target="at least 6 times faster, at most a third of the memory",
            met=speed["median"] >= 6.0 and resident <= 1 / 3 and peak <= 1 / 3,
            details={
                "ratio": speed,
                **{
                    name: {
                        "seconds": round(seconds, 3),
                        "resident after the first codes, MiB": round(held / 1024, 1),
                        "peak, MiB": round(top / 1024, 1),
                    }
                    for name, (seconds, held, top) in medians.items()
                },
            },
        )
    )


if __name__ == "__main__":
    main()
