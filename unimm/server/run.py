"""Serve until told to stop: the socket, uvicorn around the application, signals, and the end.

The first SIGTERM or Ctrl-C lets running requests end within the limit and refuses others, a second one ends at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING

from uvicorn import Config, Server

from unimm.server.app import create_app
from unimm.server.connections import GuardedConnection, listen
from unimm.server.service import Service
from unimm.server.settings import ServerSettings

if TYPE_CHECKING:
    from unimm.pipeline import UniMM

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SWITCH_INTERVAL = 5e-4  # seconds for which the engine's thread waits for Python at most while another has it


class ModelServer:
    """Listens from the moment it is made; answers once `serve` is called.

    Args:
        settings: how it is set.
        load: gives the model; called in a thread while the server answers that it is loading.

    Attributes:
        service: what its routes share.
        app: the application, to which pages may be added before `serve`.

    Raises:
        UserError: the port is taken.
    """

    def __init__(self, settings: ServerSettings, load: Callable[[], UniMM]) -> None:
        self.settings = settings
        self._socket = listen(settings.host, settings.port)
        self.port: int = self._socket.getsockname()[1]
        self.service = Service(settings, load, self._end)
        self.app = create_app(self.service)
        limits = {"max_connections": settings.max_connections}
        config = Config(
            self.app, http=type("Connection", (GuardedConnection,), limits), loop="asyncio", ws="none", lifespan="off",
            log_config=None, log_level="critical", access_log=False, proxy_headers=False, server_header=False,
            timeout_keep_alive=int(GuardedConnection.request_timeout), timeout_graceful_shutdown=3,
        )  # fmt: skip
        self._server = _Uvicorn(config, self.service)

    @property
    def url(self) -> str:
        """Where it is."""
        host = f"[{self.settings.host}]" if ":" in self.settings.host else self.settings.host
        return f"http://{host}:{self.port}"

    def serve(self) -> None:
        """Answer until told to stop.

        Raises:
            BaseException: the model could not be loaded.
        """
        self.service.worker.start()
        before = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_INTERVAL)
        try:
            self._server.run(sockets=[self._socket])
        finally:
            sys.setswitchinterval(before)
            self.service.close()
            self._socket.close()
        if self.service.worker.error is not None:
            raise self.service.worker.error

    def stop(self) -> None:
        """Have `serve` return once running requests have ended; from any thread."""
        self._server.handle_exit(signal.SIGTERM, None)

    def _end(self) -> None:
        self._server.should_exit = True


class _Uvicorn(Server):
    """A server that lets requests end before it does, and exits with 0 then.

    Args:
        config: of uvicorn.
        service: whose requests they are.
    """

    def __init__(self, config: Config, service: Service) -> None:
        super().__init__(config)
        self.service = service
        self._loop: asyncio.AbstractEventLoop | None = None
        self._told = 0
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept connections."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Heed signals; they are not raised again at the end, since they have been obeyed."""
        try:
            before = {number: signal.signal(number, self.handle_exit) for number in SIGNALS}
        except ValueError:  # not in the main thread
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop taking requests; the second time, end."""
        self._told += 1
        if self._told > 1 or self._loop is None:
            self.should_exit = self.force_exit = True
            return
        self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        async def drain() -> None:
            await self.service.drain()
            self.should_exit = True

        self._draining = asyncio.ensure_future(drain())
