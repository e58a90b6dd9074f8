"""`POST /v1/chat/completions`: conversations with images, whole or piece by piece."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response

from unimm.sampling.grammar import try_grammar
from unimm.sampling.requests import Request, TextRequest, TextSampling, Ticket
from unimm.sampling.sampler import NoiseKey
from unimm.server.events import Event, event_stream
from unimm.server.schemas import ChatRequest
from unimm.server.seeds import consecutive_seeds
from unimm.server.service import Service, until_gone
from unimm.server.worker import Job


def chat_requests(service: Service, asked: ChatRequest) -> list[Request]:
    """Return what the engine is asked for: a request for each of the answers, whose seeds follow one another.

    Raises:
        UserError: the messages or an option make no sense.
        APIError: an image may not be read, or is none.
    """
    processor = service.processor
    sampling = TextSampling.of(
        {
            "temperature": asked.temperature,
            "top_p": asked.top_p,
            "top_k": asked.top_k,
            "repetition_penalty": asked.repetition_penalty,
            "stop": asked.stop,
            "json_schema": asked.response_format.schema_text if asked.response_format else None,
            "regex": asked.regex,
        },
        _most_tokens(asked.most_tokens, service.settings.max_tokens),
    )
    if sampling.grammar is not None:
        vocabulary = service.um.model.decoder.config.get_text_config().vocab_size
        try_grammar(sampling.grammar, processor.tokenizer, processor.end_tokens, vocabulary)
    ids, seen = processor.chat(_messages(service, asked))
    return [
        TextRequest(list(ids), seen, NoiseKey(seed), sampling=sampling, remember=True)
        for seed in consecutive_seeds(asked.seed, asked.count)
    ]


def _most_tokens(asked: int | None, limit: int | None) -> int | None:
    """Return the bound on an answer's length: the client's, but no more than the server's."""
    bounds = [bound for bound in (asked, limit) if bound is not None]
    return min(bounds, default=None)


def _messages(service: Service, asked: ChatRequest) -> list[dict[str, Any]]:
    """Return the messages with their images read, as `UniMM.chat` takes them; videos are read as they are looked at."""
    parts = [part for message in asked.messages for part in message.content]
    images, videos = (sum(bool(getattr(part, kind)) for part in parts) for kind in ("image_url", "video_url"))
    service.images.check_count(images, videos, "messages")
    if images:
        service.processor.check_understands()
    if videos:
        service.processor.check_understands_videos()
    messages: list[dict[str, Any]] = []
    for number, message in enumerate(asked.messages):
        content: list[dict[str, Any]] = []
        for place, part in enumerate(message.content):
            where = f"messages[{number}].content[{place}].{part.type}"
            if part.image_url is not None:
                content.append({"type": "image", "image": service.images.at(part.image_url.url, where)})
            elif part.video_url is not None:
                content.append({"type": "video", "video": service.images.video(part.video_url, where)})
            else:
                content.append({"type": "text", "text": part.text})
        messages.append({"role": message.role, "content": content})
    return messages


async def begin_chat(
    service: Service, request: HTTPRequest, asked: ChatRequest, received: float
) -> ChatAnswer:
    """Have a conversation answered.

    Args:
        service: with the model.
        request: of the client.
        asked: what it asks for; its messages are let go once they are read, unless they are to be logged.
        received: when it came.

    Raises:
        APIError: it is refused.
        ClientGone: nobody waits for it any more.
    """
    service.check_model(asked.model)
    with service.admitted(asked.count):
        prepared = service.prepare(lambda: chat_requests(service, asked), received, bool(asked.stream))
        jobs = await until_gone(request, prepared)
    if not service.settings.log_words:
        asked.messages = []
    return ChatAnswer(service, asked, jobs, received)


class ChatAnswer:
    """Answers in OpenAI's shape.

    Args:
        service: with the model.
        asked: the request.
        jobs: one for each answer.
        received: when the request came.
    """

    def __init__(self, service: Service, asked: ChatRequest, jobs: Sequence[Job], received: float) -> None:
        self.service, self.asked, self.jobs, self.received = service, asked, jobs, received
        self.head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": service.settings.model_name,
            "system_fingerprint": None,
        }

    async def respond(self, request: HTTPRequest) -> Response:
        """Return the response: a stream, or all of it at once.

        Raises:
            APIError: an answer failed.
            ClientGone: nobody waits for it any more.
        """
        service, jobs = self.service, self.jobs
        if self.asked.stream:
            return event_stream(service, jobs, self.stream(), self.received)
        try:
            with service.timed(jobs, self.received):
                tickets = await until_gone(request, asyncio.gather(*(job.finish() for job in jobs)))
        finally:
            service.leave(jobs)
        request.scope["unimm.log"] = self.log(tickets)
        return JSONResponse(self.whole(tickets))

    def whole(self, tickets: Sequence[Ticket]) -> dict[str, Any]:
        """Return all answers at once."""
        choices = [
            {
                "index": number,
                "message": {"role": "assistant", "content": ticket.text, "refusal": None},
                "finish_reason": ticket.finish_reason,
                "logprobs": None,
            }
            for number, ticket in enumerate(tickets)
        ]
        return {**self.head, "object": "chat.completion", "choices": choices, "usage": usage_of(tickets)}

    async def stream(self) -> AsyncGenerator[Event, None]:
        """Yield the pieces of all answers as they come.

        Raises:
            APIError: one failed.
        """
        tickets: list[Ticket] = []
        for number in range(len(self.jobs)):
            yield self._chunk(number, {"role": "assistant", "content": "", "refusal": None})
        async for number, piece in _pieces(self.jobs):
            if piece:
                yield self._chunk(number, {"content": piece})
            else:
                tickets.append(await self.jobs[number].finish())
                yield self._chunk(number, {}, tickets[-1].finish_reason)
        if self.asked.include_usage:
            document = {
                **self.head,
                "object": "chat.completion.chunk",
                "choices": [],
                "usage": usage_of(tickets),
            }
            yield Event(json.dumps(document))
        yield Event("[DONE]", log=self.log(tickets))

    def _chunk(self, number: int, delta: dict[str, Any], finish_reason: str | None = None) -> Event:
        choice = {"index": number, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        document = {**self.head, "object": "chat.completion.chunk", "choices": [choice]}
        if self.asked.include_usage:
            document["usage"] = None
        return Event(json.dumps(document))

    def log(self, tickets: Sequence[Ticket]) -> dict[str, Any]:
        """Return what the log says of it."""
        usage = usage_of(tickets)
        line = {name: usage[name] for name in ("prompt_tokens", "completion_tokens")}
        line["finish_reasons"] = [ticket.finish_reason for ticket in tickets]
        if self.service.settings.log_words:
            said = [part.text for message in self.asked.messages for part in message.content if part.text]
            line |= {"words": said, "answers": [ticket.text for ticket in tickets]}
        return line


async def _pieces(jobs: Sequence[Job]) -> AsyncIterator[tuple[int, str]]:
    """Yield the pieces of several answers as they come, with the number of each answer; an empty one is its end.

    The pieces of an answer make up its text, without the space around it.
    """
    left = [""] * len(jobs)
    begun = [False] * len(jobs)
    waiting = {asyncio.ensure_future(job.wait()): number for number, job in enumerate(jobs)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for future in sorted(done, key=lambda one: waiting[one]):
                number = waiting.pop(future)
                future.result()
                job = jobs[number]
                ended = job.done
                text = left[number] + job.take_text()
                text = text if begun[number] else text.lstrip()
                piece = text.rstrip()
                left[number] = "" if ended else text[len(piece) :]
                if piece:
                    begun[number] = True
                    yield number, piece
                if ended:
                    yield number, ""
                else:
                    waiting[asyncio.ensure_future(job.wait())] = number
    finally:
        for future in waiting:
            future.cancel()


def usage_of(tickets: Sequence[Ticket]) -> dict[str, Any]:
    """Return the numbers of tokens; answers to one prompt share it."""
    prompt = max((ticket.prompt_tokens for ticket in tickets), default=0)
    cached = max((ticket.cached_tokens for ticket in tickets), default=0)
    completion = sum(len(ticket.ids) for ticket in tickets)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
