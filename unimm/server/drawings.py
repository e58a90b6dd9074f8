"""`POST /v1/images/generations` and `/v1/images/edits`: drawings, whole or row by row.

What a stream shows of a drawing that is not done is what the image tokenizer makes of its whole rows of codes, above a
flat grey. The tokenizer looks around each code, so rows change a little while those below them come; the last event
has the image itself.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, Literal

import torch
from PIL import Image
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response

from unimm.images import as_size
from unimm.models.layout import Grid
from unimm.sampling.arguments import grid_of
from unimm.sampling.drawing import drawing_requests
from unimm.sampling.requests import DrawingRequest, Request, Ticket, filters_of
from unimm.sampling.sampler import NoiseKey
from unimm.server.errors import APIError
from unimm.server.events import Event, event_stream
from unimm.server.schemas import ImageRequest
from unimm.server.seeds import consecutive_seeds
from unimm.server.service import Service, until_gone
from unimm.server.worker import Job

EMPTY = (128, 128, 128)  # what is not drawn yet
RouteKind = Literal["image_generation", "image_edit"]
ReadImages = Callable[[], Sequence[Image.Image]]


def image_requests(
    service: Service, asked: ImageRequest, images: ReadImages, seeds: Sequence[int]
) -> list[Request]:
    """Return what the engine is asked for: a request for each drawing.

    Args:
        service: with the model.
        asked: what is asked for.
        images: reads those that come before the prompt.
        seeds: of the drawings.

    Raises:
        UserError: the model does not draw, or the prompt or an option makes no sense.
        APIError: the model does not draw or cannot look at images, or an image may not be read.
    """
    um, processor = service.um, service.processor
    if processor.drawing_size is None:
        raise APIError(422, "this model cannot draw", "not_supported")
    sampling = um.model.config.sampling_config().updated(
        guidance_scale=asked.guidance_scale,
        temperature=asked.temperature,
        top_k=asked.top_k,
        top_p=asked.top_p,
    )
    filters_of(sampling)
    grid = grid_of(um.model, processor, as_size(None if asked.size in (None, "auto") else asked.size))
    shown = list(images())
    keys = [NoiseKey(seed) for seed in seeds]
    made = list(
        drawing_requests(processor, [asked.prompt] * len(keys), [shown] * len(keys), keys, sampling, grid)
    )
    if asked.negative_prompt is not None:
        if sampling.guidance_scale == 1:
            raise APIError(
                400, "negative_prompt: has no effect at guidance_scale 1", "invalid_value", "negative_prompt"
            )
        away = processor.drawing_ids(asked.negative_prompt, grid)
        for request in made:
            request.unconditional = away
    return list(made)


async def begin_drawing(
    service: Service,
    request: HTTPRequest,
    asked: ImageRequest,
    received: float,
    kind: RouteKind = "image_generation",
    images: ReadImages = tuple,
) -> Drawings:
    """Have drawings made.

    Args:
        service: with the model.
        request: of the client.
        asked: what it asks for.
        received: when it came.
        kind: how its events are called.
        images: reads those that the drawings start from.

    Raises:
        APIError: it is refused.
        ClientGone: nobody waits for it any more.
    """
    service.check_model(asked.model)
    with service.admitted(asked.count):
        seeds = consecutive_seeds(asked.seed, asked.count)
        prepared = service.prepare(
            lambda: image_requests(service, asked, images, seeds), received, bool(asked.stream)
        )
        jobs = await until_gone(request, prepared)
    return Drawings(service, asked, jobs, seeds, kind, received)


class Drawings:
    """Drawings in OpenAI's shape.

    Args:
        service: with the model.
        asked: the request.
        jobs: one for each drawing.
        seeds: their seeds.
        kind: how its events are called.
        received: when the request came.
    """

    def __init__(
        self,
        service: Service,
        asked: ImageRequest,
        jobs: Sequence[Job],
        seeds: Sequence[int],
        kind: RouteKind,
        received: float,
    ) -> None:
        self.service, self.asked, self.jobs, self.seeds = service, asked, jobs, seeds
        self.kind, self.received = kind, received
        self.um = service.um
        self.created = int(time.time())
        self.ids: dict[int, str] = {}  # of drawings that are remembered
        request = jobs[0].request
        assert isinstance(request, DrawingRequest)
        self.grid = request.grid
        stride = self.um.processor.stride
        self.size = f"{self.grid[1] * stride}x{self.grid[0] * stride}"

    async def respond(self, request: HTTPRequest) -> Response:
        """Return the response: a stream, or all of it at once.

        Raises:
            APIError: a drawing failed.
            ClientGone: nobody waits for it any more.
        """
        service, jobs = self.service, self.jobs
        if self.asked.stream:
            return event_stream(service, jobs, self.stream(), self.received)
        try:
            with service.timed(jobs, self.received):
                made = asyncio.gather(*(self.image(number) for number in range(len(jobs))))
                found = await until_gone(request, made)
        finally:
            service.leave(jobs)
        request.scope["unimm.log"] = self.log([ticket for ticket, _ in found])
        return JSONResponse(self.whole(found))

    async def image(self, number: int) -> tuple[Ticket, str]:
        """Wait for a drawing; return its ticket, and the image in base64.

        Raises:
            APIError: it failed.
        """
        ticket = await self.jobs[number].finish()
        assert ticket.codes is not None
        if self.service.remember is not None and self.kind == "image_generation":
            self.ids[number] = self.service.remember(self.asked.prompt, ticket.codes.tolist())
        return ticket, await self._rendered(ticket.codes.flatten().tolist())

    async def _rendered(self, codes: list[int]) -> str:
        asked = self.asked
        shown = self.service.worker.between_steps(lambda: shown_rows(self.um, codes, self.grid))
        image = await asyncio.wrap_future(shown)
        return await self.service.render(lambda: encoded(image, asked.format, asked.output_compression))

    def whole(self, found: Sequence[tuple[Ticket, str]]) -> dict[str, Any]:
        """Return all drawings at once."""
        data = [
            {**self._carried(image), "seed": seed, **self._named(number)}
            for number, ((_, image), seed) in enumerate(zip(found, self.seeds, strict=True))
        ]
        tickets = [ticket for ticket, _ in found]
        return {"created": self.created, "data": data, **self._described(), "usage": self._usage(tickets)}

    async def stream(self) -> AsyncGenerator[Event, None]:
        """Yield the rows of all drawings as they come, then each image.

        Raises:
            APIError: one failed.
        """
        rows = self.grid[0]
        wanted = _rows_shown(rows, self.asked.partial_images)
        sent = [0] * len(self.jobs)  # events of each
        tickets: list[Ticket] = []
        waiting = {asyncio.ensure_future(job.wait()): number for number, job in enumerate(self.jobs)}
        try:
            while waiting:
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for future in sorted(done, key=lambda one: waiting[one]):
                    number = waiting.pop(future)
                    future.result()
                    job = self.jobs[number]
                    ended = job.done
                    drawn = len(job.codes) // self.grid[1]
                    while sent[number] < len(wanted) and wanted[sent[number]] <= drawn:
                        yield await self._partial(number, wanted[sent[number]], sent[number])
                        sent[number] += 1
                    if not ended:
                        waiting[asyncio.ensure_future(job.wait())] = number
                        continue
                    ticket, image = await self.image(number)
                    tickets.append(ticket)
                    log = self.log(tickets) if len(tickets) == len(self.jobs) else None
                    fields = {"usage": self._usage([ticket]), **self._named(number)}
                    yield self._event("completed", number, {**self._carried(image), **fields}, log)
        finally:
            for future in waiting:
                future.cancel()

    async def _partial(self, number: int, rows: int, index: int) -> Event:
        """Return the event that shows so many rows of a drawing."""
        codes = self.jobs[number].codes[: rows * self.grid[1]]
        image = await self._rendered(codes)
        shown = {"partial_image_index": index, "rows_drawn": rows, "rows": self.grid[0]}
        return self._event("partial_image", number, {**self._carried(image), **shown})

    def _event(
        self, name: str, number: int, fields: dict[str, Any], log: dict[str, Any] | None = None
    ) -> Event:
        kind = f"{self.kind}.{name}"
        head = {"type": kind, "created_at": self.created, "index": number, "seed": self.seeds[number]}
        return Event(json.dumps({**head, **self._described(), **fields}), kind, log)

    def _described(self) -> dict[str, str]:
        described = {"background": "opaque", "size": self.size, "quality": "auto"}
        return {**described, "output_format": self.asked.format.lower()}

    def _usage(self, tickets: Sequence[Ticket]) -> dict[str, Any]:
        """Return the numbers of tokens and codes; drawings of one request share their prompt."""
        ids, feature = self.jobs[0].request.ids, self.um.processor.layout.feature
        images, codes = ids.count(feature), len(tickets) * self.grid[0] * self.grid[1]
        return {
            "input_tokens": len(ids),
            "output_tokens": codes,
            "total_tokens": len(ids) + codes,
            "input_tokens_details": {"text_tokens": len(ids) - images, "image_tokens": images},
        }

    def _named(self, number: int) -> dict[str, str]:
        """Return the name by which votes know a drawing, if the server remembers it."""
        return {"id": self.ids[number]} if number in self.ids else {}

    def _carried(self, image: str) -> dict[str, str]:
        """Return an image as it was asked for: by its bytes, or at a `data:` URL."""
        if self.asked.response_format == "url":
            return {"url": f"data:image/{self.asked.format.lower()};base64,{image}"}
        return {"b64_json": image}

    def log(self, tickets: Sequence[Ticket]) -> dict[str, Any]:
        """Return what the log says of it."""
        line: dict[str, Any] = {"images": len(tickets), "size": self.size}
        if self.service.settings.log_words:
            line |= {"words": [self.asked.prompt], "seeds": list(self.seeds)}
        return line


def shown_rows(um: Any, codes: Sequence[int], grid: Grid) -> Image.Image:
    """Return the image of the whole rows of codes, with grey in the place of those that are missing.

    Args:
        um: the model (`UniMM`).
        codes: whole rows, all of them or the first.
        grid: rows and columns of the drawing.
    """
    rows, columns = grid
    drawn = len(codes) // columns
    image: Image.Image = um.decode_codes(torch.tensor(codes, device=um.device).view(1, drawn, columns))[0]
    if drawn == rows:
        return image
    whole = Image.new("RGB", (image.width, image.height // drawn * rows), EMPTY)
    whole.paste(image, (0, 0))
    return whole


def encoded(image: Image.Image, form: str, quality: int | None) -> str:
    """Return an image's file in base64.

    Args:
        image: the image.
        form: PNG, JPEG or WEBP.
        quality: of JPEG and WebP, 0 to 100.
    """
    buffer = io.BytesIO()
    options = {} if quality is None or form == "PNG" else {"quality": quality}
    image.save(buffer, form, **options)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _rows_shown(rows: int, partial_images: int | None) -> list[int]:
    """Return after which rows a drawing is shown: after each but the last, or so many of these, spread evenly."""
    count = rows - 1 if partial_images is None else min(partial_images, rows - 1)
    return sorted({max(1, min(rows - 1, round(rows * (i + 1) / (count + 1)))) for i in range(count)})
