"""Small corpora for the tests: pictures, archives of them, and the command as a process."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def picture(number: int, size: tuple[int, int] = (20, 30)) -> bytes:
    """A PNG of noise that depends on the number alone."""
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()


def make_pictures(folder: Path, count: int, bad: tuple[int, ...] = ()) -> Path:
    """Pictures 0000.png and so on, every third in a folder of its own; those of ``bad`` are text."""
    (folder / "sub").mkdir(parents=True)
    for number in range(count):
        place = folder / "sub" if number % 3 == 0 else folder
        (place / f"{number:04}.png").write_bytes(b"no picture" if number in bad else picture(number))
    return folder


def make_tar(path: Path, members: dict[str, bytes], kind: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=kind) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def make_parquet(path: Path, images: list[bytes | None], *, column: str = "image", struct: bool = False) -> Path:
    if struct:  # as Hugging Face's datasets writes images
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        values = pa.array([{"bytes": image, "path": f"{n}.png"} for n, image in enumerate(images)], type=kind)
    else:
        values = pa.array(images, type=pa.binary())
    pq.write_table(pa.table({"label": list(range(len(images))), column: values}), path, row_group_size=7)
    return path


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "admth_runtime", *map(str, arguments)]


def run(*arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, check=False, timeout=120, cwd=cwd,
        env={**os.environ, **environment},
    )  # fmt: skip


def succeeds(*arguments: object, **options) -> subprocess.CompletedProcess:
    done = run(*arguments, **options)
    assert done.returncode == 0, done.stderr
    return done


def fails(message: str, *arguments: object, **options) -> subprocess.CompletedProcess:
    """Exit code 1, no traceback, and one error line, the last."""
    done = run(*arguments, **options)
    assert done.returncode == 1, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    assert message in lines[-1]
    return done


def part_files(folder: Path) -> dict[str, bytes]:
    """What must not depend on who encoded a corpus: its parts and its list of errors, byte for byte."""
    return {path.name: path.read_bytes() for path in folder.glob("*.parquet")}
