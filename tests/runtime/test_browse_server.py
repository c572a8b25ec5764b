"""What ``admth-run browse`` answers over HTTP, and what it refuses."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from _browse_corpus import COLOURS, PER_COLOUR, UPLOAD_LIMIT, ask, ask_json, make_corpus, open_descriptors, served
from PIL import Image

from admth_runtime.browse import Browser, BrowseServer, CorpusFiles
from admth_runtime.errors import InputError
from admth_runtime.index import HashIndex
from admth_runtime.packing import from_hex, hamming_distance
from admth_runtime.runtime import HashRuntime

FIRST = 1 << 60
PICTURES = len(COLOURS) * PER_COLOUR
IN_TAR, GONE, LINK = (FIRST + PICTURES + place for place in range(3))


@pytest.fixture(scope="module")
def runtime(tiny_path):
    with HashRuntime(tiny_path, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def index(tmp_path_factory, runtime) -> HashIndex:
    return make_corpus(tmp_path_factory.mktemp("corpus"), runtime)


@pytest.fixture(scope="module")
def server(index, runtime):
    with served(index, runtime) as running:
        yield running


def path_of(index: HashIndex, image: int) -> Path:
    return Path(index.uris_of(np.array([image]))[0])


def png(size=(40, 30), colour="navy") -> bytes:
    buffer = BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_page_and_its_parts_come_with_a_policy_that_allows_nothing_from_elsewhere(server):
    for path in ("/", "/style.css", "/app.js", "/bits.js", "/icon.svg"):
        status, headers, body = ask(server, path)
        assert status == 200 and body
        assert headers["Content-Security-Policy"].startswith("default-src 'self'; img-src 'self' data:;")
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert headers["Cache-Control"] == "no-store"
        assert b"http://" not in body.replace(b"http://www.w3.org/", b"") and b"https://" not in body
        status, headers, body = ask(server, path, "HEAD")
        assert (status, body) == (200, b"") and int(headers["Content-Length"]) > 0


def test_search_by_id_gives_what_the_index_gives(server, index, runtime):
    image = FIRST + 17
    found = ask_json(server, f"/api/search?id={image}&k=6")
    codes = runtime.encode(path_of(index, image))
    assert found["status"] == 200 and found["searched"] == len(index)
    assert found["query"]["id"] == str(image) and found["query"]["note"] is None
    assert set(found["milliseconds"]) == {"decode", "resize", "inference"}
    assert [code["length"] for code in found["query"]["codes"]] == [16, 32, 48, 64]
    for code, column in zip(found["query"]["codes"], found["results"], strict=True):
        length = column["length"]
        assert code["hex"] == codes.hex(length)[0]
        np.testing.assert_allclose(code["margins"], np.abs(codes.logits[length][0]), atol=1e-4)
        hits = index.search(codes, 6, length)
        assert [int(hit["id"]) for hit in column["neighbours"]] == hits.ids[0].tolist()
        assert [hit["distance"] for hit in column["neighbours"]] == hits.distances[0].tolist()
        for hit in column["neighbours"]:
            assert hamming_distance(from_hex([hit["hex"]]), codes[length]).tolist() == [hit["distance"]]
            assert hit["uri"] == str(path_of(index, int(hit["id"])))


def test_neighbours_can_be_ordered_by_the_logits(server, index, runtime):
    image = FIRST + 20
    codes = runtime.encode(path_of(index, image))
    for rerank in ("weighted", "asymmetric"):
        found = ask_json(server, f"/api/search?id={image}&k=8&rerank={rerank}")
        assert found["rerank"] == rerank
        for column in found["results"]:
            hits = index.search(codes, 8, column["length"], rerank=rerank)
            assert [int(hit["id"]) for hit in column["neighbours"]] == hits.ids[0].tolist()
            scores = [hit["score"] for hit in column["neighbours"]]
            assert scores == sorted(scores) and len(set(scores)) > 1
    stored = ask_json(server, f"/api/search?id={GONE}&rerank=weighted")  # no logits without the file
    assert stored["rerank"] == "" and "score" not in stored["results"][0]["neighbours"][0]
    refused = ask_json(server, f"/api/search?id={image}&rerank=best")
    assert refused == {"status": 400, "error": "the parameter rerank is 'best', not empty, weighted or asymmetric"}


def test_upload_gives_the_same_as_the_file_in_the_corpus(server, index):
    image = FIRST + 5
    stored = ask_json(server, f"/api/search?id={image}&k=3")
    sent = ask_json(server, "/api/search?k=3&name=holiday.jpg", method="POST", body=path_of(index, image).read_bytes())
    assert sent["query"]["name"] == "holiday.jpg" and sent["query"]["id"] is None
    assert sent["query"]["codes"] == stored["query"]["codes"]
    assert [column["neighbours"] for column in sent["results"]] == [
        column["neighbours"] for column in stored["results"]
    ]
    assert sent["query"]["preview"].startswith("data:image/png;base64,")


def test_exif_orientation_counts_in_uploads(server):
    picture = Image.fromarray(np.arange(40 * 20 * 3, dtype=np.uint8).reshape(20, 40, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = BytesIO()
    picture.save(buffer, "JPEG", exif=exif)
    query = ask_json(server, "/api/search?k=1", method="POST", body=buffer.getvalue())["query"]
    assert (query["width"], query["height"]) == (20, 40)


def test_filter_restricts_neighbours_and_listing(server, index):
    found = ask_json(server, f"/api/search?id={FIRST}&k=50&filter=BLUE")
    assert found["searched"] == PER_COLOUR
    for column in found["results"]:
        assert len(column["neighbours"]) == PER_COLOUR
        assert all("/blue/" in hit["uri"] for hit in column["neighbours"])
        distances = [hit["distance"] for hit in column["neighbours"]]
        assert distances == sorted(distances)
    nothing = ask_json(server, f"/api/search?id={FIRST}&filter=no-such-path")
    assert nothing["searched"] == 0 and all(column["neighbours"] == [] for column in nothing["results"])
    listed = ask_json(server, "/api/images?filter=blue")
    assert [Path(image["uri"]).parent.name for image in listed["images"]] == ["blue"] * PER_COLOUR


def test_listing_pages_through_every_image_once(server, index):
    seen: list[str] = []
    after = 0
    while after is not None:
        page = ask_json(server, f"/api/images?limit=7&after={after}")
        assert 0 < len(page["images"]) <= 7
        seen += [image["id"] for image in page["images"]]
        after = page["next"]
    assert sorted(map(int, seen)) == index.ids.tolist()
    assert [int(image) for image in seen[:5]] != index.ids[:5].tolist()  # spread over the corpus


@pytest.mark.parametrize("image", [FIRST, FIRST + 1, IN_TAR])
def test_thumbnails_are_images_by_id(server, image):
    status, headers, body = ask(server, f"/thumbnails/{image}?v={server.browser.version}")
    assert status == 200 and headers["Content-Type"] in ("image/png", "image/jpeg")
    assert headers["Cache-Control"].startswith("private, max-age=")
    with Image.open(BytesIO(body)) as picture:
        assert picture.size == (64, 48)
    assert ask(server, f"/thumbnails/{image}")[1]["Cache-Control"] == "no-store"


@pytest.mark.parametrize(("image", "reason"), [(GONE, "the file is gone"), (LINK, "outside the corpus")])
def test_missing_and_foreign_files_show_a_placeholder(server, image, reason):
    status, headers, body = ask(server, f"/thumbnails/{image}")
    assert status == 404 and headers["Content-Type"] == "image/svg+xml"
    title = ElementTree.fromstring(body).find("{http://www.w3.org/2000/svg}title")
    assert title is not None and reason in (title.text or "")


@pytest.mark.parametrize("image", [GONE, LINK])
def test_search_by_stored_codes_where_the_file_cannot_be_read(server, index, image):
    found = ask_json(server, f"/api/search?id={image}&k=2")
    assert found["status"] == 200 and "stored codes are used" in found["query"]["note"]
    assert found["query"]["preview"] is None and found["milliseconds"] == {}
    for code, column in zip(found["query"]["codes"], found["results"], strict=True):
        assert code["margins"] is None and column["neighbours"][0]["distance"] == 0


def test_a_file_that_changed_is_noticed(server, index):
    image = FIRST + 3
    path = path_of(index, image)
    before = path.read_bytes()
    path.write_bytes(path_of(index, FIRST + 30).read_bytes())
    try:
        assert "differs from the stored one in" in ask_json(server, f"/api/search?id={image}")["query"]["note"]
    finally:
        path.write_bytes(before)


TRAVERSALS = [
    "/../../../../etc/passwd",
    "/photos/red/000.png",
    "/thumbnails/../../../etc/passwd",
    "/thumbnails/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    "/thumbnails/..%5c..%5cetc%5cpasswd",
    "/thumbnails//etc/passwd",
    "/thumbnails/%2fetc%2fpasswd",
    f"/thumbnails/{FIRST}/../../private.png",
    f"/thumbnails/{FIRST}%00.png",
    "/%2e%2e/%2e%2e/etc/passwd",
    "/%252e%252e%252fetc%252fpasswd",
    "//etc/passwd",
    "/page/../server.py",
    "/static/../../server.py",
    "/thumbnails/1e3",
    "/thumbnails/",
    "/server.py",
    "file:///etc/passwd",
]


@pytest.mark.parametrize("path", TRAVERSALS)
def test_no_path_leads_to_a_file(server, path):
    status, _, body = ask(server, path)
    assert status == 404
    assert b"root:" not in body and b"import" not in body


def test_absolute_paths_of_the_corpus_itself_are_refused_too(server, index):
    assert ask(server, str(path_of(index, FIRST)))[0] == 404
    assert ask(server, f"/thumbnails{path_of(index, FIRST)}")[0] == 404


def test_unknown_id_and_wrong_parameters_are_json(server):
    assert ask_json(server, "/api/search?id=7") == {"status": 404, "error": "the index has no image 7"}
    assert ask_json(server, "/thumbnails/7")["status"] == 404
    assert ask_json(server, f"/thumbnails/{10**18 * 9 + 10**18}")["status"] == 404
    for query, said in [
        ("id=a", "the parameter id is 'a', not an integer"),
        ("", "the parameter id is '', not an integer"),
        (f"id={FIRST}&k=0", "the parameter k is 0, not between 1 and 100"),
        (f"id={FIRST}&k=101", "the parameter k is 101, not between 1 and 100"),
        ("&".join(f"a{number}=1" for number in range(40)), "the request has too many parameters"),
    ]:
        answer = ask_json(server, f"/api/search?{query}")
        assert answer["status"] == 400 and answer["error"].startswith(said)
    assert ask_json(server, "/api/images?limit=100000")["status"] == 400
    assert ask_json(server, "/api/images?after=-1")["status"] == 400


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "is not an image that Pillow can read"),
        (b"no image at all", "is not an image that Pillow can read"),
        (png()[:60], "cannot be decoded"),
    ],
)
def test_uploads_that_are_no_image(server, body, said):
    answer = ask_json(server, "/api/search?name=x.png", method="POST", body=body)
    assert answer["status"] == 422 and answer["error"].startswith("x.png: ") and said in answer["error"]


def test_upload_over_the_limit_is_refused_and_the_server_lives(server):
    answer = ask_json(server, "/api/search", method="POST", body=b"x" * (UPLOAD_LIMIT + 1))
    assert answer["status"] == 413 and f"more than the limit of {UPLOAD_LIMIT:,}" in answer["error"]
    assert ask_json(server, "/api/search", method="POST", body=png())["status"] == 200


@pytest.mark.filterwarnings("ignore:Image size")
def test_decompression_bomb_is_refused(server):
    # 10,000 x 10,000 pixels of one colour in one bit each: a file of some 12 kB.
    buffer = BytesIO()
    Image.new("1", (10_000, 10_000)).save(buffer, "PNG")
    answer = ask_json(server, "/api/search?name=bomb.png", method="POST", body=buffer.getvalue())
    assert answer["status"] == 422 and "decompression bomb" in answer["error"]


def test_chunked_upload_without_a_length_is_refused(server):
    with socket.create_connection(server.server_address[:2], timeout=10) as connection:
        port = server.server_address[1]
        head = f"POST /api/search HTTP/1.1\r\nHost: localhost:{port}\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(f"{head}0\r\n\r\n".encode())
        assert connection.recv(200).startswith(b"HTTP/1.1 411 ")


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:{port}",
        "127.0.0.1:1",
        "localhost",
        "a@localhost:{port}",
        "127.0.0.1.evil.example:{port}",
        "192.168.1.5:{port}",
        "[",
        "",
    ],
)
def test_other_host_names_are_refused(server, host):
    port = server.server_address[1]
    answer = ask_json(server, "/api/index", Host=host.format(port=port))
    assert answer["status"] == 421 and server.url in answer["error"]


@pytest.mark.parametrize("host", ["127.0.0.1:{port}", "localhost:{port}", "LOCALHOST:{port}", "[::1]:{port}"])
def test_loopback_host_names_are_accepted(server, host):
    assert ask_json(server, "/api/index", Host=host.format(port=server.server_address[1]))["status"] == 200


def test_requests_of_other_sites_are_refused(server):
    port = server.server_address[1]
    for origin in ("http://evil.example", f"http://localhost:{port + 1}", "null", f"https://127.0.0.1:{port}"):
        assert ask_json(server, "/api/search", method="POST", body=png(), Origin=origin)["status"] == 403
    own = f"http://127.0.0.1:{port}"
    assert ask_json(server, "/api/search", method="POST", body=png(), Origin=own)["status"] == 200


def test_other_methods_are_refused_in_json(server):
    for method in ("PUT", "DELETE", "OPTIONS"):
        assert ask_json(server, "/api/index", method=method)["status"] == 501
    assert ask_json(server, "/api/index", method="POST", body=b"x")["status"] == 404


def test_many_at_once_give_the_same_and_leave_no_file_open(server):
    ids = [FIRST + number for number in range(PICTURES)] * 2
    alone = {image: ask_json(server, f"/api/search?id={image}&k=3")["results"] for image in ids[:8]}
    before = open_descriptors()
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda image: ask_json(server, f"/api/search?id={image}&k=3"), ids))
        list(pool.map(lambda image: ask(server, f"/thumbnails/{image}"), ids))
    for image, answer in zip(ids, found, strict=True):
        if image in alone:
            assert [column["neighbours"] for column in answer["results"]] == [
                column["neighbours"] for column in alone[image]
            ]
    assert open_descriptors() <= before + 4


def test_root_confines_and_allows_links_within(tmp_path, index, runtime):
    folder = path_of(index, LINK).parent.parent
    with served(index, runtime, root=folder) as wide:
        assert ask(wide, f"/thumbnails/{LINK}")[0] == 200  # the link's end lies in the root
        assert ask(wide, f"/thumbnails/{FIRST}")[0] == 200
    with served(index, runtime, root=tmp_path) as elsewhere:
        status, _, body = ask(elsewhere, f"/thumbnails/{FIRST}")
        assert status == 404 and b"outside the corpus" in body


def test_opening_refuses_what_is_no_file(tmp_path, monkeypatch):
    import os

    from admth_runtime.errors import ImageError

    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.png")
    Path("loop.png").symlink_to("loop.png")
    files = CorpusFiles()
    for uri, said in [
        ("pipe.png", "is not a file"),
        ("loop.png", "loop of links"),
        (".", "is not a file"),
        ("gone.png", "the file is gone"),
        ("a\0b", "null byte"),
        ("gone.tar!/a.png", "the file is gone"),
    ]:
        with pytest.raises(ImageError, match=said):
            files.open(uri)
    with pytest.raises(InputError, match="is not a folder"):
        CorpusFiles(tmp_path / "absent")


def test_starting_refuses_an_empty_index_and_another_model(runtime, index):
    with pytest.raises(InputError, match="holds no images"):
        Browser(HashIndex.from_codes({16: np.empty((0, 2), np.uint8)}), runtime, CorpusFiles(), name="codes.npz")
    other = HashIndex.from_codes({16: np.zeros((1, 2), np.uint8)}, model_sha256="0" * 64)
    with pytest.raises(InputError, match="not the index's 0000"):
        Browser(other, runtime, CorpusFiles(), name="codes.npz")
    longer = HashIndex.from_codes({128: np.zeros((1, 16), np.uint8)})
    with pytest.raises(InputError, match=r"makes no codes of \[128\] bits"):
        Browser(longer, runtime, CorpusFiles(), name="codes.npz")


def test_port_and_host_problems_are_one_line(server):
    port = server.server_address[1]
    for host, wanted, said in [
        ("127.0.0.1", port, f"port {port} of 127.0.0.1 is in use: choose another with --port, or --port 0"),
        ("192.0.2.1", 0, "--host 192.0.2.1 is no address of this machine"),
        ("no-such-host.invalid", 0, "--host no-such-host.invalid is no address of this machine"),
        ("127.0.0.1", 70000, "--port 70000 is not between 0 and 65535"),
        ("127.0.0.1", -1, "--port -1 is not between 0 and 65535"),
    ]:
        with pytest.raises(InputError, match=said):
            BrowseServer(server.browser, host=host, port=wanted, upload_limit=UPLOAD_LIMIT)


def test_open_to_the_network_still_checks_names(server):
    wide = BrowseServer(server.browser, host="0.0.0.0", port=0, upload_limit=UPLOAD_LIMIT)
    try:
        port = wide.server_address[1]
        assert not wide.loopback and wide.url == f"http://localhost:{port}/"
        assert wide.accepts_host(f"192.168.1.5:{port}") and wide.accepts_host(f"{socket.gethostname()}:{port}")
        assert not wide.accepts_host(f"evil.example:{port}")
    finally:
        wide.server_close()
