"""A server under load: throughput beside one request after another, times to the first row, and what HTTP costs.

    python benchmarks/serving.py                                  # 64 clients, 1,000 requests; some ten minutes
    python benchmarks/serving.py --clients 16 --requests 200      # a minute or two
    python benchmarks/serving.py --json

Captions, questions of two turns and drawings (half of each streamed) go to a server of the embedded model on this
machine's loopback. Each answer is compared with that of the same request alone. `http`: processor time and wall time of
the server for the same requests, without partial images, by those of the engine with no HTTP around it.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import http.client
import io
import json
import os
import queue
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

import unimm
from unimm.data.emojiscenes.captions import held_out_prompts
from unimm.data.emojiscenes.scenes import EmojiScenes
from unimm.pipeline import UniMM
from unimm.sampling.drawing import drawing_requests
from unimm.sampling.requests import Request, TextRequest, TextSampling
from unimm.sampling.sampler import NoiseKey

DISTINCT = 48  # requests; more are these again, of other clients in another order
ROUTES = {"chat": "/v1/chat/completions", "drawing": "/v1/images/generations"}
ROUNDS = 3
RESTS = 2.0  # seconds without requests before memory is looked at


@dataclasses.dataclass
class Call:
    """A request of the mix.

    Attributes:
        kind: `caption`, `question` or `drawing`.
        body: what is sent first.
        second: of a question, what is asked after its answer.
    """

    kind: str
    body: dict[str, Any]
    second: str | None = None


@dataclasses.dataclass
class Outcome:
    """What came of a request.

    Attributes:
        status: 200, or of the refusal.
        answer: the words, or the image in base64; of a refusal, its line.
        seconds: from its start to its end.
        first_row: seconds until the first row of a drawing that was streamed.
    """

    status: int
    answer: Any
    seconds: float
    first_row: float | None = None


def mixed_calls(count: int, streams: bool = True) -> list[Call]:
    """Return captions, questions of two turns and drawings in turn."""
    scenes = EmojiScenes("seen", 7, 64, count, ("single",))
    prompts = held_out_prompts(count)
    calls = []
    for i in range(count):
        stream = streams and i % 2 == 0
        if i % 3 == 2:
            body = {"prompt": prompts[i], "seed": i, "stream": stream}
            calls.append(Call("drawing", body if stream else {**body, "stream": False}))
            continue
        buffer = io.BytesIO()
        Image.fromarray(scenes[i].render()).save(buffer, "png")
        address = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        words = "describe the picture" if i % 3 == 0 else "what is in the picture?"
        parts = [{"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": words}]
        body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 40, "stream": stream}
        second = None if i % 3 == 0 else "what color is the background?"
        calls.append(Call("caption" if second is None else "question", body, second))
    return calls


class Caller:
    """One client, with a connection that stays open.

    Args:
        port: of the server.
    """

    def __init__(self, port: int) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)

    def call(self, call: Call) -> Outcome:
        """Send a request of the mix, and wait for all of its answer."""
        start = time.perf_counter()
        outcome = self._once(call.kind, call.body, start)
        if call.second is not None and outcome.status == 200:
            said = {"role": "assistant", "content": outcome.answer or " "}
            messages = [*call.body["messages"], said, {"role": "user", "content": call.second}]
            second = self._once(call.kind, {**call.body, "messages": messages}, start)
            answer = second.answer if second.status != 200 else [outcome.answer, second.answer]
            return Outcome(second.status, answer, second.seconds)
        return outcome

    def _once(self, kind: str, body: dict[str, Any], start: float) -> Outcome:
        path = ROUTES["drawing" if kind == "drawing" else "chat"]
        self.connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = self.connection.getresponse()
        first: float | None = None
        if response.status != 200:
            answer = json.loads(response.read())["error"]["message"]
        elif not body["stream"]:
            document = json.loads(response.read())
            if kind == "drawing":
                answer = document["data"][0]["b64_json"]
            else:
                answer = document["choices"][0]["message"]["content"]
        else:
            answer = ""
            for line in response:
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                event = json.loads(line[6:])
                if kind == "drawing":
                    first = time.perf_counter() - start if first is None else first
                    answer = event["b64_json"]
                else:
                    answer += event["choices"][0]["delta"].get("content") or ""
        return Outcome(response.status, answer, time.perf_counter() - start, first)


def run_load(port: int, calls: Sequence[Call], clients: int) -> tuple[list[Outcome], float]:
    """Send requests by so many clients at once, each its next when it has an answer.

    Returns:
        What came of each, and the seconds of all.

    Raises:
        RuntimeError: a client failed.
    """
    left: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(len(calls)):
        left.put(number)
    found: dict[int, Outcome] = {}
    faults: list[BaseException] = []

    def work() -> None:
        caller = Caller(port)
        while True:
            try:
                number = left.get_nowait()
            except queue.Empty:
                return
            try:
                found[number] = caller.call(calls[number])
            except BaseException as error:
                faults.append(error)
                return

    threads = [threading.Thread(target=work) for _ in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise RuntimeError(f"{len(faults)} clients failed") from faults[0]
    return [found[number] for number in range(len(calls))], time.perf_counter() - start


class Served:
    """A server of the embedded model as a process of its own."""

    def __enter__(self) -> Served:
        command = [sys.executable, "-m", "unimm", "serve", "--port", "0", "--device", "cpu"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        found = None
        for line in self.process.stderr:
            if found := re.search(r"serving \S+ at http://\S+:(\d+)", line):
                break
        assert found is not None
        self.port = int(found[1])
        threading.Thread(target=self.process.stderr.read, daemon=True).start()  # its log, which nobody needs
        while self._health() != 200:
            time.sleep(0.05)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()

    def _health(self) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", "/health")
        return connection.getresponse().status

    @property
    def memory(self) -> int:
        """Bytes that it has in memory."""
        found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{self.process.pid}/status").read_text())
        assert found is not None
        return int(found[1]) * 1024

    @property
    def cpu(self) -> float:
        """Seconds of processors that it has taken."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def load(clients: int, requests: int) -> dict[str, Any]:
    """Compare the load with one request after another."""
    distinct = mixed_calls(min(DISTINCT, requests))
    calls = [distinct[i % len(distinct)] for i in range(requests)]
    with Served() as served:
        run_load(served.port, distinct, clients)  # what is measured once in a process
        alone, alone_seconds = run_load(served.port, distinct, 1)
        time.sleep(RESTS)
        before = served.memory
        found, seconds = run_load(served.port, calls, clients)
        time.sleep(RESTS)
        after = served.memory
    answered = [outcome for outcome in found if outcome.status == 200]
    same = sum(
        outcome.status != 200 or outcome.answer == alone[i % len(distinct)].answer
        for i, outcome in enumerate(found)
    )
    rows = [outcome.first_row for outcome in found if outcome.first_row is not None]
    rows_alone = [outcome.first_row for outcome in alone if outcome.first_row is not None]
    rate, rate_alone = len(answered) / seconds, len(distinct) / alone_seconds
    return {
        "requests": requests,
        "clients": clients,
        "answered": len(answered),
        "refused": sum(outcome.status in (429, 503) for outcome in found),
        "same as alone": same,
        "requests a second": rate,
        "one after another": rate_alone,
        "throughput": rate / rate_alone,
        "first row, median": statistics.median(rows),
        "first row, 95 %": sorted(rows)[int(0.95 * len(rows))],
        "first row alone, median": statistics.median(rows_alone),
        "seconds, median": statistics.median(outcome.seconds for outcome in answered),
        "memory before, MB": before / 1e6,
        "memory after, MB": after / 1e6,
    }


def http_cost(clients: int, requests: int) -> dict[str, Any]:
    """Compare processor time and wall time of the server with those of the engine alone, in turn."""
    distinct = [call for call in mixed_calls(DISTINCT, streams=False) if call.second is None]
    calls = [distinct[i % len(distinct)] for i in range(requests)]
    um = unimm.load(device="cpu")
    run_engine(um, distinct, clients)
    walls, cpus = [], []
    with Served() as served:
        run_load(served.port, distinct, clients)
        for _ in range(ROUNDS):
            cpu = served.cpu
            _, wall = run_load(served.port, calls, clients)
            cpu, start, own = served.cpu - cpu, time.perf_counter(), time.process_time()
            run_engine(um, calls, clients)
            walls.append(wall / (time.perf_counter() - start))
            cpus.append(cpu / (time.process_time() - own))
    return {
        "wall, by the engine's": statistics.median(walls),
        "cpu, by the engine's": statistics.median(cpus),
    }


def run_engine(um: UniMM, calls: Sequence[Call], together: int) -> None:
    """Run the same requests on an engine, so many at once, with all that the answers need but HTTP."""
    asked: list[Request] = []
    sampling = um.model.config.sampling_config()
    for call in calls:
        if call.kind == "drawing":
            keys, grid = [NoiseKey(call.body["seed"])], um.model.layout.grid
            asked += drawing_requests(um.processor, [call.body["prompt"]], [()], keys, sampling, grid)
        else:
            ids, seen = um.processor.chat(call.body["messages"])
            options = TextSampling(max_new_tokens=call.body["max_tokens"])
            asked.append(TextRequest(ids, seen, sampling=options, remember=True))
    for ticket in um.engine.run(asked, together):
        if ticket.codes is not None:
            um.decode_codes(ticket.codes[None])[0].save(io.BytesIO(), "png")


def main() -> None:
    """Print each comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=64, help="at once (default: 64)")
    parser.add_argument("--requests", type=int, default=1000, help="in all (default: 1,000)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    report = {"load": load(options.clients, options.requests), "http": http_cost(options.clients, 240)}
    if options.json:
        print(json.dumps(report, indent=2))
        return
    for name, figures in report.items():
        for label, value in figures.items():
            print(
                f"{name}: {label}: {value:.4g}" if isinstance(value, float) else f"{name}: {label}: {value}"
            )


if __name__ == "__main__":
    main()
