"""The HTTP side of ``admth-run browse``: a fixed table of pages, images by id, and JSON.

What protects it, since any web site that its user visits can send requests to loopback:

- The ``Host`` header must name this server, so a site that points its own name here (DNS rebinding) gets nothing.
- A request with an ``Origin`` of another site is refused, and nothing is readable across origins.
- No part of a request ever becomes a file name: pages come from a table, images from the index by their number.
- Everything has a limit: the upload, the time for a request, the number of images decoded at once.
"""

from __future__ import annotations

import errno
import ipaddress
import json
import os
import re
import socket
from collections.abc import Collection
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from io import BytesIO
from typing import Any
from urllib.parse import SplitResult, parse_qs, urlsplit

from admth_runtime._version import __version__
from admth_runtime.browse.browser import Asked, Browser, UnknownImageError
from admth_runtime.browse.files import placeholder
from admth_runtime.console import warn
from admth_runtime.errors import AdmthError, ImageError, InputError

__all__ = ["DEFAULT_PORT", "BrowseServer", "is_loopback"]

DEFAULT_PORT = 8642

_PAGES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
    "/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/bits.js": ("bits.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
    "/favicon.ico": ("icon.svg", "image/svg+xml"),
}
_THUMBNAIL = re.compile(r"/thumbnails/(-?[0-9]{1,19})")
_SECURITY = {
    # Previews of queries are data: URLs, since an upload is nowhere on the server to be fetched from.
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_SECONDS_FOR_A_REQUEST = 30
_MOST_DRAINED = 1 << 28


class BrowseServer(ThreadingHTTPServer):
    """Serves one :class:`Browser`; run it with ``serve_forever()`` and end it with ``server_close()``.

    Args:
        browser: what is served.
        host: the address to listen at: a name or an IP address of this machine.
        port: the port, or 0 for any that is free.
        upload_limit: the most bytes of an uploaded image.

    Raises:
        InputError: the port is in use or not allowed, or the host is not one of this machine's.
    """

    daemon_threads = True  # an open connection of a web browser does not keep the process alive
    # Elsewhere than on POSIX this option would let two servers share a port.
    allow_reuse_address = os.name == "posix"

    def __init__(self, browser: Browser, *, host: str, port: int, upload_limit: int) -> None:
        if isinstance(port, bool) or not 0 <= port <= 65535:
            raise InputError(f"--port {port} is not between 0 and 65535: 0 takes any that is free")
        self.browser = browser
        self.upload_limit = upload_limit
        self.pages = {
            path: (resources.files(__package__).joinpath("page", name).read_bytes(), kind)
            for path, (name, kind) in _PAGES.items()
        }
        try:
            self.address_family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise InputError(_bind_problem(host, port, error)) from error
        self.host = host
        self.loopback = is_loopback(self.server_address[0])

    @property
    def url(self) -> str:
        """Where the page is."""
        host = "localhost" if self.host in ("", "0.0.0.0", "::") else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_address[1]}/"

    def server_bind(self) -> None:
        """Bind without the base class's look-up of this machine's full name, which waits for DNS."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(self.allow_reuse_address))
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stay quiet: what fails here is a connection that its other end dropped."""

    def accepts_host(self, header: str | None) -> bool:
        """Say whether a ``Host`` header names this server.

        An attacker's page can send its own name only, so names are what is checked: loopback names on a loopback
        address; elsewhere the host that was asked for, this machine's name, and addresses, which cannot be rebound.
        """
        try:
            parts = urlsplit(f"//{header}")
            name, port = (parts.hostname or "").rstrip("."), parts.port
        except ValueError:
            return False
        if header is None or "@" in header or parts.netloc != header or (port or 80) != self.server_port:
            return False
        if name == "localhost" or is_loopback(name):
            return True
        return not self.loopback and (_is_address(name) or name in _names_of(self.host))


class _Handler(BaseHTTPRequestHandler):
    server: BrowseServer
    server_version = f"admth/{__version__}"
    sys_version = ""
    protocol_version = "HTTP/1.1"
    timeout = _SECONDS_FOR_A_REQUEST

    def do_GET(self) -> None:
        self._answer(self._get)

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        self._answer(self._post)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the terminal quiet."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what is no HTTP, or a method that is not served, as JSON too."""
        self.close_connection = True
        self._json({"error": message or HTTPStatus(code).phrase}, HTTPStatus(code))

    def _answer(self, respond: Any) -> None:
        try:
            if not self.server.accepts_host(self.headers.get("Host")):
                raise _RefusedError(
                    HTTPStatus.MISDIRECTED_REQUEST,
                    f"this server is not {self.headers.get('Host')}: open {self.server.url}",
                )
            origin = self.headers.get("Origin")
            if origin is not None and not self._own_origin(origin):
                raise _RefusedError(HTTPStatus.FORBIDDEN, f"requests from {origin} are refused: open {self.server.url}")
            respond(urlsplit(self.path))
        except _RefusedError as refusal:
            self.close_connection = True  # a body may be unread
            self._json({"error": str(refusal)}, refusal.status)
        except UnknownImageError as error:
            self._json({"error": str(error)}, HTTPStatus.NOT_FOUND)
        except ImageError as error:
            self._json({"error": str(error)}, HTTPStatus.UNPROCESSABLE_ENTITY)
        except InputError as error:
            self._json({"error": str(error)}, HTTPStatus.BAD_REQUEST)
        except (BrokenPipeError, ConnectionError, TimeoutError):
            self.close_connection = True
        except AdmthError as error:
            warn(str(error))
            self._json({"error": str(error)}, HTTPStatus.INTERNAL_SERVER_ERROR)
        except MemoryError:
            self._json({"error": "out of memory: use a smaller image"}, HTTPStatus.INTERNAL_SERVER_ERROR)

    def _get(self, url: SplitResult) -> None:
        browser = self.server.browser
        if url.path in self.server.pages:
            content, kind = self.server.pages[url.path]
            self._send(content, kind)
        elif match := _THUMBNAIL.fullmatch(url.path):
            self._thumbnail(int(match[1]))
        elif url.path == "/api/index":
            self._json({**browser.describe(), "upload_limit": self.server.upload_limit})
        elif url.path == "/api/images":
            asked = _Parameters(url.query)
            self._json(
                browser.images(asked.text("filter"), after=asked.number("after", 0), limit=asked.number("limit", 60))
            )
        elif url.path == "/api/search":
            asked = _Parameters(url.query)
            self._json(browser.search_id(asked.number("id"), asked.search()))
        else:
            raise _RefusedError(HTTPStatus.NOT_FOUND, "there is no such page: images are served by their id alone")

    def _post(self, url: SplitResult) -> None:
        if url.path != "/api/search":
            raise _RefusedError(HTTPStatus.NOT_FOUND, "nothing is posted here: send an image to /api/search")
        asked = _Parameters(url.query)
        body = self._body()
        found = self.server.browser.search_upload(BytesIO(body), asked.text("name"), asked.search())
        self._json(found)

    def _thumbnail(self, image: int) -> None:
        # The address carries the server's own version token, so a cached thumbnail is never another index's.
        cache = "private, max-age=86400, immutable" if f"v={self.server.browser.version}" in self.path else "no-store"
        try:
            content, kind = self.server.browser.thumbnail(image)
        except ImageError as error:
            self._send(placeholder(str(error)), "image/svg+xml", HTTPStatus.NOT_FOUND)
            return
        self._send(content, kind, cache=cache)

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit():
            raise _RefusedError(HTTPStatus.LENGTH_REQUIRED, "the upload names no Content-Length")
        limit = self.server.upload_limit
        if int(length) > limit:
            self._drain(int(length))
            raise _RefusedError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"the upload has {int(length):,} bytes, more than the limit of {limit:,}: send a smaller image, "
                "or start with a larger --upload-limit",
            )
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise ConnectionError("the upload stopped")
        return body

    def _drain(self, length: int) -> None:
        """Read a refused upload to its end, if that is near: most clients read the answer only after sending."""
        left = min(length, _MOST_DRAINED)
        while left and (block := self.rfile.read(min(left, 1 << 20))):
            left -= len(block)

    def _own_origin(self, origin: str) -> bool:
        scheme, _, host = origin.partition("://")
        return scheme == "http" and host == self.headers.get("Host")

    def _json(self, value: dict[str, Any], status: HTTPStatus = HTTPStatus.OK) -> None:
        content = json.dumps(value, ensure_ascii=False, allow_nan=False).encode(errors="backslashreplace")
        self._send(content, "application/json; charset=utf-8", status)

    def _send(self, content: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK, *, cache: str = "no-store") -> None:
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(len(content)), "Cache-Control": cache, **_SECURITY}
        for name, value in headers.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


class _RefusedError(Exception):
    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Parameters:
    """The query string of a request."""

    def __init__(self, query: str) -> None:
        try:
            self._values = parse_qs(query, max_num_fields=16)
        except ValueError as error:
            raise InputError(f"the request has too many parameters ({error})") from error

    def text(self, name: str) -> str:
        return self._values.get(name, [""])[0]

    def number(self, name: str, default: int | None = None) -> int:
        text = self.text(name)
        if not text and default is not None:
            return default
        if not re.fullmatch("-?[0-9]{1,19}", text):
            raise InputError(f"the parameter {name} is {text[:40]!r}, not an integer")
        return int(text)

    def search(self) -> Asked:
        return Asked(self.number("k", 10), self.text("filter"), self.text("rerank"))


def is_loopback(host: object) -> bool:
    """Say whether an address, as text, reaches this machine only."""
    try:
        return ipaddress.ip_address(str(host)).is_loopback
    except ValueError:
        return False


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _names_of(host: str) -> Collection[str]:
    return {host.lower(), socket.gethostname().lower()}


def _bind_problem(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} of {host} is in use: choose another with --port, or --port 0 for any that is free"
    if error.errno == errno.EACCES:
        return f"port {port} is reserved for the system: choose one above 1023 with --port"
    if error.errno == errno.EADDRNOTAVAIL or isinstance(error, socket.gaierror):
        return f"--host {host} is no address of this machine: use 127.0.0.1, or 0.0.0.0 for all of them"
    return f"cannot listen at {host}, port {port} ({error.strerror or error}): choose another --host or --port"
