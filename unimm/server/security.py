"""Who may use a server: requests that name it (against DNS rebinding), of pages that may (against forged requests) and
with its key.

A page of another site that someone has open can send requests to a server on that person's machine. What names another
host than the server is refused, and so is what a browser says to come from another origin, unless that was allowed.
"""  # noqa: D205

from __future__ import annotations

import hmac
import ipaddress
import re
import secrets
import socket
from collections.abc import Iterable

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from unimm.server.errors import APIError
from unimm.server.settings import ANY, ServerSettings

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9.-]{1,253})(?::(\d{1,5}))?")
HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
    b"x-frame-options": b"DENY",
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
}
"""Of every answer that does not say otherwise; a page of ours has a policy of its own."""
ALLOWED_METHODS = "GET, POST, OPTIONS"


class Guard:
    """Refuses requests that may not be answered, and gives answers the headers that browsers heed.

    Args:
        app: what answers the others.
        settings: of the server.
        open_paths: paths that need no key; one that ends in a slash stands for all below it.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings, open_paths: Iterable[str] = ()) -> None:
        self.app, self.settings = app, settings
        self.open_paths = frozenset(open_paths)
        self.open_folders = tuple(path for path in self.open_paths if path.endswith("/") and path != "/")
        names = {"localhost", "127.0.0.1", "[::1]", settings.host.lower(), f"[{settings.host.lower()}]"}
        self.names = names | {name.lower() for name in settings.server_names} | {socket.gethostname().lower()}
        self.origins = frozenset(origin.lower() for origin in settings.allow_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = [(name, value.decode("latin-1")) for name, value in scope["headers"]]
        origin = _one(headers, b"origin")
        scope["unimm.id"] = secrets.token_hex(8)

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {
                    **message,
                    "headers": self._with_headers(message["headers"], origin, scope["unimm.id"]),
                }
            await send(message)

        try:
            self._check_host(headers)
            self._check_origin(headers, origin)
            if scope["method"] == "OPTIONS" and origin is not None:
                await Response(status_code=204, headers=_preflight(headers))(scope, receive, answer)
                return
            self._check_key(scope["path"], headers)
        except APIError as error:
            await error.response()(scope, receive, answer)
            return
        await self.app(scope, receive, answer)

    def _check_host(self, headers: list[tuple[bytes, str]]) -> None:
        hosts = [value for name, value in headers if name == b"host"]
        found = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
        if found is None or not self._is_ours(found[1].lower()):
            raise APIError(
                421, "Host: this server has another name; --server-name lets it have this one", "wrong_host"
            )

    def _is_ours(self, name: str) -> bool:
        """Whether the server may be called so: no name of a foreign page is a number."""
        if name in self.names or ANY in self.settings.server_names:
            return True
        if self.settings.local:
            return False
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return False
        return True

    def _check_origin(self, headers: list[tuple[bytes, str]], origin: str | None) -> None:
        site = _one(headers, b"sec-fetch-site")
        if origin is None:
            if site == "cross-site" and _one(headers, b"sec-fetch-mode") != "navigate":
                raise APIError(403, "Sec-Fetch-Site: other sites may not use this server", "wrong_origin")
            return
        host = next(value for name, value in headers if name == b"host").lower()
        own = origin.lower() in (f"http://{host}", f"https://{host}")
        if not own and origin.lower() not in self.origins:
            raise APIError(
                403, "Origin: pages from there may not use this server (--allow-origin)", "wrong_origin"
            )

    def _check_key(self, path: str, headers: list[tuple[bytes, str]]) -> None:
        key = self.settings.api_key
        if key is None or path in self.open_paths or path.startswith(self.open_folders):
            return
        scheme, _, given = (_one(headers, b"authorization") or "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), key.encode()):
            raise APIError(
                401, "Authorization: this server needs its API key, as Bearer KEY", "invalid_api_key"
            )

    def _with_headers(
        self, headers: Iterable[tuple[bytes, bytes]], origin: str | None, name: str
    ) -> list[tuple[bytes, bytes]]:
        """Return the headers of an answer with those that it lacks."""
        given = list(headers)
        present = {header.lower() for header, _ in given}
        given += [(header, value) for header, value in HEADERS.items() if header not in present]
        given.append((b"x-request-id", name.encode()))
        if origin is not None and origin.lower() in self.origins:
            given += [(b"access-control-allow-origin", origin.encode("latin-1")), (b"vary", b"Origin")]
            given.append((b"access-control-expose-headers", b"X-Request-Id, Retry-After"))
        return given


def _one(headers: list[tuple[bytes, str]], name: bytes) -> str | None:
    """Return the value of a header; what is given twice is no value of a browser."""
    values = [value for header, value in headers if header == name]
    return None if not values else values[0] if len(values) == 1 else "null"


def _preflight(headers: list[tuple[bytes, str]]) -> dict[str, str]:
    """Return what a browser is told before it sends a request of an allowed page."""
    asked = _one(headers, b"access-control-request-headers") or ""
    named = [name.strip() for name in asked.split(",")]
    allowed = [name for name in named if re.fullmatch(r"[A-Za-z0-9-]{1,64}", name)]
    return {
        "Access-Control-Allow-Methods": ALLOWED_METHODS,
        "Access-Control-Allow-Headers": ", ".join(allowed) or "Content-Type, Authorization",
        "Access-Control-Max-Age": "600",
    }
