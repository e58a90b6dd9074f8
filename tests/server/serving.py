"""Servers to test: one in a thread of this process, with its own copy of the embedded model, and one as a process."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import openai
from PIL import Image

from unimm.pipeline import UniMM
from unimm.server.run import ModelServer
from unimm.server.settings import ServerSettings

STARTS = 120  # seconds that a server may take to start


class Answer(NamedTuple):
    """An answer over HTTP."""

    status: int
    headers: http.client.HTTPMessage
    content: bytes

    @property
    def document(self) -> Any:
        return json.loads(self.content)


class Client:
    """Talks to a server as programs do that are not the openai client."""

    def __init__(self, port: int) -> None:
        self.port = port

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> Answer:
        """Send a request; a body that is no bytes is sent as JSON."""
        given = dict(headers or {})
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        if body is not None:
            given.setdefault("Content-Type", "application/json")
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request(method, path, body, given)
            answer = connection.getresponse()
            return Answer(answer.status, answer.headers, answer.read())
        finally:
            connection.close()

    def post(self, path: str, **body: Any) -> Answer:
        return self.request("POST", path, body)

    def metric(self, name: str) -> float:
        """The value of a metric, summed over its labels."""
        text = self.request("GET", "/metrics").content.decode()
        return sum(
            float(value) for value in re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
        )

    def wait_for(self, name: str, value: float, seconds: float = 60) -> None:
        """Wait until a metric has a value."""
        deadline = time.monotonic() + seconds
        while (found := self.metric(name)) != value:
            assert time.monotonic() < deadline, f"{name} is {found}, not {value}"
            time.sleep(0.05)

    def openai(self, **options: Any) -> openai.OpenAI:
        """OpenAI's own client."""
        return openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1",
            api_key=options.pop("api_key", "none"),
            max_retries=0,
            **options,
        )


@contextlib.contextmanager
def serving(
    um: UniMM, prepare: Callable[[ModelServer], None] | None = None, **settings: Any
) -> Iterator[Client]:
    """A server in a thread, prepared before it begins; it owns the model while it runs."""
    server = ModelServer(ServerSettings(**{"port": 0, **settings}), lambda: um)
    if prepare is not None:
        prepare(server)
    thread = threading.Thread(target=server.serve, name="unimm-serve")
    thread.start()
    client = Client(server.port)
    try:
        wait_until_ready(client)
        yield client
    finally:
        server.stop()
        thread.join(60)
        assert not thread.is_alive()


def wait_until_ready(client: Client) -> None:
    deadline = time.monotonic() + STARTS
    while True:
        with contextlib.suppress(ConnectionError):
            if client.request("GET", "/health").status == 200:
                return
        assert time.monotonic() < deadline
        time.sleep(0.05)


class Process:
    """A server as a process of its own."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.log = folder / "server.log"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
        environment.pop("UNIMM_API_KEY", None)
        command = [sys.executable, "-m", "unimm", "serve", "--port", "0", "--device", "cpu", *arguments]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder)
        deadline = time.monotonic() + STARTS
        while not (found := re.search(r"^unimm: serving .* at http://\S+:(\d+) ", self.said(), re.MULTILINE)):
            assert self.process.poll() is None and time.monotonic() < deadline, self.said()
            time.sleep(0.1)
        self.client = Client(int(found[1]))
        wait_until_ready(self.client)

    def said(self) -> str:
        """What it has written."""
        return self.log.read_text("utf-8", "replace")

    @property
    def events(self) -> list[dict[str, Any]]:
        """The lines of its log."""
        return [json.loads(line) for line in self.said().splitlines() if line.startswith("{")]

    @property
    def memory(self) -> int:
        """Bytes that it has in memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]

    def end(self) -> int:
        """Ask it to end; its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def data_url(image: Image.Image, form: str = "PNG") -> str:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def image_of(text: str) -> Image.Image:
    """The image in base64."""
    return Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")


def shows(image: Image.Image, words: str) -> dict[str, Any]:
    """A turn of the user with an image."""
    parts = [{"type": "image_url", "image_url": {"url": data_url(image)}}, {"type": "text", "text": words}]
    return {"role": "user", "content": parts}
