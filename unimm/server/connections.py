"""Connections that cannot hold a server up: a time to bring a request, a time to take an answer, and a most of them.

For uvicorn's `http=`; the server's own programs and pages share it.
"""

from __future__ import annotations

import asyncio
import socket
from typing import ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from unimm.errors import UserError

BACKLOG = 512  # connections that wait to be accepted


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; what connects to it waits until it is served.

    Args:
        host: an address of this machine, or a name that leads to one.
        port: 0: any that is free.

    Raises:
        UserError: the address is none of this machine's, or the port is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError):
        raise UserError(f"host {host}: no address of this machine") from None
    listening = socket.socket(family, kind, protocol)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((address[0], port, *address[2:]))
        listening.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        listening.close()
        reason = (error.strerror if isinstance(error, OSError) else None) or "no such port"
        raise UserError(f"port {port}: {reason.lower()}; give another, or --port 0 for any") from None
    return listening


class GuardedConnection(H11Protocol):
    """A connection of a browser, a client, or of whatever else speaks to us.

    Attributes:
        request_timeout: seconds that it has to bring a request, the first or the next.
        write_timeout: seconds for which it may take nothing of an answer.
        parting: seconds that it has to end once the server does.
        max_connections: of too many, the idle one that was silent longest goes.
    """

    request_timeout: ClassVar[float] = 60
    write_timeout: ClassVar[float] = 60
    parting: ClassVar[float] = 1
    max_connections: ClassVar[int] = 256

    deadline: asyncio.TimerHandle | None = None
    since: float = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._wait(self.request_timeout)
        if len(self.connections) > self.max_connections:
            ours = [one for one in self.connections if isinstance(one, GuardedConnection)]
            oldest = min([one for one in ours if not one.answering] or ours, key=lambda one: one.since)
            self.connections.discard(oldest)
            oldest.transport.abort()

    @property
    def answering(self) -> bool:
        """Whether its request is being answered."""
        return self.cycle is not None and not self.cycle.more_body and not self.cycle.response_complete

    def data_received(self, data: bytes) -> None:
        """Take what came."""
        self.since = self.loop.time()
        super().data_received(data)
        if self.answering and not self.flow.write_paused:
            self._stop()  # the request is whole; now the other side waits for us

    def pause_writing(self) -> None:
        """Wait for the other side to take what it was sent."""
        super().pause_writing()
        self._wait(self.write_timeout)

    def resume_writing(self) -> None:
        """Go on."""
        super().resume_writing()
        if self.answering:
            self._stop()
        else:
            self._wait(self.request_timeout)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP; where its answer has begun already, end the connection."""
        if self.cycle is not None:
            self.cycle.disconnected = True  # what is answered in the meantime is not sent
        try:
            super().send_400_response(msg)
        except h11.LocalProtocolError:
            self.transport.abort()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        self._wait(self.request_timeout)
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        super().connection_lost(exc)
        self._stop()

    def shutdown(self) -> None:
        """End, soon: who brings or takes its bytes slowly does not hold up the server."""
        super().shutdown()
        self.loop.call_later(self.parting, self.transport.abort)

    def _wait(self, seconds: float) -> None:
        self._stop()
        self.since = self.loop.time()
        self.deadline = self.loop.call_later(seconds, self.transport.abort)

    def _stop(self) -> None:
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None
