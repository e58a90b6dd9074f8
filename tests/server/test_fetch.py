"""Images by `http:`: from hosts that are allowed, no further, and never from inside unless that is allowed itself."""

from __future__ import annotations

import http.server
import io
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from PIL import Image

import unimm
from tests.server.bad_requests import seen
from tests.server.serving import serving
from unimm.server import fetch
from unimm.server.errors import APIError
from unimm.server.fetch import Fetcher

LIMIT = 100_000


class Pictures(http.server.BaseHTTPRequestHandler):
    """A host of pictures, and of what looks like one."""

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers["Host"]))  # type: ignore[attr-defined]
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), "red").save(buffer, "png")
        status, headers, content = 200, {}, buffer.getvalue()
        match self.path.partition("?")[0]:
            case "/away":
                status, headers = 302, {"Location": "/a.png"}
            case "/missing":
                status = 404
            case "/large":
                content = bytes(LIMIT + 1)
            case "/text":
                content = b"hello"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.path == "/slow":
            for _ in range(100):
                self.wfile.write(b"x")
                time.sleep(0.05)
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def pictures() -> Iterator[http.server.ThreadingHTTPServer]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    server.asked = []  # type: ignore[attr-defined]
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def refused(fetcher: Fetcher, url: str) -> APIError:
    with pytest.raises(APIError) as raised:
        fetcher.get(url, "image_url")
    return raised.value


def test_what_an_allowed_host_has_is_read(pictures: http.server.ThreadingHTTPServer) -> None:
    place = f"127.0.0.1:{pictures.server_port}"
    with serving(unimm.load(device="cpu"), allow_hosts=(place,)) as client:
        asked = client.post("/v1/chat/completions", **seen(f"http://{place}/a.png?b=c"))
        assert asked.status == 200
        assert pictures.asked[-1] == ("/a.png?b=c", place)  # type: ignore[attr-defined]
        for path, status in (("away", 422), ("missing", 422), ("text", 422)):
            assert client.post("/v1/chat/completions", **seen(f"http://{place}/{path}")).status == status
        count = len(pictures.asked)  # type: ignore[attr-defined]
        assert client.post("/v1/chat/completions", **seen(f"http://{place[:-1]}/a.png")).status == 400
        assert len(pictures.asked) == count  # type: ignore[attr-defined]


def test_sizes_and_times_are_bounded(
    pictures: http.server.ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = f"127.0.0.1:{pictures.server_port}"
    fetcher = Fetcher([place], LIMIT)
    assert "larger than 100,000 bytes" in str(refused(fetcher, f"http://{place}/large"))
    monkeypatch.setattr(fetch, "FETCH_TIMEOUT", 0.3)
    start = time.monotonic()
    assert refused(fetcher, f"http://{place}/slow").status == 422 and time.monotonic() - start < 4
    closed = socket.socket()
    closed.bind(("127.0.0.1", 0))
    gone = f"127.0.0.1:{closed.getsockname()[1]}"
    assert str(refused(Fetcher([gone], LIMIT), f"http://{gone}/a")) == "image_url: could not be fetched"
    assert (
        str(refused(fetcher, f"https://{place}/a.png")) == "image_url: could not be fetched"
    )  # which is no TLS
    closed.close()


def test_names_that_lead_inside_are_refused(pictures: http.server.ThreadingHTTPServer) -> None:
    port, count = pictures.server_port, len(pictures.asked)  # type: ignore[attr-defined]
    named = Fetcher([f"localhost:{port}"], LIMIT)
    assert "leads to a private address" in str(refused(named, f"http://localhost:{port}/a.png"))
    assert len(pictures.asked) == count  # type: ignore[attr-defined]
    both = Fetcher([f"localhost:{port}", "127.0.0.1", "::1"], LIMIT)
    assert both.get(f"http://localhost:{port}/a.png", "image_url").startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "address",
    ["10.1.2.3", "172.16.0.1", "192.168.1.1", "127.0.0.1", "0.0.0.0", "169.254.169.254", "100.64.0.1", "::1", "fe80::1",
     "fc00::1", "::ffff:10.0.0.1", "2002:7f00:1::", "224.0.0.1", "255.255.255.255", "::", "64:ff9b:1::1",
     "64:ff9b::a00:1"],
)  # fmt: skip
def test_private_addresses(address: str) -> None:
    assert not Fetcher(["pictures.example"], LIMIT)._may_connect(address, 443)


def test_public_addresses() -> None:
    for address in ("8.8.8.8", "2606:4700::1111"):
        assert Fetcher(["pictures.example"], LIMIT)._may_connect(address, 443)
