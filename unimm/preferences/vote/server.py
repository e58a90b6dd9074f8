"""The page on which a person votes, served to this machine alone by starlette and uvicorn.

Other web pages that the person has open must neither read nor vote: only requests that name this host are answered
(against DNS rebinding), and a vote carries a token of this run, which only our page can read (against forged
requests). Programs on this machine must not block the page: a connection has a time to bring its request, and of too
many the one that was silent longest goes.
"""

from __future__ import annotations

import hmac
import json
import re
import secrets
from collections.abc import Mapping
from http import HTTPStatus
from importlib import resources
from typing import Any

from unimm.errors import UserError
from unimm.preferences.vote.booth import Booth, Refusal

try:
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import Response
    from starlette.routing import Route
    from starlette.types import ASGIApp, Receive, Scope, Send
    from uvicorn import Config, Server

    from unimm.server.connections import GuardedConnection, listen
except ImportError:
    raise UserError(
        "voting: needs starlette and uvicorn; install them with: pip install 'unimm[serve]'"
    ) from None

ADDRESS = "127.0.0.1"
_HOST = re.compile(rf"({re.escape(ADDRESS)}|localhost)(:\d{{1,5}})?")
MAX_BODY = 4096  # bytes of a request's body
FIXED = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class VoteServer:
    """Listens on this machine from the moment it is made; answers once `serve` is called.

    Args:
        port: 0 takes any that is free.

    Raises:
        UserError: the port is taken.
    """

    def __init__(self, port: int) -> None:
        self._socket = listen(ADDRESS, port)
        self.port: int = self._socket.getsockname()[1]
        self._server: Server | None = None
        self._ended = False

    def __enter__(self) -> VoteServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{ADDRESS}:{self.port}/"

    @property
    def connections(self) -> int:
        """How many are open."""
        return 0 if self._server is None else len(self._server.server_state.connections)

    def serve(self, booth: Booth) -> None:
        """Answer until interrupted, or until `shutdown` is called."""
        config = Config(
            make_app(booth), http=GuardedConnection, loop="asyncio", ws="none", lifespan="off", log_config=None,
            log_level="error", access_log=False, proxy_headers=False, server_header=False,
            timeout_keep_alive=int(GuardedConnection.request_timeout),
        )  # fmt: skip
        self._server = Server(config)
        self._server.should_exit = self._ended
        self._server.run(sockets=[self._socket])

    def shutdown(self) -> None:
        """Have `serve` return; from any thread."""
        self._ended = True
        if self._server is not None:
            self._server.should_exit = True


# --- what is answered --------------------------------------------------------------------------------------


def make_app(booth: Booth) -> Starlette:
    """The page, what it shows, images, and what a vote and an undoing do."""
    page = resources.files("unimm.preferences.vote").joinpath("page.html").read_text(encoding="utf-8")

    def show_page(_: Request) -> Response:
        nonce = secrets.token_urlsafe(16)
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src 'self' data:; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        content = page.replace("{nonce}", nonce).replace("{token}", booth.token)
        headers = {"Content-Security-Policy": policy, "Cache-Control": "no-store", **FIXED}
        return Response(content, media_type="text/html", headers=headers)

    def show_state(_: Request) -> Response:
        return _json(booth.state())

    def show_image(request: Request) -> Response:
        png = booth.image(**request.path_params)
        if png is None:
            raise Refusal(HTTPStatus.NOT_FOUND, "there is no such image")
        headers = {"Cache-Control": "private, max-age=86400, immutable", **FIXED}
        return Response(png, media_type="image/png", headers=headers)

    async def vote(request: Request) -> Response:
        body = await read_vote(request, booth.token)
        return _json(await run_in_threadpool(booth.vote, body.get("pair"), body.get("choice")))

    async def undo(request: Request) -> Response:
        body = await read_vote(request, booth.token)
        return _json(await run_in_threadpool(booth.undo, body.get("pair")))

    app = Starlette(
        routes=[
            Route("/", show_page),
            Route("/state", show_state),
            Route("/image/{run}/{key}/{place}", show_image),
            Route("/vote", vote, methods=["POST"]),
            Route("/undo", undo, methods=["POST"]),
        ],
        middleware=[Middleware(_ThisHost)],
        exception_handlers=dict.fromkeys(
            (Refusal, UserError, OSError, HTTPException, ClientDisconnect), _refuse
        ),
    )
    app.router.redirect_slashes = False
    return app


class _ThisHost:
    """Refuses what was sent to another name: a foreign page whose name leads here."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        answer: ASGIApp = self.app
        if len(hosts) != 1 or _HOST.fullmatch(hosts[0]) is None:
            line = f"open http://{ADDRESS} or http://localhost instead"
            answer = _json({"error": line}, HTTPStatus.MISDIRECTED_REQUEST)
        await answer(scope, receive, send)


async def read_vote(request: Request, expected: str) -> dict[str, Any]:
    """Return the JSON object of a request that comes from our page.

    Args:
        request: of any page or program.
        expected: the token of this run.

    Raises:
        Refusal: it comes from elsewhere or from an earlier run, or is no short JSON object.
    """
    origin, token = request.headers.get("Origin"), request.headers.get("X-Token", "")
    if origin is not None and origin not in _own_origins(request):
        raise Refusal(HTTPStatus.FORBIDDEN, "votes are taken from this page alone")
    if not hmac.compare_digest(token.encode(), expected.encode()):
        raise Refusal(HTTPStatus.FORBIDDEN, "the page is of an earlier run; reload it")
    try:
        body = json.loads(await _read(request))
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise Refusal(HTTPStatus.BAD_REQUEST, "a vote is a JSON object")
    return body


def _own_origins(request: Request) -> tuple[str, str]:
    """Return what a browser calls our page, which may stand behind a proxy with TLS."""
    host = request.headers["Host"]
    return f"http://{host}", f"https://{host}"


async def _read(request: Request) -> bytes:
    """Read the body of a request."""
    content = bytearray()
    too_long = Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "a vote is a few bytes long")
    if int(request.headers.get("Content-Length", 0)) > MAX_BODY:  # h11 has seen to its form
        raise too_long
    async for piece in request.stream():
        content += piece
        if len(content) > MAX_BODY:
            raise too_long
    return bytes(content)


def _json(document: Mapping[str, Any], status: int = HTTPStatus.OK) -> Response:
    headers = {"Cache-Control": "no-store", **FIXED}
    return Response(json.dumps(document), status, headers, "application/json")


async def _refuse(_: Request, error: Exception) -> Response:
    """Answer with an error and a line for the person."""
    match error:
        case Refusal():
            return _json({"error": str(error)}, error.status)
        case HTTPException():
            line = (
                "there is no such page" if error.status_code == HTTPStatus.NOT_FOUND else error.detail.lower()
            )
            return _json({"error": line}, error.status_code)
        case ClientDisconnect():
            return Response(status_code=HTTPStatus.BAD_REQUEST)  # which nobody reads
        case OSError():
            line = f"not kept: {error.strerror or error}"
            return _json({"error": line}, HTTPStatus.INTERNAL_SERVER_ERROR)
    return _json({"error": str(error)}, HTTPStatus.INTERNAL_SERVER_ERROR)
