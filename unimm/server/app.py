"""The application: OpenAI's routes, `/health`, `/metrics`, the API's description, and what stands around them."""

from __future__ import annotations

import asyncio
import importlib.metadata
import time
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from unimm.loading import describe_loaded
from unimm.server.assets import add_page
from unimm.server.body import media_type, read_document, read_multipart
from unimm.server.chat import begin_chat
from unimm.server.docs import DOCS_POLICY, docs_page, with_bodies
from unimm.server.drawings import Drawings, begin_drawing
from unimm.server.errors import APIError, as_api_error
from unimm.server.logs import write_failure, write_log
from unimm.server.schemas import ChatRequest, EditRequest, ImageRequest, read_fields, read_request
from unimm.server.security import Guard
from unimm.server.service import ClientGone, Service

VERSION = importlib.metadata.version("unimm")
OPEN_PATHS = ("/", "/health", "/docs", "/openapi.json", "/static/")
"""What needs no key: nothing of it uses the model."""
LONG_BODY = 2**16  # bytes from which parsing it would hold up others
WELCOME = "unimm {version}: {model}. The API is described at /docs.\n"
Endpoint = Callable[[Request], Awaitable[Response]]


def create_app(service: Service) -> FastAPI:
    """Return the application.

    Further routes are added to it (`app.include_router`), such as those for votes (`unimm.preferences.vote.duels`).

    Args:
        service: with the model.
    """
    app = FastAPI(
        title="unimm",
        version=VERSION,
        description="One model that looks at images, answers and draws, behind OpenAI's routes.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        middleware=[
            Middleware(_Watched, service=service),
            Middleware(Guard, settings=service.settings, open_paths=OPEN_PATHS),
        ],
    )
    app.state.service = service
    app.add_exception_handler(HTTPException, _refuse)
    _add_pages(app, service)
    _add_routes(app, service)
    described = app.openapi
    app.openapi = lambda: with_bodies(described())  # type: ignore[method-assign]
    return app


def _add_pages(app: FastAPI, service: Service) -> None:
    """Add what a person and a monitor look at."""
    add_page(app, WELCOME.format(version=VERSION, model=service.settings.model_name))

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        headers = {"Content-Security-Policy": DOCS_POLICY}
        return HTMLResponse(docs_page(app.openapi(), service.settings.model_name), headers=headers)

    @app.get("/health", summary="Whether the model is loaded: 200, or 503 while it is not")
    async def health() -> Response:
        state = "stopping" if service.stopping else service.worker.state
        fields = {"status": "ok" if state == "ready" else state, "model": service.settings.model_name}
        return JSONResponse(fields, 200 if state == "ready" else 503, {"Cache-Control": "no-store"})

    @app.get("/metrics", summary="Requests, queue, speed, cache and memory, for Prometheus")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_routes(app: FastAPI, service: Service) -> None:
    """Add OpenAI's routes."""

    async def chat(request: Request, received: float) -> Response:
        with service.bodies.read_later() as body:
            asked = read_request(ChatRequest, await _json(request, await body.content(request)))
            answer = await begin_chat(service, request, asked, received)
        return await answer.respond(request)

    async def generate(request: Request, received: float) -> Response:
        with service.bodies.read_later() as body:
            asked = read_request(ImageRequest, await _json(request, await body.content(request)))
        return await (await begin_drawing(service, request, asked, received)).respond(request)

    async def edit(request: Request, received: float) -> Response:
        with service.bodies.read_later() as body:
            content = await body.content(request)
            files: list[tuple[str, bytes]] = []
            if media_type(request) == "multipart/form-data":
                fields, files = await read_multipart(request, content, service.settings.max_images + 2)
                asked = read_fields(EditRequest, fields)
            else:
                asked = read_request(EditRequest, await _json(request, content))
            drawings = await _begin_edit(service, request, asked, files, received)
            asked.images, files, content = [], [], b""
        return await drawings.respond(request)

    async def models(request: Request, received: float) -> Response:
        return JSONResponse({"object": "list", "data": [model_card(service)]})

    async def model(request: Request, received: float) -> Response:
        service.check_model(request.path_params["name"])
        return JSONResponse(model_card(service))

    for method, path, summary, answer in (
        ("POST", "/v1/chat/completions", "Answer a conversation, with images in it", chat),
        ("POST", "/v1/images/generations", "Draw", generate),
        ("POST", "/v1/images/edits", "Draw from images and words", edit),
        ("GET", "/v1/models", "The model, and what it takes and gives", models),
        ("GET", "/v1/models/{name:path}", "The model, and what it takes and gives", model),
    ):
        app.add_api_route(path, _answered(answer), methods=[method], summary=summary, response_model=None)


def model_card(service: Service) -> dict[str, Any]:
    """Return the model as `/v1/models` lists it.

    Raises:
        APIError: it is not loaded.
    """
    um = service.um
    processor = um.processor
    draws, looks = processor.drawing_size is not None, processor.views is not None
    rows, columns = processor.layout.grid
    return {
        "id": service.settings.model_name,
        "object": "model",
        "created": service.started,
        "owned_by": "unimm",
        "input_modalities": ["text", *(["image"] if looks else [])],
        "output_modalities": ["text", *(["image"] if draws else [])],
        "context": processor.context,
        "size": f"{columns * processor.stride}x{rows * processor.stride}" if draws else None,
        "rows": rows if draws else None,
        "any_size": draws and processor.layout.sized,
        "votes": draws and service.remember is not None,
        "max_n": service.settings.max_n,
        "max_images": service.settings.max_images,
        "sampling": vars(um.model.config.sampling_config()) if draws else None,
        "info": {"version": VERSION, "device": str(um.device), **describe_loaded(um.model)},
    }


async def _begin_edit(
    service: Service, request: Request, asked: EditRequest, files: list[tuple[str, bytes]], received: float
) -> Drawings:
    """Draw from images: those of a form, or those that JSON names."""
    for name, _ in files:
        if name != "image":
            line = f"{name}: not supported here; leave it out" if name == "mask" else f"{name}: unknown file"
            raise APIError(400, line, "unsupported", name)
    count = len(files) + len(asked.images)
    if not count:
        raise APIError(400, "image: missing; give one, or several", "invalid_value", "image")
    service.images.check_count(count, 0, "image")

    def read() -> list[Any]:
        if service.processor.views is None:
            raise APIError(422, "image: this model cannot look at images", "not_supported", "image")
        sent = [service.images.read(data, "image") for _, data in files]
        named = enumerate(one.image_url.url for one in asked.images)
        return sent + [service.images.at(url, f"images[{number}].image_url") for number, url in named]

    return await begin_drawing(service, request, asked, received, "image_edit", read)


async def _json(request: Request, content: bytes) -> dict[str, Any]:
    """Return the JSON object of a body that says that it is one: other pages may not, without being asked."""
    kind = media_type(request)
    if kind != "application/json":
        raise APIError(415, "Content-Type: send application/json", "wrong_content_type")
    if len(content) < LONG_BODY:
        return read_document(content)
    return await asyncio.get_running_loop().run_in_executor(None, read_document, content)


def _answered(answer: Callable[[Request, float], Awaitable[Response]]) -> Endpoint:
    """Return an endpoint whose every end is an answer in OpenAI's shape."""

    async def endpoint(request: Request) -> Response:
        try:
            return await answer(request, request.scope["unimm.received"])
        except APIError as error:
            return error.response()
        except (ClientGone, ClientDisconnect):
            return Response(status_code=499)  # which nobody reads
        except Exception as error:
            write_failure("a request failed", error)
            return as_api_error(error).response()

    return endpoint


async def _refuse(_: Request, error: Exception) -> Response:
    """Answer what no route does."""
    assert isinstance(error, HTTPException)
    line = {404: "there is no such route; /docs has them", 405: "this route has another method"}
    return APIError(error.status_code, line.get(error.status_code, "refused")).response()


class _Watched:
    """Counts, times and logs what is answered.

    Args:
        app: what answers.
        service: whose requests they are.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope["unimm.received"] = received = time.monotonic()
        status = 499  # if nobody waits for the answer

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            with self.service.open_request():
                await self.app(scope, receive, answer)
        finally:
            seconds = time.monotonic() - received
            route = getattr(scope.get("route"), "path", "other")
            self.service.metrics.requests.labels(route, str(status)).inc()
            self.service.metrics.seconds.labels(route).observe(seconds)
            if route not in ("/health", "/metrics"):
                fields = scope.get("unimm.log") or {}
                write_log(
                    "request", id=scope.get("unimm.id"), method=scope["method"][:16], route=route, status=status,
                    seconds=round(seconds, 4), **fields,
                )  # fmt: skip
