"""What all routes share: who is let in, what is prepared and rendered beside the engine, and how the server ends.

A request is admitted while the queue has room for it, prepared (images decoded, words tokenised) in one thread, run by
the engine's thread, and its images are rendered in a third. The event loop itself only moves bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from starlette.requests import Request as HTTPRequest

from unimm.processing.processor import UniMMProcessor
from unimm.sampling.requests import Request
from unimm.server.body import BodyReader
from unimm.server.errors import APIError, as_api_error
from unimm.server.images import ImageReader
from unimm.server.metrics import ServerMetrics
from unimm.server.settings import ServerSettings
from unimm.server.worker import Job, Worker

if TYPE_CHECKING:
    from unimm.pipeline import UniMM

T = TypeVar("T")
RememberDrawing = Callable[[str, list[list[int]]], str]
"""Takes a prompt and the rows of codes of a drawing; returns what the drawing is called from then on."""
LONGEST_WAIT = 60  # seconds that a client is told to wait at most


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class Service:
    """The model, its queue and the threads around it.

    Args:
        settings: of the server.
        load: gives the model, in a thread of its own.
        on_failed: called if it cannot be loaded.

    Attributes:
        worker: runs the engine.
        metrics: what is counted.
        bodies: reads what clients send.
        images: reads images.
        started: when it was made, in seconds since 1970.
        remember: keeps what was drawn (`RememberDrawing`), for those who vote on it; None: nothing is kept.
    """

    def __init__(
        self,
        settings: ServerSettings,
        load: Callable[[], UniMM],
        on_failed: Callable[[], None] | None = None,
    ) -> None:
        self.settings = settings
        self.metrics = ServerMetrics()
        self.worker = Worker(load, self.metrics, on_failed)
        self.bodies = BodyReader(settings.max_body)
        self.images = ImageReader(settings)
        self.started = int(time.time())
        self.remember: RememberDrawing | None = None
        self.stopping = False
        self._open = 0
        self._preparing = 0
        self._jobs: set[Job] = set()
        self._prepare, self._render = _thread("prepare"), _thread("render")
        self.metrics.gauge(
            "unimm_requests_waiting", "Answers and drawings before the engine.", lambda: self.waiting
        )
        self.metrics.gauge(
            "unimm_requests_running", "Answers and drawings in the engine.", lambda: self.worker.running
        )
        self.metrics.gauge("unimm_cache_bytes", "Of keys and values of running requests.", self._cache_bytes)
        self.metrics.gauge("unimm_prefix_tokens", "Positions of held prefixes.", self._prefix_tokens)
        self.metrics.gauge("unimm_gpu_bytes", "Memory of tensors on the GPU.", self._gpu_bytes)

    def close(self) -> None:
        """End all threads."""
        for executor in (self._prepare, self._render):
            executor.shutdown(wait=True, cancel_futures=True)
        self.worker.stop()

    @property
    def um(self) -> UniMM:
        """The model.

        Raises:
            APIError: it is not loaded, or the server ends.
        """
        if self.stopping:
            raise APIError(503, "the server is stopping", "stopping", retry_after=5)
        if self.worker.state != "ready" or self.worker.um is None:
            raise APIError(503, f"the model is {self.worker.state}", "not_ready", retry_after=2)
        return self.worker.um

    @property
    def processor(self) -> UniMMProcessor:
        """The model's, for the thread that prepares requests.

        Raises:
            APIError: as `um`.
        """
        _ = self.um
        assert self.worker.processor is not None
        return self.worker.processor

    def check_model(self, name: str | None) -> None:
        """Refuse a request to another model than there is.

        Raises:
            APIError: the name is another's.
        """
        own = self.settings.model_name
        if name is not None and name != own:
            raise APIError(
                404, f"model: there is no such model; this server has {own}", "model_not_found", "model"
            )

    # --- the queue ------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Answers and drawings that the engine has not begun."""
        return self._preparing + self.worker.waiting

    @contextlib.contextmanager
    def admitted(self, count: int) -> Iterator[None]:
        """Have a request prepared in the block, if the queue has room for its answers or drawings.

        Raises:
            APIError: it has not, or there are more than one request may have, or no model.
        """
        most = self.settings.max_n
        if count > most:
            raise APIError(400, f"n: {count}; at most {most}", "invalid_value", "n")
        _ = self.um  # before anyone waits for it
        if self.waiting + count > self.settings.max_waiting:
            line = f"{self.waiting} answers and drawings wait already; try again"
            raise APIError(429, line, "queue_full", retry_after=self._retry_after())
        self._preparing += count
        try:
            yield
        finally:
            self._preparing -= count

    def _retry_after(self) -> int:
        """Seconds after which the queue has probably moved on."""
        rate = self.metrics.done_per_second()
        return max(1, min(LONGEST_WAIT, round(self.settings.max_waiting / 4 / rate) if rate > 0 else 5))

    async def prepare(
        self, make: Callable[[], Sequence[Request]], received: float, streams: bool
    ) -> list[Job]:
        """Prepare a request beside the event loop, and submit it.

        Args:
            make: gives what the engine is to be asked for.
            received: when the request came.
            streams: whether a reader wants what there is as it comes.

        Returns:
            A job for each.

        Raises:
            APIError: what is asked for makes no sense.
        """
        loop = asyncio.get_running_loop()
        try:
            requests = await loop.run_in_executor(self._prepare, make)
        except Exception as error:
            raise as_api_error(error) from error
        jobs = [Job(request, loop, received, streams) for request in requests]
        for job in jobs:
            self.worker.submit(job)
            self._jobs.add(job)
        return jobs

    def leave(self, jobs: Sequence[Job]) -> None:
        """Forget jobs; those that still run are cancelled."""
        for job in jobs:
            self._jobs.discard(job)
            if not job.done:
                self.worker.cancel(job)
            elif job.ticket is not None and job.ticket.done:
                self.metrics.ended(job.ticket.prompt_tokens, job.ticket.cached_tokens)

    async def render(self, work: Callable[[], T]) -> T:
        """Do something to images, in the thread for that."""
        return await asyncio.get_running_loop().run_in_executor(self._render, work)

    @contextlib.contextmanager
    def timed(self, jobs: Sequence[Job], received: float) -> Iterator[None]:
        """Give a request the time that is left of it; then its jobs fail.

        Args:
            jobs: of the request.
            received: when it came.
        """
        seconds = self.settings.request_timeout
        error = APIError(503, f"the request took longer than {seconds:g} s", "timeout", retry_after=1)

        def end() -> None:
            for job in jobs:
                self.worker.cancel(job, error)

        timer = asyncio.get_running_loop().call_later(max(received + seconds - time.monotonic(), 0), end)
        try:
            yield
        finally:
            timer.cancel()

    # --- the end --------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def open_request(self) -> Iterator[None]:
        """Count a request that is being answered."""
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1

    async def drain(self) -> None:
        """Take no more requests; end when those that run have ended, or at the limit."""
        self.stopping = True
        deadline = time.monotonic() + self.settings.shutdown_timeout
        while self._open and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        for job in list(self._jobs):
            self.worker.cancel(job, APIError(503, "the server is stopping", "stopping", retry_after=5))
        deadline = time.monotonic() + 2
        while self._open and time.monotonic() < deadline:  # for what is said of the end
            await asyncio.sleep(0.05)

    # --- what is measured -----------------------------------------------------------------------------------

    def _cache_bytes(self) -> float:
        return self.worker.engine.cache.nbytes if self.worker.engine is not None else 0

    def _prefix_tokens(self) -> float:
        return self.worker.engine.prefixes.tokens if self.worker.engine is not None else 0

    def _gpu_bytes(self) -> float:
        import torch

        um = self.worker.um
        return torch.cuda.memory_allocated(um.device) if um is not None and um.device.type == "cuda" else 0


async def until_gone(request: HTTPRequest, work: Awaitable[T]) -> T:
    """Wait for an answer for as long as its client does.

    Raises:
        ClientGone: the client went; the work was cancelled.
    """
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        gone.cancel()
        if not working.done():
            working.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await working


async def _gone(request: HTTPRequest) -> None:
    """Wait until a client ends its connection; its body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _thread(name: str) -> Executor:
    return ThreadPoolExecutor(1, thread_name_prefix=f"unimm-{name}")
