"""Whatever is sent, the answer is one line with a status of 4xx, nothing outside is touched, and the server goes on."""

from __future__ import annotations

import contextlib
import http.client
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import unimm
from tests.server.bad_requests import CORPUS, FORM, Bad, form, png, seen
from tests.server.serving import Answer, Client, data_url, serving

OURS = "unimm-"  # how threads of a server are called
touched: list[tuple[str, str]] = []


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Note what a server's threads open, look up or connect to."""
    if event in (
        "open",
        "socket.connect",
        "socket.getaddrinfo",
        "subprocess.Popen",
        "os.system",
        "os.remove",
    ) and threading.current_thread().name.startswith(OURS):
        touched.append((event, str(arguments[0])))


sys.addaudithook(watch)


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the server may read images from, and what lies around and in it."""
    above = tmp_path_factory.mktemp("above")
    Image.new("RGB", (8, 8), "red").save(above / "secret.png")
    folder = above / "media"
    (folder / "folder").mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(folder / "a.png")
    (folder / "link.png").symlink_to(above / "secret.png")
    (folder / "folderlink").symlink_to(above)
    os.mkfifo(folder / "pipe")
    return folder


@pytest.fixture(scope="module")
def client(media: Path) -> Iterator[Client]:
    """A server that may fetch from one host, which is none, and read one folder."""
    limits = {"max_body": 2_000_000, "max_pixels": 4_000_000}
    with serving(
        unimm.load(device="cpu"), media_path=media, allow_hosts=("pictures.example",), **limits
    ) as client:
        yield client


def filled(value: Any, client: Client, media: Path) -> Any:
    """A request's text with the port and the folder in it."""
    if isinstance(value, str):
        return value.replace("{port}", str(client.port)).replace("{media}", str(media).lstrip("/"))
    if isinstance(value, dict):
        return {key: filled(inner, client, media) for key, inner in value.items()}
    return [filled(inner, client, media) for inner in value] if isinstance(value, list) else value


def send(client: Client, bad: Bad, media: Path) -> Answer:
    """Send a request as it is, its path and headers too."""
    body = filled(bad.body, client, media)
    return client.request(bad.method, bad.path, body, filled(bad.headers, client, media))


def test_the_corpus_is_large_and_its_names_are_its_own() -> None:
    assert len(CORPUS) >= 150 and len({bad.name for bad in CORPUS}) == len(CORPUS)


@pytest.mark.parametrize("bad", CORPUS, ids=lambda bad: ascii(bad.name)[1:-1])
def test_bad_requests_are_refused_in_a_line(client: Client, media: Path, bad: Bad) -> None:
    touched.clear()
    answer = send(client, bad, media)
    assert answer.status in bad.statuses, answer.content[:500]
    if bad.method == "OPTIONS" or answer.headers["Content-Type"].startswith("application/json"):
        error = answer.document["error"]
        line = error["message"]
        assert line and len(line) <= 500 and line.isprintable() and "Traceback" not in line
        assert error["type"] in ("invalid_request_error", "permission_error") and set(error) == {
            "message", "type", "param", "code"
        }  # fmt: skip
    else:  # of the HTTP parser, before there is a request
        assert answer.status == 400 and len(answer.content) < 100
    assert str(media.parent) not in answer.content.decode()
    assert not [what for what in touched if not harmless(what, media)]
    assert client.request("GET", "/health").status == 200


def harmless(what: tuple[str, str], media: Path) -> bool:
    """Whether something was opened that a server may: the media folder's way down, and its own modules."""
    event, target = what
    if event == "open":
        inside = target in (str(media), "a.png", "missing.png", "folder", "pipe")
        return (
            inside
            or target.startswith(("link.png", "folderlink"))
            or target.startswith((sys.prefix, sys.base_prefix))
        )
    return event == "socket.getaddrinfo" and target == "pictures.example"


def test_what_is_allowed_is_read(client: Client, media: Path) -> None:
    for address in (f"file://{media}/a.png", f"file://localhost{media}//a.png"):
        answer = client.post("/v1/chat/completions", **seen(address))
        assert answer.status == 200, answer.content
    fine = data_url(Image.new("RGB", (2_000, 1_999), "red"))
    assert client.post("/v1/chat/completions", **seen(fine)).status == 200
    large = data_url(Image.new("RGB", (2_001, 2_000), "red"))
    refused = client.post("/v1/chat/completions", **seen(large))
    assert refused.status == 422 and "4 million; make it smaller" in refused.document["error"]["message"]
    assert refused.document["error"]["param"] == "messages[0].content[0].image_url"


def test_bombs_take_no_memory(client: Client) -> None:
    before = client.metric("process_resident_memory_bytes")
    for _ in range(10):
        image = png(60_000, 60_000, bytes(100_000))
        assert client.request("POST", "/v1/images/edits", *_form(image)).status == 422
    assert client.metric("process_resident_memory_bytes") - before < 50_000_000


def _form(image: bytes) -> tuple[bytes, dict[str, str]]:
    return form(('name="prompt"', b"a"), ('name="image"; filename="a.png"', image)), FORM


def test_a_body_of_chunks_is_bounded(client: Client) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=30)
    pieces = (b" " * 50_000 for _ in range(60))
    headers = {"Content-Type": "application/json"}
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it need not take the rest
        connection.request("POST", "/v1/images/generations", pieces, headers, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


def test_names_and_origins_that_are_given_are_allowed() -> None:
    um = unimm.load(device="cpu")
    settings = {
        "server_names": ("pics.example",),
        "allow_origins": ("https://app.example",),
        "api_key": "s3cret",
    }
    with serving(um, **settings) as client:
        key = {"Authorization": "Bearer s3cret"}
        named = {"Host": "pics.example:1", **key}
        assert client.request("GET", "/v1/models", None, named).status == 200
        own = {"Host": "pics.example", "Origin": "https://pics.example", **key}
        assert client.request("GET", "/v1/models", None, own).status == 200
        page = {"Origin": "https://app.example"}
        answer = client.request("GET", "/v1/models", None, {**page, **key})
        assert (answer.status, answer.headers["Access-Control-Allow-Origin"]) == (200, "https://app.example")
        asked = {**page, "Access-Control-Request-Headers": "content-type, authorization, x y"}
        preflight = client.request("OPTIONS", "/v1/chat/completions", None, asked)
        assert preflight.status == 204
        assert preflight.headers["Access-Control-Allow-Headers"] == "content-type, authorization"
        for given in (
            {},
            {"Authorization": "s3cret"},
            {"Authorization": "Bearer s3cre"},
            {"Authorization": "Bearer \xff"},
        ):
            for path in ("/v1/models", "/metrics", "/v1/none", "/static", "/statics/a"):
                refused = client.request("GET", path, None, given)
                assert refused.status == 401 and refused.headers["WWW-Authenticate"] == "Bearer"
        assert client.request("GET", "/health").status == client.request("GET", "/docs").status == 200
        assert client.request("GET", "/static/none").status == 404  # where a page may have its files
        assert client.openai(api_key="s3cret").models.list().data[0].id == "embedded"


def test_a_full_queue_says_when_to_come_again() -> None:
    with serving(unimm.load(device="cpu"), max_waiting=2, max_n=2) as client:
        held: list[Answer] = []
        body = {"prompt": "a star", "n": 2}
        threads = [
            threading.Thread(target=lambda: held.append(client.post("/v1/images/generations", **body)))
            for _ in range(12)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        statuses = [answer.status for answer in held]
        assert set(statuses) == {200, 429}
        for answer in held:
            if answer.status == 429:
                assert 1 <= int(answer.headers["Retry-After"]) <= 60
                assert answer.document["error"]["code"] == "queue_full"
        assert client.post("/v1/images/generations", prompt="a", n=3).status == 400
        assert client.post("/v1/images/generations", prompt="a").status == 200


def test_a_request_has_its_time() -> None:
    with serving(unimm.load(device="cpu"), request_timeout=0.05) as client:
        start = time.monotonic()
        answer = client.post("/v1/images/generations", prompt="a star", n=16)
        assert answer.status == 503 and answer.document["error"]["code"] == "timeout"
        stream = client.post("/v1/images/generations", prompt="a star", n=16, stream=True)
        assert stream.status == 200 and b'"code": "timeout"' in stream.content.splitlines()[-2]
        client.wait_for("unimm_requests_running", 0)
        assert time.monotonic() - start < 60
