"""What is said of a model of the hub, with a hub of our own that answers as the real one does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from observe_r1.hub import check_on_hub

ANSWERS = {"there": (200, ""), "missing": (404, "RepoNotFound"), "gated": (403, "GatedRepo"), "broken": (500, "")}


class Hub(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        name = self.path.partition("?")[0].rpartition("/")[2]
        status, code = ANSWERS.get(name, (404, ""))
        content = json.dumps({"id": f"owner/{name}", "siblings": [], "tags": []}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        """Keeps standard error clean."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from huggingface_hub import constants

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        yield
        server.shutdown()


@pytest.mark.usefixtures("hub")
def test_models_that_cannot_be_had_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    check_on_hub("owner/there")
    check_on_hub("owner/broken")  # the client of the hub may have more luck
    with pytest.raises(ValueError, match=r"'owner/missing' is neither a directory here nor a model of the hub.*Qwen/"):
        check_on_hub("owner/missing")
    with pytest.raises(ValueError, match=r"'owner/gated' asks for an agreement: accept it"):
        check_on_hub("owner/gated")
    with pytest.raises(ValueError, match=r"'not a name' is neither"):
        check_on_hub("not a name")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"'owner/other' is not in the cache, and HF_HUB_OFFLINE is set"):
        check_on_hub("owner/other")
