"""The files of the page: read once, known by name, each with its type; the page itself has a strict policy.

What a request says is looked up among the names and never reaches the file system.
"""

from __future__ import annotations

import hashlib
from importlib import resources
from typing import NamedTuple

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

INDEX = "index.html"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob: data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
"""Of the page: its own scripts and styles, no words that become HTML, nothing from elsewhere."""


class Asset(NamedTuple):
    """A file of the page.

    Attributes:
        content: its bytes.
        type: as HTTP names it.
        tag: changes with the content.
    """

    content: bytes
    type: str
    tag: str


def read_assets() -> dict[str, Asset]:
    """Return the files of the page by their names."""
    found = {}
    for file in resources.files("unimm.server").joinpath("page").iterdir():
        kind = TYPES.get(f".{file.name.rpartition('.')[2]}")
        if kind is not None:
            content = file.read_bytes()
            found[file.name] = Asset(content, kind, f'"{hashlib.sha256(content).hexdigest()[:20]}"')
    return found


def add_page(app: FastAPI, welcome: str) -> None:
    """Add the page at `/`, and its files below `/static/`.

    Args:
        app: of the server.
        welcome: what `/` answers programs that do not ask for HTML.
    """
    assets = read_assets()

    @app.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        if "text/html" not in request.headers.get("accept", ""):
            return PlainTextResponse(welcome, headers={"Vary": "Accept"})
        headers = {
            "Content-Security-Policy": POLICY,
            "Cross-Origin-Opener-Policy": "same-origin",
            "Vary": "Accept",
        }
        return _sent(request, assets[INDEX], headers)

    @app.get("/static/{name}", include_in_schema=False)
    async def asset(request: Request, name: str) -> Response:
        if name not in assets or name == INDEX:
            raise HTTPException(404)
        return _sent(request, assets[name], {})


def _sent(request: Request, asset: Asset, headers: dict[str, str]) -> Response:
    """Return a file, or that the browser has it already; it asks each time, so that files of two versions never mix."""
    headers = {**headers, "ETag": asset.tag, "Cache-Control": "no-cache"}
    if request.headers.get("if-none-match") == asset.tag:
        return Response(status_code=304, headers=headers)
    return Response(asset.content, headers=headers, media_type=asset.type)
