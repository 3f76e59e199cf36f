"""Samples, images and tars to build ladders from."""

from __future__ import annotations

import io
import json
import re
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from observe_r1.ladder.images import StoredImage
from observe_r1.ladder.sample import Sample

EncodeImage = Callable[..., bytes]
MakeSample = Callable[..., Sample[StoredImage]]
WriteTar = Callable[..., Path]


@pytest.fixture(scope="session")
def encoded() -> EncodeImage:
    """Encoded bytes of a one-coloured image."""

    def encode(color: Any = "red", size: tuple[int, int] = (8, 6), format: str = "PNG", mode: str = "RGB") -> bytes:
        buffer = io.BytesIO()
        Image.new(mode, size, color).save(buffer, format=format)
        return buffer.getvalue()

    return encode


@pytest.fixture(scope="session")
def make_sample(encoded: EncodeImage) -> MakeSample:
    """A valid sample with as many images as asked for."""

    def make(number: int = 0, n_images: int = 1, **fields: Any) -> Sample[StoredImage]:
        items = [{"type": "image", "index": index} for index in range(n_images)]
        content = [*items, {"type": "text", "text": f"How many in picture {number}?"}]
        images = [StoredImage(encoded((number % 256, index, 0)), "png") for index in range(n_images)]
        values = {"id": f"geo.3k-{number}", "messages": [{"role": "user", "content": content}], "answer": str(number)}
        return Sample(images=images, **{**values, **fields})

    return make


@pytest.fixture(scope="session")
def document() -> Callable[..., dict[str, Any]]:
    """The JSON of a valid sample with `n_images` images, some fields replaced; None removes a field."""

    def make(n_images: int = 1, **fields: Any) -> dict[str, Any]:
        items = [{"type": "image", "index": index} for index in range(n_images)]
        content = [*items, {"type": "text", "text": "How many?"}]
        values = {"id": "a", "messages": [{"role": "user", "content": content}], "answer": "3", **fields}
        return {name: value for name, value in values.items() if value is not None}

    return make


@pytest.fixture(scope="session")
def write_tar() -> WriteTar:
    """A tar as some other tool writes it, from (name, content) pairs; a dict is written as JSON."""

    def write(path: Path, members: Sequence[tuple[str, Any]], format: int = tarfile.PAX_FORMAT) -> Path:
        with tarfile.open(path, "w", format=format) as tar:
            for name, content in members:
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        return path

    return write


class RangeServer:
    """A web server with range requests on 127.0.0.1, for the files below a directory, that can be made to fail.

    Attributes:
        bytes_sent: Of bodies, by file.
        requests: By method and file.
        faults: Asked ahead of every request with the handler; True means that it has answered.
        ranges: Whether range requests are understood.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.bytes_sent: Counter[str] = Counter()
        self.requests: Counter[tuple[str, str]] = Counter()
        self.faults: Callable[[BaseHTTPRequestHandler], bool] = lambda handler: False
        self.ranges = True
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.respond(body=False)

            def do_GET(self) -> None:
                self.respond(body=True)

            def respond(self, body: bool) -> None:
                outer.requests[self.command, self.path] += 1
                if outer.faults(self):
                    return
                path = outer.directory / self.path.lstrip("/")
                if path.is_dir():
                    links = "".join(f'<a href="{self.path.rstrip("/")}/{p.name}">x</a>' for p in path.iterdir())
                    content, status = links.encode(), 200
                elif path.is_file():
                    content, status = path.read_bytes(), 200
                else:
                    content, status = b"not here", 404
                wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                if wanted and status == 200 and outer.ranges:
                    content, status = content[int(wanted[1]) : int(wanted[2]) + 1], 206
                    if not content:
                        status = 416
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if body:
                    outer.bytes_sent[path.name] += len(content)
                    self.wfile.write(content)

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                pass  # clients that hang up are part of the tests

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def fails(self, status: int, times: int = 10**9, file: str = "") -> None:
        """Answers the next `times` requests for files of that name with `status`; 0 hangs instead."""
        left = iter(range(times))

        def fault(handler: BaseHTTPRequestHandler) -> bool:
            if file not in handler.path or next(left, None) is None:
                return False
            if status == 0:
                self.released.wait(30)
                return True
            handler.send_response(status)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return True

        self.released = threading.Event()
        self.faults = fault

    def close(self) -> None:
        if hasattr(self, "released"):
            self.released.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def range_server(tmp_path: Path) -> Iterator[RangeServer]:
    """Serves `tmp_path`."""
    server = RangeServer(tmp_path)
    yield server
    server.close()
