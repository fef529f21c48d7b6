"""A real HTTP server on 127.0.0.1 that serves a directory by byte ranges, and misbehaves where a test has planned it."""

from __future__ import annotations

import gzip
import itertools
import json
import re
import socket
import struct
import threading
from base64 import b64decode
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

HUB_DATASET = "somebody/corpus"
HUB_COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HttpServer(ThreadingHTTPServer):
    """Serves `directory` while the `with` block lasts.

    It is also a Hub (HF_ENDPOINT) with one dataset, HUB_DATASET, that holds these files.

    `plan("a.jsonl", ["reset", None, "short"])` lets the next requests for that file fail in these ways, None for not at all;
    those after them are answered well. `plan("a.jsonl", for_ever("404"))` takes the file away.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.requests: list[str] = []  # name of the file of each request for data
        self.paths: list[str] = []  # and its whole path, with the query
        self.ranges: list[tuple[int, int]] = []  # first byte and the one behind the last of each that was answered
        self.api: list[str] = []  # paths of what a Hub was asked
        self.commit = HUB_COMMIT  # at which the dataset is
        self._gathering: threading.Barrier | None = None
        self.closing = threading.Event()
        self.secret = ""  # in the query or as the password of every request for data; others are answered 403
        self._plans: dict[str, Iterator[str | None]] = {}
        self._lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)

    def __enter__(self) -> HttpServer:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()

    def address(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"

    def plan(self, name: str, faults: Iterable[str | None]) -> None:
        with self._lock:
            self._plans[name] = iter(faults)

    def is_over(self, name: str) -> bool:
        """Whether all that was planned has happened."""
        with self._lock:
            return next(self._plans.get(name, iter(())), "over") == "over"

    def gather(self, requests: int) -> threading.Barrier:
        """Answer the next requests for data when so many have come; after 20 s they are not, and it is broken."""
        self._gathering = threading.Barrier(requests, timeout=20)
        return self._gathering

    def wait_for_others(self) -> None:
        if self._gathering and not self._gathering.broken:
            self._gathering.wait()

    def next_fault(self, name: str) -> str | None:
        with self._lock:
            self.requests.append(name)
            return next(self._plans.get(name, iter(())), None)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


def for_ever(fault: str) -> Iterator[str]:
    return itertools.repeat(fault)


class Handler(BaseHTTPRequestHandler):
    """One request: the range that is asked for, or the planned fault."""

    protocol_version = "HTTP/1.1"
    server: HttpServer

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        name = unquote(urlsplit(self.path).path).lstrip("/")
        if name.startswith("api/"):
            return self.answer_hub(name)
        name = re.sub(f"^datasets/{HUB_DATASET}/resolve/[0-9a-f]{{40}}/", "", name)
        fault = self.server.next_fault(name) if self.command == "GET" else None
        self.server.paths.append(self.path)
        password = b64decode(self.headers.get("Authorization", "").removeprefix("Basic ")).decode()
        if self.server.secret not in urlsplit(self.path).query + password:
            fault = "403"
        path = self.server.directory / name
        if fault in ("403", "404", "500", "503") or not path.is_file():
            return self.answer(int(fault or 404), b"<html>no</html>", length=15)
        data = path.read_bytes()
        if fault == "shrunk":  # as if the file ended at a line end in its middle
            data = data[: data.index(b"\n", len(data) // 2) + 1]
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None or fault == "no ranges":
            return self.answer(200, data, length=len(data))
        start, end = int(asked[1]), min(int(asked[2] or len(data)) + 1, len(data))
        if start >= end:
            return self.answer(416, b"", length=0, content_range=f"bytes */{len(data)}")
        self.server.wait_for_others()
        self.server.ranges.append((start, end))
        FAULTS.get(fault or "", Handler.answer_range)(self, data, start, end)

    def answer_hub(self, name: str) -> None:
        """What `datasets` asks the Hub before it streams a dataset: here one that holds the files of the directory."""
        self.server.api.append(self.path)
        fault = self.server.next_fault("api")
        if fault:
            return self.answer(int(fault), b"<html>no</html>", length=15)
        answer: Any = {
            "id": HUB_DATASET,
            "sha": found[1] if (found := re.search(r"/revision/([0-9a-f]{40})$", name)) else self.server.commit,
            "siblings": [],
            "tags": [],
            "private": False,
            "gated": False,
        }
        if re.search("/tree/[0-9a-f]{40}", name):
            files = sorted(self.server.directory.iterdir()) if re.search("/[0-9a-f]{40}$", name) else []
            answer = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40} for f in files]
        body = json.dumps(answer).encode()
        self.answer(200 if HUB_DATASET in name else 404, body, length=len(body))

    def answer_range(self, data: bytes, start: int, end: int) -> None:
        self.answer(206, data[start:end], length=end - start, content_range=f"bytes {start}-{end - 1}/{len(data)}")

    def answer(
        self, status: int, body: bytes, *, length: int | None, content_range: str = "", encoding: str = ""
    ) -> None:
        self.send_response(status)
        self.send_header("Accept-Ranges", "bytes")
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")  # as the Hub says it
        if length is None or length != len(body):
            self.send_header("Connection", "close")
            self.close_connection = True
        headers = {"Content-Length": length, "Content-Range": content_range, "Content-Encoding": encoding}
        for header, value in headers.items():
            if value not in ("", None):
                self.send_header(header, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Quiet."""

    # The faults that need to know what was asked for.

    def reset(self, data: bytes, start: int, end: int) -> None:
        """The connection is reset before an answer."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def cut(self, data: bytes, start: int, end: int) -> None:
        """The body ends in the middle, though the headers promise all of it."""
        half = data[start : (start + end) // 2]
        self.answer(206, half, length=end - start, content_range=f"bytes {start}-{end - 1}/{len(data)}")

    def cut_at_a_line(self, data: bytes, start: int, end: int) -> None:
        """The same, where a line ends."""
        half = data[start : data.rfind(b"\n", start, (start + end) // 2) + 1]
        self.answer(206, half, length=end - start, content_range=f"bytes {start}-{end - 1}/{len(data)}")

    def short(self, data: bytes, start: int, end: int) -> None:
        """Less than what was asked for, and the headers say so."""
        self.answer_range(data, start, (start + end) // 2 + 1)

    def short_at_a_line(self, data: bytes, start: int, end: int) -> None:
        """The same, where a line ends."""
        self.answer_range(data, start, max(data.rfind(b"\n", start, (start + end) // 2) + 1, start + 1))

    def no_length(self, data: bytes, start: int, end: int) -> None:
        """No Content-Length, and the body ends where a line ends in the middle."""
        half = data[start : data.rfind(b"\n", start, (start + end) // 2) + 1]
        self.answer(206, half, length=None, content_range=f"bytes {start}-{end - 1}/{len(data)}")

    def empty(self, data: bytes, start: int, end: int) -> None:
        """The range is said to lie outside of the file."""
        self.answer(416, b"", length=0, content_range=f"bytes */{start}")

    def other_range(self, data: bytes, start: int, end: int) -> None:
        """As many bytes as were asked for, from one place further on."""
        body = data[start + 1 : end] + b"x"
        self.answer(206, body, length=end - start, content_range=f"bytes {start + 1}-{end}/{len(data)}")

    def page(self, data: bytes, start: int, end: int) -> None:
        """200 and a page of something else, as a proxy gives that wants a password."""
        self.answer(200, b"<html>log in</html>", length=19)

    def compressed(self, data: bytes, start: int, end: int) -> None:
        """Compressed on the way, though nobody asked for that."""
        body = gzip.compress(data[start:end])
        content_range = f"bytes {start}-{end - 1}/{len(data)}"
        self.answer(206, body, length=len(body), content_range=content_range, encoding="gzip")

    def hang(self, data: bytes, start: int, end: int) -> None:
        """No answer, until the server is closed."""
        self.server.closing.wait()
        self.close_connection = True


# The names that a plan takes; "403", "404", "500", "503", "no ranges" and "shrunk" besides.
FAULTS: dict[str, Callable[[Handler, bytes, int, int], None]] = {
    "reset": Handler.reset,
    "cut": Handler.cut,
    "cut at a line": Handler.cut_at_a_line,
    "short": Handler.short,
    "short at a line": Handler.short_at_a_line,
    "no length": Handler.no_length,
    "empty": Handler.empty,
    "other range": Handler.other_range,
    "page": Handler.page,
    "compressed": Handler.compressed,
    "hang": Handler.hang,
}
