"""What `/metrics` says, in Prometheus' form: requests, queue, speed, times to first token and row, cache, memory."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

WINDOW = 10.0  # seconds over which speeds are taken
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class ServerMetrics:
    """Counts what a server does; may be called from any thread."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)  # resident memory among others, where the system says
        self.requests = Counter(
            "unimm_requests", "Requests that were answered.", ["route", "status"], registry=registry
        )
        self.seconds = Histogram(
            "unimm_request_seconds", "From a request to the end of its answer.", ["route"], registry=registry,
            buckets=_SECONDS,
        )  # fmt: skip
        self.tokens = Counter("unimm_tokens", "Tokens of answers.", registry=registry)
        self.codes = Counter("unimm_codes", "Codes of drawings.", registry=registry)
        self.prompt_tokens = Counter("unimm_prompt_tokens", "Tokens of prompts.", registry=registry)
        self.cached_tokens = Counter("unimm_cached_tokens", "Of these, not computed anew.", registry=registry)
        self.cancelled = Counter(
            "unimm_cancelled", "Answers and drawings that nobody waited for.", registry=registry
        )
        self.first_token = Histogram(
            "unimm_first_token_seconds",
            "From a request to its first token.",
            registry=registry,
            buckets=_SECONDS,
        )
        self.first_row = Histogram(
            "unimm_first_row_seconds", "From a request to the first row of its drawing.", registry=registry,
            buckets=_SECONDS,
        )  # fmt: skip
        self._done = _Speed()
        self._speeds = {False: _Speed(), True: _Speed()}
        self.gauge("unimm_tokens_per_second", "Over the last ten seconds.", self._speeds[False].now)
        self.gauge("unimm_codes_per_second", "Over the last ten seconds.", self._speeds[True].now)

    def gauge(self, name: str, meaning: str, read: Callable[[], float]) -> None:
        """Add a number that is read when it is asked for."""
        Gauge(name, meaning, registry=self.registry).set_function(read)

    def produced(self, drawing: bool, count: int) -> None:
        """Count codes of a drawing, or tokens of an answer."""
        (self.codes if drawing else self.tokens).inc(count)
        self._speeds[drawing].add(count)

    def first(self, drawing: bool, seconds: float) -> None:
        """Note when the first row of a drawing, or the first token of an answer, was there."""
        (self.first_row if drawing else self.first_token).observe(seconds)

    def ended(self, prompt_tokens: int, cached_tokens: int) -> None:
        """Count an answer or a drawing that is done, and the tokens of its prompt."""
        self.prompt_tokens.inc(prompt_tokens)
        self.cached_tokens.inc(cached_tokens)
        self._done.add(1)

    def done_per_second(self) -> float:
        """Return how many answers and drawings ended a second, of late."""
        return self._done.now()

    def text(self) -> bytes:
        """Return all of it, as Prometheus reads it."""
        return generate_latest(self.registry)


class _Speed:
    """How many a second, over the last seconds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._steps: deque[tuple[float, int]] = deque()
        self._total = 0

    def add(self, count: int) -> None:
        with self._lock:
            self._steps.append((time.monotonic(), count))
            self._total += count
            self._forget()

    def now(self) -> float:
        with self._lock:
            self._forget()
            return self._total / WINDOW

    def _forget(self) -> None:
        horizon = time.monotonic() - WINDOW
        while self._steps and self._steps[0][0] < horizon:
            self._total -= self._steps.popleft()[1]
