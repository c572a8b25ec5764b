"""The whole path on real images, as a user would type it: train, evaluate, export, encode, search, report.

    make demo

trains on examples/fashion-mnist-mini and leaves everything in runs/demo, about four minutes on two cores. Every
command is printed before it runs, so that it can be repeated by hand.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
RUN = "runs/demo"
DATA = "examples/fashion-mnist-mini"
QUERY = f"{RUN}/images/test/sneaker/00006.png"

STAGES = (
    (
        "Train four code lengths at once, on the frozen features of an ImageNet network",
        f"admth-train fit --data fashion-mnist:{DATA} --backbone efficientnet_lite0 --input-size 96 --freeze-trunk "
        f"--out {RUN}",
    ),
    ("Measure retrieval", f"admth-train evaluate {RUN}"),
    ("Export to ONNX, and keep the file only if its bits are PyTorch's bits", f"admth-export onnx {RUN}"),
    ("Unpack the images, as a user would have them", f"python examples/unpack_images.py {DATA} {RUN}/images"),
    (
        "Encode the 5,000 images of the database, without PyTorch",
        f"admth-run encode {RUN}/images/train --model {RUN}/model.onnx --out {RUN}/database.parquet",
    ),
    (
        "Encode the 1,000 queries",
        f"admth-run encode {RUN}/images/test --model {RUN}/model.onnx --out {RUN}/queries.parquet",
    ),
    (
        "Search one image",
        f"admth-run search {QUERY} --index {RUN}/database.parquet --model {RUN}/model.onnx --length 64 -k 5",
    ),
    ("Measure latency", f"admth-run bench {RUN}/model.onnx --queries 200"),
    (
        "Write the report",
        f"admth-export report {RUN} --database-codes {RUN}/database.parquet --query-codes {RUN}/queries.parquet",
    ),
)


def main() -> int:
    """Run every stage, stop at the first that fails, and say what was made."""
    os.chdir(REPOSITORY)
    shutil.rmtree(RUN, ignore_errors=True)  # A demo starts from nothing, so that its figures are its own.
    started = time.monotonic()
    spent = []
    for number, (title, command) in enumerate(STAGES, start=1):
        print(f"\n[{number}/{len(STAGES)}] {title}\n$ {command}", flush=True)
        begun = time.monotonic()
        if code := run(command):
            print(f"\ndemo: stopped at stage {number}, {title!r}", file=sys.stderr)
            return code
        spent.append((title, time.monotonic() - begun))
    print("\n" + "\n".join(f"{seconds:6.1f} s  {title}" for title, seconds in spent))
    print(f"{time.monotonic() - started:6.1f} s  in all\n")
    print(FAREWELL)
    return 0


def run(command: str) -> int:
    """Run a command with the terminal as its own, so that its progress bars show, and return its exit code."""
    words = shlex.split(command)
    tools = Path(sys.executable).parent
    program = [sys.executable] if words[0] == "python" else [str(tools / words[0])]
    with subprocess.Popen([*program, *words[1:]]) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            # Ctrl-C reached the command too; let it clean up and say so.
            return process.wait() or 130


FAREWELL = f"""\
made  {RUN}/report.html      the report: open it in a browser
      {RUN}/model.onnx       the model, with its proof in {RUN}/model.parity.json
      {RUN}/database.parquet 5,000 images as codes of 16, 32, 48 and 64 bits

next  source .venv/bin/activate
      admth-run info {RUN}/model.onnx
      admth-run search YOUR_IMAGE.jpg --index {RUN}/database.parquet --model {RUN}/model.onnx
      admth-train fit --data folder:YOUR_IMAGES --freeze-trunk --out runs/mine   # a folder a class"""


if __name__ == "__main__":
    sys.exit(main())
