"""What speaks to the voting server and is no browser: broken requests, silent, slow and very many connections."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from tests.preferences.ballots import captions
from tests.preferences.test_server import Client, serving
from unimm.server.connections import GuardedConnection


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    folder = tmp_path_factory.mktemp("voting")
    with serving(captions(folder), folder / "votes.jsonl") as client:
        yield client


@pytest.fixture(autouse=True)
def nothing_is_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No request makes the server log anything, a traceback least of all."""
    caplog.set_level(logging.WARNING, "asyncio")
    yield
    assert [record.getMessage() for record in caplog.get_records("call")] == []


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=30)


def answers(port: int, request: bytes) -> bytes:
    """All that comes back until the server ends the connection, which the request is to ask for."""
    with connect(port) as one:
        one.sendall(request)
        return b"".join(iter(lambda: one.recv(65536), b""))


def get(target: bytes, *headers: bytes) -> bytes:
    lines = [b"GET %b HTTP/1.1" % target, b"Host: localhost", b"Connection: close", *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def post(*headers: bytes, body: bytes = b"") -> bytes:
    lines = [b"POST /vote HTTP/1.1", b"Host: localhost", b"Connection: close", *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


CHUNKED = b"Transfer-Encoding: chunked"
MALFORMED: list[tuple[bytes, tuple[int, ...]]] = [
    (get(b"http://["), (404,)),
    (get(b"http://[::1"), (404,)),
    (get(b"//["), (404,)),
    (get(b"*"), (404,)),
    (get(b"/image/%00/%ff/%"), (404,)),
    (get(b"/state?%ff=["), (200,)),
    (get(b"/" + b"a" * 100_000), (400, 404)),
    (get("/ä".encode()), (400,)),
    (get(b"/a b"), (400,)),
    (get(b"/\x00"), (400,)),
    (get(b"/", b"X: " + b"a" * 100_000), (200, 400)),
    (get(b"/", b"Host: localhost"), (400,)),
    (get(b"/", b": a"), (400,)),
    (get(b"/", b"Upgrade: websocket", b"Connection: upgrade"), (200,)),
    (b"GET / HTTP/1.0\r\n\r\n", (421,)),
    (b"GET / HTTP/9.9\r\nHost: localhost\r\nConnection: close\r\n\r\n", (200, 400)),
    (b"GET /\r\n\r\n", (400,)),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", (400,)),
    (b"BREW / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", (405,)),
    (get(b"/vote"), (405,)),
    (post(b"Content-Length: " + b"9" * 5000), (400,)),
    (post(b"Content-Length: " + b"9" * 20), (403, 413)),
    (post(b"Content-Length: -1"), (400,)),
    (post(b"Content-Length: \xb2"), (400,)),
    (post(b"Content-Length: 1e3"), (400,)),
    (post(b"Content-Length: 1, 2"), (400,)),
    (post(b"Content-Length: 1", b"Content-Length: 2"), (400,)),
    (post(b"Content-Length: 5", CHUNKED), (400, 403)),
    (post(CHUNKED, body=b"zz\r\n"), (400, 403)),
    (post(CHUNKED, body=b"f" * 5000), (400, 403)),
    (post(CHUNKED, body=b"ffffffffffffffffff\r\n{}"), (400, 403)),
    (post(CHUNKED, body=b"2\r\n{}\r\n0\r\n\r\n"), (403,)),
    (post(b"X-Token: \xff\xfe"), (403,)),
]  # fmt: skip


@pytest.mark.parametrize(("request_", "statuses"), MALFORMED, ids=range(len(MALFORMED)))
def test_malformed_requests_get_a_status(client: Client, request_: bytes, statuses: tuple[int, ...]) -> None:
    said = re.match(rb"HTTP/1\.1 (\d{3}) ", answers(client.port, request_))
    assert said is not None and int(said[1]) in statuses
    assert client.state()["done"] == 0


def test_garbage_after_a_refusal_ends_the_connection(client: Client) -> None:
    with connect(client.port) as one:
        one.sendall(b"POST /vote HTTP/1.1\r\nHost: localhost\r\n" + CHUNKED + b"\r\n\r\n")
        said = b""
        while not said.endswith(b"}"):
            said += one.recv(65536)
        assert said.startswith(b"HTTP/1.1 403")
        one.sendall(b"zz no chunk\r\n")
        assert one.recv(65536) == b""


def test_a_body_of_chunks_is_bounded(client: Client) -> None:
    token = b"X-Token: " + client.booth.token.encode()
    chunk = b"400\r\n" + b" " * 1024 + b"\r\n"
    said = answers(client.port, post(token, CHUNKED, body=chunk * 5 + b"0\r\n\r\n"))
    assert said.startswith(b"HTTP/1.1 413") and b'{"error": ' in said
    assert answers(client.port, post(token, b"Content-Length: 5000")).startswith(b"HTTP/1.1 413")


def test_a_request_that_is_cut_short_changes_nothing(client: Client) -> None:
    token = b"X-Token: " + client.booth.token.encode()
    body = json.dumps({"pair": client.state()["pair"]["key"], "choice": "left"}).encode()
    for sent in (body[:-1], body[: len(body) // 2], b""):
        with connect(client.port) as one:
            one.sendall(post(token, b"Content-Length: %d" % len(body), body=sent))
    assert client.state()["done"] == 0


def test_idle_connections_hold_no_threads_and_block_nobody(client: Client) -> None:
    threads = threading.active_count()
    idle = [connect(client.port) for _ in range(300)]
    for one in idle[::2]:
        one.sendall(b"GET /state HT")
    assert client.request("GET", "/")[0].status == 200 and client.state()["done"] == 0
    assert threading.active_count() <= threads + 2  # of the pool that answers
    assert client.server.connections <= GuardedConnection.max_connections
    with contextlib.suppress(ConnectionResetError):
        assert idle[1].recv(1) == b""  # longest silent, so it went
    idle[-1].sendall(b"GET /state HTTP/1.1\r\nHost: localhost\r\n\r\n")  # still served
    assert idle[-1].recv(65536).startswith(b"HTTP/1.1 ")
    for one in idle:
        one.close()


@pytest.mark.parametrize(
    "begun",
    [
        b"",
        b"GET /state HTTP/1.1\r\nHost: local",
        post(b"Content-Length: 9"),
        get(b"/state").replace(b"Connection: close\r\n", b""),
    ],
    ids=["silent", "half", "no body", "answered"],
)
def test_who_brings_no_request_is_let_go(
    client: Client, begun: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GuardedConnection, "request_timeout", 0.2)
    with connect(client.port) as one:
        one.sendall(begun)
        with contextlib.suppress(ConnectionResetError):
            while one.recv(65536):
                pass


def test_who_drips_is_let_go(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GuardedConnection, "request_timeout", 0.5)
    with connect(client.port) as one, pytest.raises(OSError):
        one.sendall(b"GET /state HTTP/1.1\r\n")
        for _ in range(600):  # a header line every tenth of a second, a minute long
            one.sendall(b"X: y\r\n")
            time.sleep(0.1)


def test_who_takes_nothing_and_sends_nothing_does_not_hold_up_the_end(tmp_path: Path) -> None:
    with serving(captions(tmp_path), tmp_path / "votes.jsonl") as client:
        token = b"X-Token: " + client.booth.token.encode()
        held = [connect(client.port) for _ in range(3)]
        held[0].sendall(post(token, b"Content-Length: 9"))
        held[1].sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 300)  # and reads none of the answers
        assert client.state()["done"] == 0
    for one in held:
        one.close()


LINES = st.sampled_from(
    [b"GET / HTTP/1.1", b"GET http://[ HTTP/1.1", b"POST /vote HTTP/1.1", b"POST /undo HTTP/1.1",
     b"HEAD /state HTTP/1.1", b"PUT * HTTP/1.0", b"GET /image/a/b/0 HTTP/1.1", b"PRI * HTTP/2.0", b""]
)  # fmt: skip
HEADERS = st.sampled_from(
    [b"Host: localhost", b"Host: 127.0.0.1:x", b"Host: evil.example", b"Content-Length: 2", b"Content-Length: 99",
     b"Content-Length: " + b"1" * 30, CHUNKED, b"Expect: 100-continue", b"Connection: close", b"X-Token: guess",
     b"Origin: null", b"Upgrade: h2c", b"Connection: Upgrade"]
)  # fmt: skip
PIECES = st.one_of(
    st.binary(max_size=40), st.sampled_from([b"{}", b"\r\n", b"0\r\n\r\n", b"2\r\n{}\r\n", b"["])
)
LINE = st.one_of(LINES, st.binary(max_size=40))
REQUESTS = st.builds(
    lambda line, headers, pieces: b"\r\n".join([line, *headers, b"", b"".join(pieces)]),
    LINE,
    st.lists(st.one_of(HEADERS, st.binary(max_size=30)), max_size=4),
    st.lists(PIECES, max_size=4),
)


@given(st.lists(REQUESTS, min_size=1, max_size=3))
def test_no_bytes_vote_or_upset_the_server(client: Client, requests: list[bytes]) -> None:
    with connect(client.port) as one:
        one.sendall(b"".join(requests))
        one.shutdown(socket.SHUT_WR)
        try:
            said = b"".join(iter(lambda: one.recv(65536), b""))
        except ConnectionResetError:
            said = b""
    assert not said or re.match(rb"HTTP/1\.1 [1-5]\d\d ", said)
    assert client.state()["done"] == 0
