"""A server as a process: load, clients that die or dawdle, a full queue, the end, and what is left of it all."""

from __future__ import annotations

import importlib.util
import json
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.server.serving import Client, Process, image_of, serving, wait_until_ready
from unimm.errors import UserError
from unimm.loading import load
from unimm.pipeline import UniMM
from unimm.server.run import ModelServer
from unimm.server.settings import ServerSettings

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "serving.py"
DRAW = {"prompt": "a rocket on a purple background", "stream": True}


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    with Process(tmp_path_factory.mktemp("server")) as process:
        yield process


@pytest.fixture(scope="module")
def program() -> ModuleType:
    """The benchmark, of which this is a small run."""
    spec = importlib.util.spec_from_file_location("serving_benchmark", PROGRAM)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module


def opened(port: int, body: dict[str, Any]) -> socket.socket:
    """A connection on which a drawing has been asked for."""
    content = json.dumps(body).encode()
    head = f"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n"
    line = socket.create_connection(("127.0.0.1", port), timeout=60)
    line.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + content)
    return line


def test_many_clients_get_what_each_gets_alone(process: Process, program: ModuleType) -> None:
    distinct = program.mixed_calls(9)
    port = process.client.port
    alone, _ = program.run_load(port, distinct, 1)
    assert {outcome.status for outcome in alone} == {200}
    assert len({str(outcome.answer) for outcome in alone}) > 6
    program.run_load(port, distinct, 9)
    before = process.memory
    found, _ = program.run_load(port, distinct * 4, 24)
    assert {outcome.status for outcome in found} == {200}
    assert [outcome.answer for outcome in found] == [outcome.answer for outcome in alone] * 4
    assert process.client.metric("unimm_cache_bytes") == 0
    assert process.memory - before < 100_000_000
    assert all(outcome.first_row is not None for outcome in found if outcome.first_row)


def test_clients_that_die_are_cancelled_and_neighbours_do_not_notice(process: Process, um: UniMM) -> None:
    client = process.client
    cancelled = client.metric("unimm_cancelled_total")
    kept: list[bytes] = []
    body = {**DRAW, "seed": 5, "stream": False}
    neighbour = threading.Thread(
        target=lambda: kept.append(client.post("/v1/images/generations", **body).content)
    )
    neighbour.start()
    lines = [opened(client.port, {**DRAW, "n": 4, "stream": i % 2 == 0}) for i in range(6)]
    while client.metric("unimm_requests_running") < 10:
        time.sleep(0.01)
    lines[0].recv(100)
    for line in lines:  # in mid-stream, or before the first byte
        line.close()
    client.wait_for("unimm_requests_running", 0)
    neighbour.join()
    assert client.metric("unimm_cancelled_total") > cancelled
    image = image_of(json.loads(kept[0])["data"][0]["b64_json"])
    assert image.tobytes() == um.draw(DRAW["prompt"], seed=5)[0].tobytes()
    statuses = [event["status"] for event in process.events if event["event"] == "request"]
    assert 499 in statuses
    assert not [event for event in process.events if event["event"] == "failure"]


def test_slow_readers_hold_nobody_up(process: Process, um: UniMM) -> None:
    client = process.client
    slow = [opened(client.port, {**DRAW, "n": 4, "seed": 100}) for _ in range(3)]
    for line in slow:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    answer = client.post("/v1/images/generations", prompt="a star", seed=3)
    assert (
        image_of(answer.document["data"][0]["b64_json"]).tobytes() == um.draw("a star", seed=3)[0].tobytes()
    )
    client.wait_for("unimm_requests_running", 0)  # their drawings are done, though nobody has read them
    for line in slow[1:]:
        line.close()
    content = b""
    while b"0\r\n\r\n" not in content[-10:]:
        content += slow[0].recv(2000)
    slow[0].close()
    events = [json.loads(row[6:]) for row in content.decode().splitlines() if row.startswith('data: {"type')]
    last = {event["index"]: event["b64_json"] for event in events if event["type"].endswith("completed")}
    assert sorted(last) == list(range(4)) and len(events) == 32
    assert image_of(last[3]).tobytes() == um.draw(DRAW["prompt"], seed=103)[0].tobytes()


def test_idle_and_half_sent_connections_hold_nobody_up(process: Process) -> None:
    client = process.client
    lines = [socket.create_connection(("127.0.0.1", client.port), timeout=60) for _ in range(600)]
    for line in lines[::2]:
        line.sendall(b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Le")
    assert client.post("/v1/images/generations", prompt="a star").status == 200
    for line in lines:
        line.close()


def test_the_log_has_no_words(process: Process) -> None:
    process.client.post("/v1/images/generations", prompt="xyzzyprompt")
    asked = [{"role": "user", "content": "xyzzyquestion"}]
    process.client.post("/v1/chat/completions", messages=asked)
    process.client.post("/v1/chat/completions", messages=asked, xyzzyfield=1)
    process.client.request("GET", "/xyzzypath?xyzzyquery=1")
    time.sleep(0.2)
    assert "xyzzy" not in process.said()
    last = [event for event in process.events if event.get("route") == "/v1/chat/completions"][-2]
    assert last["status"] == 200 and last["prompt_tokens"] > 0 and last["finish_reasons"] == ["stop"]


def test_sigterm_lets_running_requests_end(process: Process, um: UniMM) -> None:
    """The last of the process."""
    client, held = process.client, []
    body = {**DRAW, "n": 2, "seed": 20}
    threads = [
        threading.Thread(target=lambda: held.append(client.post("/v1/images/generations", **body)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    while client.metric("unimm_requests_running") < 6:
        time.sleep(0.01)
    process.process.send_signal(signal.SIGTERM)
    while client.request("GET", "/health").status == 200:
        time.sleep(0.01)
    refused = client.post("/v1/images/generations", prompt="a star")
    assert refused.status == 503 and refused.document["error"]["code"] == "stopping"
    assert refused.headers["Retry-After"]
    for thread in threads:
        thread.join()
    assert process.process.wait(60) == 0
    for answer in held:
        rows = [row for row in answer.content.decode().splitlines() if row.startswith('data: {"type')]
        events = [json.loads(row[6:]) for row in rows]
        done = [event for event in events if event["type"] == "image_generation.completed"]
        assert sorted(event["seed"] for event in done) == [20, 21]
    expected = um.draw(DRAW["prompt"], seed=done[-1]["seed"])[0]
    assert image_of(done[-1]["b64_json"]).tobytes() == expected.tobytes()


def test_the_end_does_not_wait_for_what_takes_too_long(capfd: pytest.CaptureFixture[str]) -> None:
    settings = ServerSettings(port=0, shutdown_timeout=0.1, log_words=True)
    server = ModelServer(settings, lambda: load(device="cpu"))
    serve = threading.Thread(target=server.serve)
    serve.start()
    client, held = Client(server.port), []
    wait_until_ready(client)
    threads = [
        threading.Thread(
            target=lambda s=stream: held.append(
                client.post("/v1/images/generations", **{**DRAW, "n": 6, "stream": s})
            )
        )
        for stream in (True, False, True, False)
    ]
    assert client.post("/v1/images/generations", prompt="xyzzy").status == 200
    for thread in threads:
        thread.start()
    while client.metric("unimm_requests_running") < 8:
        time.sleep(0.01)
    silent = socket.create_connection(("127.0.0.1", client.port))
    server.stop()
    serve.join(30)
    assert not serve.is_alive()
    for thread in threads:
        thread.join()
    silent.close()
    ended = [answer for answer in held if answer.status == 503 or b'"stopping"' in answer.content]
    assert len(ended) == len(held) == 4
    assert all(answer.status == 503 or b'"stopping"' in answer.content.splitlines()[-2] for answer in held)
    assert "xyzzy" in capfd.readouterr().err  # as log_words asks for


# --- starting -----------------------------------------------------------------------------------------------------


def test_the_server_says_that_it_loads_and_that_it_cannot() -> None:
    may_load = threading.Event()

    def slow() -> UniMM:
        assert may_load.wait(60)
        raise UserError("model: broken")

    server = ModelServer(ServerSettings(port=0), slow)
    raised: list[BaseException] = []

    def serve() -> None:
        try:
            server.serve()
        except UserError as error:
            raised.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    client = Client(server.port)
    health = client.request("GET", "/health")
    assert health.status == 503 and health.document["status"] == "loading"
    asked = client.post("/v1/images/generations", prompt="a star")
    assert asked.status == 503 and asked.headers["Retry-After"] == "2"
    may_load.set()
    thread.join(30)
    assert [str(error) for error in raised] == ["model: broken"]


def test_a_taken_port_and_odd_settings_are_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            UserError, match=f"port {port}: address already in use; give another, or --port 0"
        ):
            ModelServer(ServerSettings(port=port), load)
    with pytest.raises(UserError, match=r"host 1\.2\.3\.4\.5: no address of this machine"):
        ModelServer(ServerSettings(host="1.2.3.4.5"), load)
    for settings, words in (
        ({"max_waiting": 0}, "--max-waiting: 0; give a whole number of at least 1"),
        ({"max_n": 9, "max_waiting": 8}, "--max-n: 9 is more than"),
        ({"request_timeout": float("nan")}, "--request-timeout: nan; give a number of seconds above 0"),
        ({"model_name": "../a"}, "--model-name: '../a'"),
        ({"api_key": "ä"}, "--api-key: give printable ASCII"),
        ({"allow_hosts": ("http://a",)}, "--allow-host: 'http://a'; give a host name"),
        ({"allow_origins": ("*",)}, "--allow-origin: "),
        ({"server_names": ("a:1",)}, "--server-name: "),
        ({"media_path": tmp_path / "none"}, "--media-path: .*: no such folder"),
    ):
        with pytest.raises(UserError, match=words):
            ServerSettings(**settings)  # type: ignore[arg-type]


def test_an_engine_that_fails_is_made_anew() -> None:
    um = load(device="cpu")
    with serving(um) as client:
        engine = um.engine

        def fail() -> bool:
            del engine.step  # type: ignore[method-assign]
            raise MemoryError("of a test")

        engine.step = fail  # type: ignore[method-assign]
        assert client.post("/v1/images/generations", prompt="a star").status == 500
        answer = client.post("/v1/images/generations", prompt="a star", seed=3)
        assert answer.status == 200
        expected = load(device="cpu").draw("a star", seed=3)[0]
        assert image_of(answer.document["data"][0]["b64_json"]).tobytes() == expected.tobytes()
