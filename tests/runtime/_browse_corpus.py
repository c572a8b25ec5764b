"""A small corpus of real image files with codes of the tiny model, and a server of it, for the browse tests."""

from __future__ import annotations

import json
import tarfile
import threading
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
from PIL import Image

from admth_runtime.browse import Browser, BrowseServer, CorpusFiles
from admth_runtime.codes_file import EncodedImages
from admth_runtime.index import HashIndex
from admth_runtime.results import HashCodes
from admth_runtime.runtime import HashRuntime

COLOURS = ("red", "green", "blue", "grey")
PER_COLOUR = 12
UPLOAD_LIMIT = 200_000


def make_corpus(folder: Path, runtime: HashRuntime) -> HashIndex:
    """48 pictures, one in a tar, then a file that is gone, and a link to outside the corpus."""
    generator = np.random.default_rng(5)
    photos = folder / "photos"
    pictures, uris = [], []
    for row, colour in enumerate(COLOURS):
        (photos / colour).mkdir(parents=True)
        for number in range(PER_COLOUR):
            base = np.full((48, 64, 3), 40.0)
            base[..., row % 3] += 150 if row < 3 else 60
            pixels = np.clip(base + generator.normal(0, 45, (4, 4, 3)).repeat(12, 0).repeat(16, 1), 0, 255)
            picture = Image.fromarray(pixels.astype(np.uint8))
            path = photos / colour / (f"{number:03}.jpg" if number % 2 else f"{number:03}.png")
            picture.save(path)
            pictures.append(Image.open(path))
            uris.append(str(path))
    with tarfile.open(folder / "more.tar", "w") as archive:
        archive.add(uris[0], "inside.png")
    outside = folder / "private.png"
    Image.new("RGB", (30, 30), "purple").save(outside)
    (photos / "link.png").symlink_to(outside)
    more = {f"{folder / 'more.tar'}!/inside.png": 0, str(photos / "gone.png"): 1, str(photos / "link.png"): 2}
    codes = runtime.encode(pictures)
    rows = np.array([*range(len(uris)), *more.values()])
    return HashIndex(
        EncodedImages(
            # Beyond 2^53, where a browser's numbers are no longer exact.
            ids=np.arange(len(rows), dtype=np.int64) + (1 << 60),
            uris=(*uris, *more),
            codes=HashCodes({length: table[rows] for length, table in codes.items()}),
            model_sha256=runtime.model_sha256,
        )
    )


@contextmanager
def served(index: HashIndex, runtime: HashRuntime, root: Path | None = None):
    browser = Browser(index, runtime, CorpusFiles(root), name="corpus")
    server = BrowseServer(browser, host="127.0.0.1", port=0, upload_limit=UPLOAD_LIMIT)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def ask(server: BrowseServer, path: str, method: str = "GET", body: bytes | None = None, **headers):
    """Status, headers and body of one request, whose path is sent as it is."""
    connection = HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def ask_json(server: BrowseServer, path: str, **request) -> dict:
    status, headers, body = ask(server, path, **request)
    assert headers["Content-Type"].startswith("application/json")
    return {"status": status, **json.loads(body)}


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))
