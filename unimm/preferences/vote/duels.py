"""Votes on two drawings that `unimm serve` has just made, kept as those of `unimm preferences vote` are.

The server remembers the codes of what it drew under names that it gives out; a vote names two drawings of one prompt.
Only its own page may vote: besides what guards every route, a vote carries a token of this run, which pages elsewhere
cannot read.
"""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any, NamedTuple, cast

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from unimm.errors import UserError
from unimm.preferences.vote.booth import Refusal
from unimm.preferences.vote.pairs import PageSide, pair_of_drawings
from unimm.preferences.vote.server import read_vote
from unimm.preferences.vote.votes import Votes
from unimm.server.errors import APIError
from unimm.server.service import Service

REMEMBERED = 1024  # drawings that may be voted on; the oldest are forgotten


class RememberedDrawing(NamedTuple):
    """A drawing that may be voted on."""

    prompt: str
    codes: list[list[int]]


class Duels:
    """What may be voted on, and the votes.

    Args:
        votes: where they go.
        voter: who votes.
    """

    def __init__(self, votes: Votes, voter: str) -> None:
        self.votes, self.voter = votes, voter
        self.token = secrets.token_urlsafe(24)
        self._drawn: OrderedDict[str, RememberedDrawing] = OrderedDict()
        self._lock = threading.Lock()

    def remember(self, prompt: str, codes: list[list[int]]) -> str:
        """Keep a drawing for a vote; return its name."""
        name = secrets.token_hex(12)
        with self._lock:
            self._drawn[name] = RememberedDrawing(prompt, codes)
            if len(self._drawn) > REMEMBERED:
                self._drawn.popitem(last=False)
        return name

    def state(self) -> dict[str, Any]:
        """Return what the page shows: the token of votes, how many there are, where, and the last one's pair."""
        done, last = self.votes.view()
        return {"token": self.token, "votes": len(done), "last": last, "file": str(self.votes.path)}

    def vote(self, left: Any, right: Any, choice: Any) -> dict[str, Any]:
        """Keep a vote; `result` is `kept`, `already` if the pair was voted on before, or `equal`.

        Args:
            left: name of the drawing on the left.
            right: the other's.
            choice: `left`, `right` or `tie`.

        Raises:
            Refusal: there are no such drawings, they are of two prompts, or there is no such choice.
            UserError: the prompt cannot be learned from, or the file was changed by another program.
            OSError: the disk takes no more.
        """
        if choice not in ("left", "right", "tie"):
            raise Refusal(HTTPStatus.BAD_REQUEST, "choice: a vote is left, right or tie")
        one, other = self._drawing(left, "left"), self._drawing(right, "right")
        if one.prompt != other.prompt:
            raise Refusal(HTTPStatus.BAD_REQUEST, "right: drawn from another prompt than left")
        pair = pair_of_drawings(one.prompt, one.codes, other.codes, "prompt")
        if pair is None:
            return {"result": "equal", "pair": None, **self.state()}
        preference = None
        if choice != "tie":
            folder = self.votes.path.parent
            preference = pair.preference(cast(PageSide, choice), folder, folder, self.voter)
        kept = self.votes.add(pair.key, preference, self.voter)
        return {"result": "kept" if kept else "already", "pair": pair.key, **self.state()}

    def undo(self, pair: Any) -> dict[str, Any]:
        """Take the last vote back; `result` is `undone`, or `changed` if the last vote is on another pair."""
        undone = isinstance(pair, str) and self.votes.undo(pair)
        return {"result": "undone" if undone else "changed", **self.state()}

    def _drawing(self, name: Any, side: str) -> RememberedDrawing:
        with self._lock:
            found = self._drawn.get(name) if isinstance(name, str) else None
        if found is None:
            line = f"{side}: the server does not remember this drawing; draw two again"
            raise Refusal(HTTPStatus.NOT_FOUND, line)
        return found


def add_votes(app: FastAPI, service: Service, duels: Duels) -> None:
    """Let the server's page vote.

    Args:
        app: of the server.
        service: whose drawings are voted on.
        duels: keeps drawings and votes.
    """
    service.remember = duels.remember

    async def state(_: Request) -> Response:
        return _json(duels.state())

    async def vote(request: Request) -> Response:
        body = await read_vote(request, duels.token)
        sides = body.get("left"), body.get("right")
        return _json(await run_in_threadpool(duels.vote, *sides, body.get("choice")))

    async def undo(request: Request) -> Response:
        body = await read_vote(request, duels.token)
        return _json(await run_in_threadpool(duels.undo, body.get("pair")))

    for method, path, answer in (
        ("GET", "/votes", state),
        ("POST", "/votes", vote),
        ("POST", "/votes/undo", undo),
    ):
        app.add_api_route(
            path, _answered(answer), methods=[method], include_in_schema=False, response_model=None
        )


def _json(document: dict[str, Any]) -> Response:
    return JSONResponse(document, headers={"Cache-Control": "no-store"})


def _answered(answer: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """Return an endpoint whose refusals have the shape of the server's others."""

    async def endpoint(request: Request) -> Response:
        try:
            return await answer(request)
        except Refusal as error:
            return APIError(error.status, str(error), "vote_refused").response()
        except UserError as error:
            return APIError(409, str(error), "vote_refused").response()
        except OSError as error:
            return APIError(507, f"not kept: {error.strerror or error}", "vote_refused").response()
        except ClientDisconnect:
            return Response(status_code=499)  # which nobody reads

    return endpoint
