"""Turns of a conversation, however they are written, as messages with each image in its place."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from unimm.data.sources.text import clean, clip
from unimm.errors import UserError
from unimm.processing.messages import Blob, ImagePart, Message, Part, Role

Find = Callable[[Any], Blob]
_PLACEHOLDER = "<image>"
ROLE_NAMES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
SAID = (("role", "content"), ("from", "value"))  # keys of a turn
TEXT_TYPES, IMAGE_TYPES = ("text", "input_text", "output_text"), ("image", "image_url", "input_image")
_OUTER_PLACEHOLDERS = re.compile(rf"^(?:\s*{_PLACEHOLDER})+|(?:{_PLACEHOLDER}\s*)+$")


class Turn(NamedTuple):
    """A turn as a row has it: who, what (a text with placeholders, or a list of parts), and what errors call it."""

    role: Role
    content: Any
    where: str


def read_turns(value: Any, name: str) -> list[Turn]:
    """The turns of a column.

    They are `{"role", "content"}`, `{"from", "value"}` or `{"user", "assistant"}`, in a list; a list that is written
    as JSON, and an object of lists (as tables store it), are taken for such a list.

    Raises:
        UserError: they are not.
    """
    turns = _rows(value)
    if not turns:
        raise UserError(f"{name}: expected a list of turns")
    found: list[Turn] = []
    for position, turn in enumerate(turns):
        where = f"{name}[{position}]"
        if isinstance(turn, Mapping) and turn.get("user") is not None and turn.get("assistant") is not None:
            found.append(Turn("user", turn["user"], f"{where}.user"))
            found.append(Turn("assistant", turn["assistant"], f"{where}.assistant"))
            continue
        keys = next((keys for keys in SAID if isinstance(turn, Mapping) and {*keys} <= turn.keys()), None)
        if keys is None:
            expected = {"conversations": SAID[1], "texts": ("user", "assistant")}.get(name, SAID[0])
            raise UserError(f"{where}: expected {expected[0]} and {expected[1]}")
        role = ROLE_NAMES.get(str(turn[keys[0]]).lower())
        if role is None:
            known = "system, user (human), assistant (gpt)"
            raise UserError(f"{where}.{keys[0]}: {clip(repr(turn[keys[0]]))} is none of {known}")
        found.append(Turn(role, turn[keys[1]], f"{where}.{keys[1]}"))
    return found


def _rows(value: Any) -> list[Any]:
    """What may be a list of turns, as one."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return []
    if isinstance(value, Mapping) and value and all(isinstance(column, list) for column in value.values()):
        columns = list(value.values())
        if len({len(column) for column in columns}) == 1:
            value = [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
    return value if isinstance(value, list) else []


def write_messages(turns: Sequence[Turn], listed: Sequence[Any], find: Find) -> list[Message]:
    """Turns as messages, the row's images at their placeholders, else before the user's first words.

    Args:
        turns: in their order; neighbours of one role become one message.
        listed: what the row says of its images.
        find: makes a `Blob` of that.

    Raises:
        UserError: a turn is empty or holds something else, or placeholders and images do not match.
    """
    images = iter(listed)
    messages: list[tuple[Role, list[Part]]] = []
    placed = False
    for turn in turns:
        parts = list(_parts(turn, images, find))
        if not any(isinstance(part, ImagePart) or part.strip() for part in parts):
            raise UserError(f"{turn.where}: empty")
        placed = placed or any(isinstance(part, ImagePart) for part in parts)
        if messages and messages[-1][0] == turn.role:
            messages[-1][1].extend(parts)
        else:
            messages.append((turn.role, parts))
    left = list(images)
    if left and not (placed and len(left) == len(listed)):  # else the parts name their own
        _place_unmarked(messages, listed, left, find)
    return [Message(role, tuple(tidy(parts, role))) for role, parts in messages]


def _place_unmarked(
    messages: Sequence[tuple[Role, list[Part]]], listed: Sequence[Any], left: Sequence[Any], find: Find
) -> None:
    """Put images that no placeholder stands for before the first of the user's words."""
    if len(left) < len(listed):
        raise UserError(f"{len(listed)} images, but {len(listed) - len(left)} {_PLACEHOLDER} placeholders")
    first = next((parts for role, parts in messages if role == "user"), None)
    if first is None:
        raise UserError("images: there is no turn of the user for them to stand in")
    first[:0] = [ImagePart(find(value)) for value in left]


def tidy(parts: Iterable[Part], where: str) -> Iterator[Part]:
    """Parts with neighbouring texts joined and the white space around texts removed."""
    text = ""
    for part in parts:
        if isinstance(part, str):
            glued = not text or not part or text[-1].isspace() or part[0].isspace()
            text += part if glued else f"\n{part}"
            continue
        if words := clean(text, where):
            yield words
        text = ""
        yield part
    if words := clean(text, where):
        yield words


def _parts(turn: Turn, images: Iterator[Any], find: Find) -> Iterator[Part]:
    """The parts of one turn, from a text with placeholders or a list of typed parts."""
    where, draw = turn.where, turn.role == "assistant"
    if isinstance(turn.content, str):
        for number, piece in enumerate(turn.content.split(_PLACEHOLDER)):
            if number:
                yield ImagePart(find(_next(images, where)), draw)
            yield piece
        return
    if not isinstance(turn.content, list):
        raise UserError(f"{where}: expected a text or a list of parts")
    for position, part in enumerate(turn.content):
        here = f"{where}[{position}]"
        if isinstance(part, str):
            yield part
            continue
        kind = _kind(part) if isinstance(part, Mapping) else None
        if kind in TEXT_TYPES:
            if not isinstance(part.get("text"), str):
                raise UserError(f"{here}.text: expected a text, got {type(part.get('text')).__name__}")
            yield part["text"]
        elif kind in IMAGE_TYPES:
            yield _image(part, here, draw, images, find)
        else:
            raise UserError(f"{here}.type: expected text or image, got {clip(repr(kind))}")


def _kind(part: Mapping[str, Any]) -> Any:
    """The type of a part; of one that gives none, which of the two it holds."""
    if part.get("type") is not None:
        return part["type"]
    return next((kind for kind in ("text", "image") if part.get(kind) is not None), None)


def _image(part: Mapping[str, Any], here: str, draw: bool, images: Iterator[Any], find: Find) -> ImagePart:
    """The image that a typed part names, or the row's next."""
    flag = part.get("draw")
    if not isinstance(flag, bool | None):
        raise UserError(f"{here}.draw: expected true or false, got {clip(flag)}")
    names = ("image", "path", "url", "image_url", "base64", "source")
    value = next((part[name] for name in names if part.get(name)), None)
    blob = find(_next(images, here) if value is None else value)
    return ImagePart(blob, draw if flag is None else flag)


def _next(images: Iterator[Any], where: str) -> Any:
    value = next(images, None)
    if value is None:
        raise UserError(f"{where}: more {_PLACEHOLDER} placeholders than images")
    return value


def without_placeholders(text: str, where: str, images: int) -> str:
    """A caption without the placeholders at its ends, which stand for the images beside it.

    Raises:
        UserError: there are placeholders within it, or more or fewer than images.
    """
    placeholders = text.count(_PLACEHOLDER)
    if not placeholders or not images:
        return text
    if placeholders != images:
        raise UserError(f"{where}: {placeholders} {_PLACEHOLDER} placeholders, but {images} images")
    bare = _OUTER_PLACEHOLDERS.sub("", _OUTER_PLACEHOLDERS.sub("", text))
    if _PLACEHOLDER in bare:
        raise UserError(f"{where}: {_PLACEHOLDER} within the words; give messages, or texts and images")
    return bare
