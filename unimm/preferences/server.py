"""The page on which a person votes, served to this machine alone by Python's own HTTP server.

Other web pages that the person has open must neither read nor vote: only requests that name this host are answered
(against DNS rebinding), and a vote carries a token of this run, which only our page can read (against forged
requests). Pictures are made here, from codes or from files inside the data's folder; what a URL says is looked up
among the pairs and never reaches the file system.
"""

from __future__ import annotations

import hmac
import io
import json
import secrets
import socketserver
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from PIL import Image

from unimm.errors import UserError
from unimm.images import read_image
from unimm.preferences.pairs import Ballot, Pair, Side
from unimm.preferences.votes import Votes
from unimm.training.preferences.data import check_codes

if TYPE_CHECKING:
    from unimm.pipeline import UniMM

ADDRESS = "127.0.0.1"
HOSTS = (ADDRESS, "localhost")
SHOWN = 1024  # longest side of a picture on the page, in pixels
LONGEST = 4096  # bytes of a request's body
PATIENCE = 60  # seconds that a silent connection is kept


class Refusal(Exception):
    """A request that is answered with an error: its status and a line for the person."""

    def __init__(self, status: HTTPStatus, line: str) -> None:
        super().__init__(line)
        self.status = status


# --- pictures ----------------------------------------------------------------------------------------------


class Pictures:
    """The pictures of a ballot, as PNG.

    Args:
        ballot: what is voted on.
        um: the model whose image tokenizer made the codes; None if there are none.
    """

    def __init__(self, ballot: Ballot, um: UniMM | None) -> None:
        self.ballot, self.um = ballot, um
        self._lock = threading.Lock()  # one decoding at a time

    def check(self, on_progress: Callable[[int, int], None] | None = None) -> None:
        """See that every picture can be shown, before anyone votes.

        Raises:
            UserError: naming line and file: a picture is outside the folder or unreadable, or codes are not the
                model's.
        """
        seen: set[str] = set()
        for done, pair in enumerate(self.ballot.pairs, start=1):
            for name in pair.images():
                if name not in seen:
                    seen.add(name)
                    self._read(name, pair.where)
            for side in (pair.left, pair.right):
                if side.codes is not None:
                    self._check_codes(side.codes, pair.where)
            if on_progress is not None:
                on_progress(done, len(self.ballot.pairs))

    def png(self, pair: Pair, place: str) -> bytes | None:
        """The picture at a place of a pair, `left`, `right` or the number of a part of the prompt; None: there is none.

        Raises:
            UserError: its file has become unreadable.
        """
        if place in ("left", "right"):
            answer = pair.left if place == "left" else pair.right
            if answer.codes is not None:
                return _png(self._decode(answer.codes))
            name = answer.image
        else:
            parts = {str(number): part.image for number, part in enumerate(pair.prompt.content)}
            name = parts.get(place)
        return None if name is None else _png(self._read(name, pair.where))

    def _read(self, name: str, where: str) -> Image.Image:
        """Read an image file that the data names, if it lies in the data's folder."""
        given = PurePosixPath(name)
        if given.is_absolute() or ".." in given.parts:
            raise UserError(
                f"{where}: {name}: outside the folder of {self.ballot.file.name}; put the picture there"
            )
        path = self.ballot.folder
        for part in given.parts:
            path = path / part
            if path.is_symlink():
                raise UserError(
                    f"{where}: {name}: {path} is a link, which may lead elsewhere; put a copy there"
                )
        if path.exists() and not path.is_file():
            raise UserError(f"{where}: {name}: not a file")
        return read_image(path, f"{where}: {name}")

    def _check_codes(self, codes: list[list[int]], where: str) -> None:
        assert self.um is not None
        generation, layout = self.um.model.config.generation_config(), self.um.processor.layout
        if generation is None or self.um.model.image_tokenizer is None:
            raise UserError(
                f"{where}: drawings, but this model cannot draw; give --model with the one that drew them"
            )
        grid = None if layout.shared else (layout.grid[0], layout.grid[1])
        check_codes(codes, generation.codes, grid, where)

    def _decode(self, codes: list[list[int]]) -> Image.Image:
        import torch

        from unimm.preferences.scorers import to_pictures

        assert self.um is not None
        with self._lock:
            return to_pictures(self.um, torch.tensor([codes]))[0]


def _png(image: Image.Image) -> bytes:
    """A picture as PNG, made smaller where it is larger than a page shows."""
    image.thumbnail((SHOWN, SHOWN))
    buffer = io.BytesIO()
    image.save(buffer, "png", compress_level=1)
    return buffer.getvalue()


# --- voting ------------------------------------------------------------------------------------------------


class Booth:
    """What the page asks for and does: the pair to vote on, a vote, an undoing.

    Args:
        ballot: what is voted on.
        votes: where votes go; those that it holds are of these pairs.
        pictures: of the ballot.
        voter: who votes.
    """

    def __init__(self, ballot: Ballot, votes: Votes, pictures: Pictures, voter: str) -> None:
        self.ballot, self.votes, self.pictures, self.voter = ballot, votes, pictures, voter
        self.token = secrets.token_urlsafe(24)
        self.run = secrets.token_hex(6)  # in the pictures' addresses, so that no other run's are shown
        self.pairs = {pair.key: pair for pair in ballot.pairs}

    def state(self) -> dict[str, Any]:
        """What the page shows: the first pair without a vote, and the one after it to be fetched ahead."""
        done, last = self.votes.view()
        waiting = (pair for pair in self.ballot.pairs if pair.key not in done)
        return {
            "pair": self._shown(next(waiting, None)),
            "next": self._shown(next(waiting, None)),
            "done": len(done),
            "total": len(self.ballot.pairs),
            "last": last,
            "file": str(self.votes.path),
        }

    def vote(self, key: Any, choice: Any) -> dict[str, Any]:
        """Keep a vote; `result` is `kept`, or `already` if the pair was voted on before.

        Args:
            key: of the pair.
            choice: `left`, `right` or `tie`.
        """
        pair = self.pairs.get(key) if isinstance(key, str) else None
        if pair is None:
            raise Refusal(HTTPStatus.NOT_FOUND, "there is no such pair; reload the page")
        if choice not in ("left", "right", "tie"):
            raise Refusal(HTTPStatus.BAD_REQUEST, "a vote is left, right or tie")
        preference = None
        if choice != "tie":
            folders = self.ballot.folder, self.votes.path.parent
            preference = pair.preference(cast(Side, choice), *folders, self.voter)
        kept = self.votes.add(pair.key, preference, self.voter)
        return {"result": "kept" if kept else "already", **self.state()}

    def undo(self, key: Any) -> dict[str, Any]:
        """Take the last vote back; `result` is `undone`, or `changed` if the last vote is not on the pair `key`."""
        undone = isinstance(key, str) and self.votes.undo(key)
        return {"result": "undone" if undone else "changed", **self.state()}

    def picture(self, run: str, key: str, place: str) -> bytes | None:
        """A picture by the parts of its address; None: there is none."""
        pair = self.pairs.get(key)
        return self.pictures.png(pair, place) if pair is not None and run == self.run else None

    def _shown(self, pair: Pair | None) -> dict[str, Any] | None:
        if pair is None:
            return None

        def shown(text: str | None, place: str) -> dict[str, str]:
            return (
                {"text": text} if text is not None else {"picture": f"/picture/{self.run}/{pair.key}/{place}"}
            )

        prompt = [shown(part.text, str(number)) for number, part in enumerate(pair.prompt.content)]
        sides = {"left": shown(pair.left.text, "left"), "right": shown(pair.right.text, "right")}
        return {"key": pair.key, "prompt": prompt, **sides}


# --- HTTP --------------------------------------------------------------------------------------------------


class VoteServer(ThreadingHTTPServer):
    """Listens on this machine from the moment it is made; answers once `serve` is called.

    Args:
        port: 0 takes any that is free.

    Raises:
        UserError: the port is taken.
    """

    daemon_threads = True

    def __init__(self, port: int) -> None:
        self.booth: Booth | None = None
        self.page = resources.files("unimm.preferences").joinpath("vote.html").read_text(encoding="utf-8")
        try:
            super().__init__((ADDRESS, port), Handler)
        except (OSError, OverflowError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or "no such port"
            raise UserError(f"port {port}: {reason.lower()}; give another, or --port 0 for any") from None

    def server_bind(self) -> None:
        """Bind without asking a name server who we are."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{ADDRESS}:{self.server_port}/"

    def serve(self, booth: Booth) -> None:
        """Answer until interrupted."""
        self.booth = booth
        self.serve_forever(poll_interval=0.2)


class Handler(BaseHTTPRequestHandler):
    """One connection of a browser."""

    protocol_version = "HTTP/1.1"
    server_version = "unimm"
    sys_version = ""
    timeout = PATIENCE
    disable_nagle_algorithm = True  # a body follows its headers at once

    @property
    def booth(self) -> Booth:
        """What the server serves."""
        booth = cast(VoteServer, self.server).booth
        assert booth is not None
        return booth

    def do_GET(self) -> None:
        """The page, what it shows, and pictures."""
        self._answer(self._get)

    def do_POST(self) -> None:
        """A vote or an undoing."""
        self._answer(self._post)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing: the terminal is for the person."""

    def _answer(self, act: Callable[[], None]) -> None:
        try:
            self._check_host()
            act()
        except Refusal as refusal:
            self._refuse(refusal.status, str(refusal))
        except (BrokenPipeError, ConnectionResetError, TimeoutError):
            self.close_connection = True  # the browser has gone
        except UserError as error:
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, str(error))
        except OSError as error:
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, f"not kept: {error.strerror or error}")

    def _get(self) -> None:
        match urlsplit(self.path).path.split("/")[1:]:
            case [""]:
                self._send_page()
            case ["state"]:
                self._send_json(HTTPStatus.OK, self.booth.state())
            case ["picture", run, key, place]:
                png = self.booth.picture(run, key, place)
                if png is None:
                    raise Refusal(HTTPStatus.NOT_FOUND, "there is no such picture")
                self._send(
                    HTTPStatus.OK, "image/png", png, {"Cache-Control": "private, max-age=86400, immutable"}
                )
            case _:
                raise Refusal(HTTPStatus.NOT_FOUND, "there is no such page")

    def _post(self) -> None:
        body = self._body()
        match urlsplit(self.path).path:
            case "/vote":
                self._send_json(HTTPStatus.OK, self.booth.vote(body.get("pair"), body.get("choice")))
            case "/undo":
                self._send_json(HTTPStatus.OK, self.booth.undo(body.get("pair")))
            case _:
                raise Refusal(HTTPStatus.NOT_FOUND, "there is no such page")

    def _check_host(self) -> None:
        """Refuse what was sent to another name: a foreign page whose name leads here."""
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or hosts[0].partition(":")[0] not in HOSTS:
            raise Refusal(
                HTTPStatus.MISDIRECTED_REQUEST, f"open http://{ADDRESS} or http://localhost instead"
            )

    def _body(self) -> dict[str, Any]:
        """Read the JSON object of a request that comes from our page."""
        origin, token = self.headers.get("Origin"), self.headers.get("X-Token", "")
        if origin is not None and origin != f"http://{self.headers['Host']}":
            raise Refusal(HTTPStatus.FORBIDDEN, "votes are taken from this page alone")
        if not hmac.compare_digest(token.encode(), self.booth.token.encode()):
            raise Refusal(HTTPStatus.FORBIDDEN, "the page is of an earlier run; reload it")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > LONGEST:
            raise Refusal(HTTPStatus.BAD_REQUEST, "a vote is a few bytes long")
        try:
            body = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            raise Refusal(HTTPStatus.BAD_REQUEST, "a vote is a JSON object") from None
        if not isinstance(body, dict):
            raise Refusal(HTTPStatus.BAD_REQUEST, "a vote is a JSON object")
        return body

    def _send_page(self) -> None:
        nonce = secrets.token_urlsafe(16)
        page = (
            cast(VoteServer, self.server).page.replace("{nonce}", nonce).replace("{token}", self.booth.token)
        )
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src 'self' data:; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        headers = {"Content-Security-Policy": policy, "Cache-Control": "no-store"}
        self._send(HTTPStatus.OK, "text/html; charset=utf-8", page.encode(), headers)

    def _send_json(self, status: HTTPStatus, document: dict[str, Any]) -> None:
        self._send(status, "application/json", json.dumps(document).encode(), {"Cache-Control": "no-store"})

    def _refuse(self, status: HTTPStatus, line: str) -> None:
        self.close_connection = True  # what the request had more to say was not read
        self._send_json(status, {"error": line})

    def _send(self, status: HTTPStatus, kind: str, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        fixed = {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
        }
        for name, value in {**fixed, **headers}.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)
