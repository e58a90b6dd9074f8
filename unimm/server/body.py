"""The body of a request, read within bounds and parsed as strangers' JSON or form.

Everything is held in memory and counted against one budget for all requests, so that nothing a client sends touches the
disk or fills the machine.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import Any

from python_multipart.multipart import parse_options_header
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from unimm.documents import check_document, dotted, parse_json
from unimm.errors import UserError
from unimm.server.errors import APIError

MAX_VALUES = 20_000  # values in a document; a conversation has a few hundred
MAX_FIELDS = 100  # of a form
BODIES_HELD = 8  # bodies of the largest size that are held at once


class BodyReader:
    """Reads bodies.

    Args:
        max_body: bytes of one.
    """

    def __init__(self, max_body: int) -> None:
        self.max_body = max_body
        self._held = 0

    @contextmanager
    def read_later(self) -> Iterator[Body]:
        """Give a body that is counted until the block ends."""
        body = Body(self)
        try:
            yield body
        finally:
            self._held -= body.counted

    def take(self, count: int) -> None:
        """Count bytes that are held.

        Raises:
            APIError: all requests together hold too much.
        """
        if self._held + count > BODIES_HELD * self.max_body:
            raise APIError(503, "too much is being sent at once; try again", "overloaded", retry_after=1)
        self._held += count


class Body:
    """One body.

    Attributes:
        counted: bytes that are held.
    """

    def __init__(self, reader: BodyReader) -> None:
        self.reader, self.counted = reader, 0

    async def content(self, request: Request) -> bytes:
        """Return it as bytes.

        Raises:
            APIError: it is too long, or encoded.
        """
        encoding = request.headers.get("content-encoding", "identity").strip().lower()
        if encoding != "identity":
            raise APIError(415, "Content-Encoding: send the body as it is, without compression")
        limit = self.reader.max_body
        too_long = APIError(
            413, f"the request is larger than {limit:,} bytes; send smaller images", "too_large"
        )
        if int(request.headers.get("content-length", 0)) > limit:  # h11 has seen to its form
            raise too_long
        content = bytearray()
        async for piece in request.stream():
            if len(content) + len(piece) > limit:
                raise too_long
            self.reader.take(len(piece))
            self.counted += len(piece)
            content += piece
        return bytes(content)


def media_type(request: Request) -> str:
    """Return the type of a request's body."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def read_document(content: bytes) -> dict[str, Any]:
    """Return the JSON object of a body.

    Raises:
        APIError: it is none, too deep, too large, or holds a number or text that is none.
    """
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise APIError(400, f"the body is no UTF-8 (byte {error.start})", "invalid_json") from None
    try:
        document = parse_json(text, "the body")
        check_document(document, "the body", MAX_VALUES)
    except UserError as error:
        raise APIError(400, str(error), "invalid_json") from None
    if not isinstance(document, dict):
        kind = type(document).__name__
        raise APIError(400, f"the body is a {kind}; send a JSON object", "invalid_json")
    check_texts(document)
    return document


def check_texts(document: Any) -> None:
    """Refuse texts that no file or terminal could hold.

    Raises:
        APIError: a text holds half of a surrogate pair.
    """
    waiting: list[tuple[Any, tuple[str | int, ...]]] = [(document, ())]
    while waiting:
        node, place = waiting.pop()
        if isinstance(node, dict):
            waiting += [(key, (*place, "a key")) for key in node]
            waiting += [(part, (*place, key)) for key, part in node.items()]
        elif isinstance(node, list):
            waiting += [(part, (*place, number)) for number, part in enumerate(node)]
        elif isinstance(node, str) and not _is_unicode(node):
            where = dotted(place)
            raise APIError(
                400, f"{where}: half of a surrogate pair, which is no character", "invalid_json", where
            )


def _is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8; of megabytes too, without a loop."""
    try:
        text.encode()
        return True
    except UnicodeEncodeError:
        return False


async def read_multipart(
    request: Request, content: bytes, max_files: int
) -> tuple[dict[str, Any], list[tuple[str, bytes]]]:
    """Return the fields and the files of a multipart form.

    Args:
        request: whose headers say where parts end.
        content: its body.
        max_files: files that it may have.

    Returns:
        The fields, and each file's field and bytes.

    Raises:
        APIError: it is no form, or has too many fields or files, or a field twice.
    """
    _, options = parse_options_header(request.headers.get("content-type", ""))
    if not options.get(b"boundary"):
        raise APIError(400, "Content-Type: a multipart form without its boundary", "invalid_form")

    async def once() -> AsyncGenerator[bytes, None]:
        yield content
        yield b""

    parser = MultiPartParser(
        request.headers, once(), max_files=max_files, max_fields=MAX_FIELDS, max_part_size=len(content) + 1
    )
    parser.spool_max_size = len(content) + 1  # in memory, never on disk
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise APIError(400, f"the form cannot be read: {error.message}", "invalid_form") from None
    except Exception as error:  # of the parser, on bytes that are no form
        raise APIError(400, f"the form cannot be read ({type(error).__name__})", "invalid_form") from None
    fields: dict[str, Any] = {}
    files: list[tuple[str, bytes]] = []
    for name, value in form.multi_items():
        if not isinstance(value, str):
            files.append((name.removesuffix("[]"), value.file.read()))
        elif name in fields:
            raise APIError(400, f"{name}: given twice", "invalid_form", name)
        else:
            fields[name] = value
    check_texts(fields)
    return fields, files


def form_value(text: str) -> Any:
    """Return the value of a form's field that is no text: a number, true or false, or the text where it is none."""
    try:
        return json.loads(text, parse_constant=str) if len(text) <= 40 else text
    except (ValueError, RecursionError):
        return text
