"""The one thread that owns the engine: it loads the model, runs steps while there is work, and tells who waits.

The event loop submits jobs and reads what they have so far. Nothing that a client does is waited for here: text and
codes stay with their job until its reader takes them, so a slow reader costs its neighbours nothing.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import copy
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from PIL import Image

from unimm.errors import UserError
from unimm.processing.processor import UniMMProcessor
from unimm.sampling.drawing import drawing_requests
from unimm.sampling.engine import Engine
from unimm.sampling.requests import DrawingRequest, Request, TextRequest, TextSampling, Ticket
from unimm.sampling.sampler import NoiseKey
from unimm.server.errors import APIError, as_api_error
from unimm.server.freeing import give_memory_back
from unimm.server.logs import write_failure
from unimm.server.metrics import ServerMetrics

if TYPE_CHECKING:
    from unimm.pipeline import UniMM

_T = TypeVar("_T")
WARM_UP = 20.0  # seconds that it may take
REST = 1.0  # seconds without work after which free memory goes back to the system
WorkerState = Literal["loading", "ready", "failed", "stopped"]


class Job:
    """An answer or a drawing on its way, as its reader on the event loop sees it.

    Args:
        request: what is asked for; its callbacks are set here.
        loop: where the reader is.
        received: when the request came (`time.monotonic`).
        streams: whether its reader wants what there is as it comes.

    Attributes:
        changed: set whenever there is more.
        codes: all codes of a drawing so far; the list grows, what is in it stays.
        error: why it ended early.
        ticket: the engine's; None until it is submitted.
    """

    def __init__(
        self, request: Request, loop: asyncio.AbstractEventLoop, received: float, streams: bool
    ) -> None:
        self.request, self.loop, self.received, self.streams = request, loop, received, streams
        self.changed = asyncio.Event()
        self.codes: list[int] = []
        self.error: APIError | None = None
        self.ticket: Ticket | None = None
        self.news = False  # whether the reader has yet to be told
        self.counted = 0  # tokens or codes that the metrics know of
        self._pieces: deque[str] = deque()
        if isinstance(request, TextRequest) and streams:
            request.on_text = self._on_text
        elif isinstance(request, DrawingRequest):
            request.on_codes = self._on_codes

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        return self.error is not None or (self.ticket is not None and self.ticket.done)

    def take_text(self) -> str:
        """Return what has been said since the last call."""
        taken = []
        while self._pieces:
            taken.append(self._pieces.popleft())
        return "".join(taken)

    async def wait(self) -> None:
        """Wait until there is more, or all.

        Raises:
            APIError: it failed.
        """
        if not self.done:
            await self.changed.wait()
        self.changed.clear()
        if self.error is not None:
            raise self.error

    async def finish(self) -> Ticket:
        """Wait until it is done.

        Raises:
            APIError: it failed.
        """
        while not self.done:
            await self.wait()
        if self.error is not None:
            raise self.error
        assert self.ticket is not None
        if self.ticket.finish_reason not in ("stop", "length"):
            raise as_api_error(self.ticket.error or APIError(503, "cancelled", "cancelled"))
        return self.ticket

    def _on_text(self, piece: str) -> None:
        self._pieces.append(piece)
        self.news = True

    def _on_codes(self, codes: list[int]) -> None:
        self.codes = codes
        self.news = self.streams

    @property
    def produced(self) -> int:
        """Tokens or codes so far."""
        if isinstance(self.request, DrawingRequest):
            return len(self.codes)
        return 0 if self.ticket is None else len(self.ticket.ids)


class Worker:
    """Loads a model and runs its engine.

    Args:
        load: gives the model; called in the worker's thread.
        metrics: what is counted.
        on_failed: called, from the worker's thread, if the model cannot be loaded.

    Attributes:
        state: what it is doing.
        um: the model, once it is loaded.
        processor: a copy of its processor for another thread, since tokenizers are not for two at once.
        error: why it could not be loaded.
    """

    def __init__(
        self, load: Callable[[], UniMM], metrics: ServerMetrics, on_failed: Callable[[], None] | None = None
    ) -> None:
        self.load, self.metrics, self.on_failed = load, metrics, on_failed
        self.state: WorkerState = "loading"
        self.um: UniMM | None = None
        self.processor: UniMMProcessor | None = None
        self.error: BaseException | None = None
        self.engine: Engine | None = None
        self._jobs: list[Job] = []  # of the worker's thread
        self._new: deque[Job] = deque()
        self._between: deque[tuple[Callable[[], Any], concurrent.futures.Future[Any]]] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="unimm-engine", daemon=True)

    def start(self) -> None:
        """Begin to load."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; jobs that are left fail."""
        self._stopping = True
        self._wake.set()
        self._thread.join()

    @property
    def waiting(self) -> int:
        """Jobs that the engine has not begun."""
        return len(self._new) + (self.engine.waiting if self.engine is not None else 0)

    @property
    def running(self) -> int:
        """Jobs that the engine runs."""
        return self.engine.running if self.engine is not None else 0

    def submit(self, job: Job) -> None:
        """Take a job; from any thread.

        Raises:
            APIError: it would not fit if it were alone, or there is no engine.
        """
        if self.state != "ready":
            raise APIError(503, f"the model is {self.state}", "not_ready", retry_after=2)
        self._new.append(job)
        self._wake.set()

    def cancel(self, job: Job, error: APIError | None = None) -> None:
        """Have a job end; from the event loop. Nothing happens if it is done.

        Args:
            job: which.
            error: what its reader is told.
        """
        if not job.done:
            job.error = error or APIError(503, "cancelled", "cancelled")
            job.changed.set()
        ticket, engine = job.ticket, self.engine  # after the error: `_take` looks in the other order
        if ticket is not None and not ticket.done and engine is not None:
            self.metrics.cancelled.inc()
            engine.cancel(ticket)
        self._wake.set()

    def between_steps(self, work: Callable[[], _T]) -> concurrent.futures.Future[_T]:
        """Do something to the model's tensors between two steps of the engine; from any thread.

        Two threads that compute at once, each with all cores, take longer than one after the other.
        """
        future: concurrent.futures.Future[_T] = concurrent.futures.Future()
        self._between.append((work, future))
        self._wake.set()
        return future

    # --- the worker's thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self.um = self.load()
            self.engine = self.um.engine
            self.processor = copy.deepcopy(self.um.processor)
            warm_up(self.um, self.engine)
            self.state = "ready"
        except BaseException as error:
            self.error, self.state = error, "failed"
            if self.on_failed is not None:
                self.on_failed()
            return
        while not self._stopping:
            self._wake.clear()
            try:
                self._take()
                self._work_between()
                more = self._step()
            except Exception as error:  # not of one request alone, as when memory runs out
                write_failure("the engine failed and is made anew", error)
                self._begin_anew(error)
                more = bool(self._new)
            if not more and not self._stopping:
                assert self.engine is not None
                self.engine.release()
                if not self._wake.wait(REST):
                    give_memory_back()
                    self._wake.wait()
        self.state = "stopped"
        while self._between:
            self._between.popleft()[1].cancel()
        for job in [*self._jobs, *self._new]:
            if not job.done:
                job.error = APIError(503, "the server is stopping", "stopping")
            self._tell([job])

    def _work_between(self) -> None:
        """Do what was asked for since the last step."""
        while self._between:
            work, future = self._between.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

    def _take(self) -> None:
        """Hand what is new to the engine."""
        engine = self.engine
        assert engine is not None
        while self._new:
            job = self._new.popleft()
            if job.done:  # cancelled before it began
                self._tell([job])
                continue
            try:
                job.ticket = engine.submit(job.request)
                self._jobs.append(job)
                if job.error is not None:  # cancelled meanwhile
                    engine.cancel(job.ticket)
            except Exception as error:
                job.error = as_api_error(error)
                self._tell([job])

    def _step(self) -> bool:
        """Run one step; whether there is more to do."""
        assert self.engine is not None
        more = self.engine.step() if self._jobs else False
        self._note()
        return more or bool(self._jobs) or bool(self._new)

    def _note(self) -> None:
        """Count what the step made, and tell the readers of it."""
        told = []
        now = time.monotonic()
        for job in self._jobs:
            self._count(job, now)
            if job.news or job.done:
                told.append(job)
        if not told:
            return
        for job in told:
            job.news = False
            ticket = job.ticket
            if ticket is not None and ticket.done:
                if ticket.error is not None:
                    write_failure("a request failed in the engine", ticket.error)
                    job.error = as_api_error(ticket.error)
                elif ticket.finish_reason == "cancelled" and job.error is None:
                    job.error = APIError(503, "cancelled", "cancelled")
        self._jobs = [job for job in self._jobs if job.ticket is None or not job.ticket.done]
        self._tell(told)

    def _count(self, job: Job, now: float) -> None:
        """Count the tokens or codes that are new."""
        produced = job.produced
        if produced == job.counted:
            return
        drawing = isinstance(job.request, DrawingRequest)
        first = job.request.grid[1] if isinstance(job.request, DrawingRequest) else 1
        if job.counted < first <= produced:
            self.metrics.first(drawing, now - job.received)
        self.metrics.produced(drawing, produced - job.counted)
        job.counted = produced

    def _begin_anew(self, error: BaseException) -> None:
        """Fail all jobs, and make another engine."""
        jobs, self._jobs = self._jobs, []
        for job in jobs:
            job.error = job.error or as_api_error(error)
        self._tell(jobs)
        um, old = self.um, self.engine
        assert um is not None and old is not None
        self.engine = Engine(um.model, um.processor, old.limits)

    @staticmethod
    def _tell(jobs: list[Job]) -> None:
        """Wake the readers of jobs."""
        loops: dict[asyncio.AbstractEventLoop, list[Job]] = {}
        for job in jobs:
            loops.setdefault(job.loop, []).append(job)
        for loop, own in loops.items():
            if not loop.is_closed():
                loop.call_soon_threadsafe(_set_all, own)


def _set_all(jobs: list[Job]) -> None:
    for job in jobs:
        job.changed.set()


def warm_up(um: UniMM, engine: Engine) -> None:
    """Draw and answer a little, so that what is measured or compiled once is no part of the first request.

    Args:
        um: the model.
        engine: its engine.
    """
    processor = um.processor
    requests: list[Request] = []
    with contextlib.suppress(UserError):  # a model that has no room for this has none for much else
        if processor.drawing_size is not None:
            sampling = um.model.config.sampling_config()
            grid = um.model.layout.grid
            requests += drawing_requests(processor, ["a"], [()], [NoiseKey(0)], sampling, grid)
        shown = [] if processor.views is None else [Image.new("RGB", (64, 64))]
        asked = processor.question("what is this?", shown)
        requests.append(TextRequest(*asked, sampling=TextSampling(max_new_tokens=8)))
    tickets = [engine.submit(request) for request in requests]
    deadline = time.monotonic() + WARM_UP
    while engine.step() and time.monotonic() < deadline:
        pass
    for ticket in tickets:
        engine.cancel(ticket)
        if ticket.codes is not None:
            um.decode_codes(ticket.codes[None])
    engine.step()
    engine.release()
