"""Server-sent events: what is told piece by piece, to the end, to an error, or until nobody listens."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any, NamedTuple

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.types import Receive, Scope, Send

from unimm.server.errors import as_api_error
from unimm.server.service import Service
from unimm.server.worker import Job

PING = 15  # seconds after which a silent stream says that it is there


class Event(NamedTuple):
    """One event.

    Attributes:
        data: JSON, or `[DONE]`.
        name: of its kind, where clients look at that.
        log: what the log says of the request, with the last.
    """

    data: str
    name: str | None = None
    log: dict[str, Any] | None = None


class _Stream(EventSourceResponse):
    """A stream whose request is logged with what came of it."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        await super().__call__(scope, receive, send)


def event_stream(
    service: Service, jobs: Sequence[Job], events: AsyncGenerator[Event, None], received: float
) -> EventSourceResponse:
    """Return the answer that sends events as they come.

    Whatever ends it, jobs that still run are cancelled.

    Args:
        service: whose jobs they are.
        jobs: what the events tell of.
        events: what is sent; an error in it is sent as the last.
        received: when the request came.
    """

    async def written() -> AsyncIterator[ServerSentEvent]:
        try:
            with service.timed(jobs, received):
                async with contextlib.aclosing(events) as told:
                    async for event in told:
                        if event.log is not None:
                            response.scope["unimm.log"] = event.log
                        yield ServerSentEvent(event.data, event=event.name, sep="\n")
        except Exception as error:
            document = as_api_error(error).body()
            response.scope["unimm.log"] = {"failed": document["error"]["code"]}
            yield ServerSentEvent(json.dumps(document), event="error", sep="\n")
        finally:
            service.leave(jobs)

    response = _Stream(written(), ping=PING, sep="\n")
    return response
