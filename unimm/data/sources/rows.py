"""From a row (a JSON object, a Parquet row, the files of a tar sample) to a `Record`, whatever its columns are called.

A row is one of these; the first that fits is taken, and `fields` renames columns that are called otherwise:

- `messages`: `[{"role": …, "content": text or [{"type": "text", "text": …}, {"type": "image", "image": …}]}]`;
- `conversations`: LLaVA's and ShareGPT's `[{"from": "human", "value": "<image> what is it?"}, …]`;
- `texts` and `images`: a document as two lists of one length, with null where the other has something;
- `input_image`, `instruction`, `output_image`: an edit;
- `question` and `answer`, with `image` or `images`, or without;
- `image` and `text`: a pair, read as a caption or as a drawing (`pairs`);
- `text`.

`<image>` in a text stands for the next of the row's `image` or `images`; where no text has it, they come first.
Pictures of the assistant are to be drawn, all others are looked at, unless a part says `"draw"` itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from unimm.data.sources.record import Blob, Message, Part, Picture, Record, Role
from unimm.errors import UserError

Pairs = Literal["image_to_text", "text_to_image"]
Find = Callable[[Any], Blob]
MARK = "<image>"
ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
NAMES: dict[str, tuple[str, ...]] = {  # our name -> other names in use
    "image": ("file_name", "img", "image_path", "jpg", "png", "webp"),
    "text": ("caption", "txt", "prompt"),
    "input_image": ("original_image", "source_image"),
    "instruction": ("edit_prompt",),
    "output_image": ("edited_image", "target_image"),
}
KEYS = ("key", "__key__", "id")


@dataclass(frozen=True)
class Reading:
    """How a source is to be read.

    Attributes:
        pairs: what a picture with a text is for.
        fields: our name of a column -> the source's.
        images: folder that names of pictures are relative to; None: where the source lies.
        split: which split of a Hugging Face folder that has several.
    """

    pairs: Pairs = "image_to_text"
    fields: Mapping[str, str] = field(default_factory=dict)
    images: str | None = None
    split: str | None = None


def row_key(row: Any, fallback: str) -> str:
    """The key that a row gives itself, or the fallback."""
    if isinstance(row, Mapping):
        for name in KEYS:
            if isinstance(row.get(name), str | int) and row[name] != "":
                return str(row[name])
    return fallback


def make_record(key: str, row: Any, find: Find, reading: Reading) -> Record:
    """Build the record of a row.

    Args:
        key: the record's key.
        row: the row's columns.
        find: turns what a column says of a picture (a name, bytes) into a `Blob`.
        reading: how to read it.

    Raises:
        UserError: no form fits, or a column is not what it should be; the message starts with the column.
    """
    if not isinstance(row, Mapping):
        raise UserError(f"expected an object with columns, got {type(row).__name__}")
    columns = _renamed(row, reading.fields)
    messages = _messages(columns, find, reading)
    if not any(message.role == "assistant" for message in messages):
        raise UserError("nobody answers, so nothing can be learnt from it")
    return Record(key, tuple(messages))


def _renamed(row: Mapping[str, Any], fields: Mapping[str, str]) -> dict[str, Any]:
    """The row's columns that hold something, under our names too."""
    columns = {name: value for name, value in row.items() if value is not None}
    for ours, others in NAMES.items():
        found = next((name for name in others if name in columns), None)
        if ours not in columns and found is not None:
            columns[ours] = columns[found]
    for ours, theirs in fields.items():
        if theirs not in columns:
            raise UserError(f"{theirs}: missing (fields says it holds {ours})")
        columns[ours] = columns[theirs]
    return columns


def _messages(row: dict[str, Any], find: Find, reading: Reading) -> list[Message]:
    if "messages" in row:
        return _dialogue(row, "messages", ("role", "content"), find)
    if "conversations" in row:
        return _dialogue(row, "conversations", ("from", "value"), find)
    if "texts" in row:
        return [Message("assistant", tuple(_document(row, find)))]
    if "output_image" in row:
        asked = [Picture(find(row["input_image"]))] if "input_image" in row else []
        words = [_text(row, name) for name in ("instruction", "text") if name in row][:1]
        if not words:
            raise UserError("instruction: missing")
        drawn = Picture(find(row["output_image"]), draw=True)
        return [Message("user", (*asked, *words)), Message("assistant", (drawn,))]
    pictures = [Picture(find(value)) for value in _listed(row)]
    if "question" in row:
        asked_words: tuple[Part, ...] = (*pictures, _text(row, "question"))
        return [Message("user", asked_words), Message("assistant", (_text(row, "answer"),))]
    if "text" not in row:
        columns = ", ".join(list(row)[:8]) or "none"
        raise UserError(f"text: missing, and no other form of data fits (columns: {columns})")
    text = _text(row, "text")
    if not pictures:
        return [Message("assistant", (text,))]
    if reading.pairs == "image_to_text":
        return [Message("user", tuple(pictures)), Message("assistant", (text,))]
    drawn_parts = tuple(Picture(picture.blob, draw=True) for picture in pictures)
    return [Message("user", (text,)), Message("assistant", drawn_parts)]


def _listed(row: Mapping[str, Any]) -> list[Any]:
    """What the row says of its pictures: `images`, or `image`, which may be a list too."""
    value = row.get("images", row.get("image"))
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if value is None:
        raise UserError(f"{name}: missing")
    if not isinstance(value, str):
        raise UserError(f"{name}: expected a text, got {type(value).__name__}")
    if not value.strip():
        raise UserError(f"{name}: empty")
    return value.strip()


def _document(row: Mapping[str, Any], find: Find) -> Iterator[Part]:
    """The parts of a document of two lists of one length."""
    texts, images = row["texts"], row.get("images")
    if not isinstance(texts, list) or not isinstance(images, list) or len(texts) != len(images):
        raise UserError("texts: expected a list as long as images, with null where a picture stands")
    for position, (text, image) in enumerate(zip(texts, images, strict=True)):
        if image is not None:
            yield Picture(find(image), draw=True)
        elif isinstance(text, str) and text.strip():
            yield text.strip()
        else:
            raise UserError(f"texts[{position}]: neither a text nor a picture")


def _dialogue(row: Mapping[str, Any], name: str, keys: tuple[str, str], find: Find) -> list[Message]:
    """Turns, with the row's pictures at their marks, or before the first words if there are no marks."""
    turns = row[name]
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{name}: expected a list of turns")
    pictures = iter(listed := _listed(row))
    messages = []
    for position, turn in enumerate(turns):
        where = f"{name}[{position}]"
        if not isinstance(turn, Mapping) or any(key not in turn for key in keys):
            raise UserError(f"{where}: expected {keys[0]} and {keys[1]}")
        role = ROLES.get(str(turn[keys[0]]))
        if role is None:
            known = "system, user (human), assistant (gpt)"
            raise UserError(f"{where}.{keys[0]}: {turn[keys[0]]!r} is none of {known}")
        parts = tuple(_parts(turn[keys[1]], f"{where}.{keys[1]}", role, pictures, find))
        if not parts:
            raise UserError(f"{where}.{keys[1]}: empty")
        messages.append(Message(role, parts))
    return _with_unmarked(messages, listed, list(pictures), find)


def _with_unmarked(
    messages: list[Message], listed: Sequence[Any], left: Sequence[Any], find: Find
) -> list[Message]:
    """The messages, with pictures that no mark stands for put before the first of the user's words."""
    placed = any(isinstance(part, Picture) for message in messages for part in message.parts)
    if not left or (placed and len(left) == len(listed)):  # the parts name their own
        return messages
    if len(left) < len(listed):
        raise UserError(f"{len(listed)} images, but {len(listed) - len(left)} {MARK} marks")
    first = next((i for i, message in enumerate(messages) if message.role == "user"), None)
    if first is None:
        raise UserError("images: there is no turn of the user for them to stand in")
    shown = tuple(Picture(find(value)) for value in left)
    messages[first] = Message("user", (*shown, *messages[first].parts))
    return messages


def _parts(content: Any, where: str, role: Role, pictures: Iterator[Any], find: Find) -> Iterator[Part]:
    """The parts of one turn, from a text with marks or a list of typed parts."""
    draw = role == "assistant"
    if isinstance(content, str):
        pieces = content.split(MARK)
        for number, piece in enumerate(pieces):
            if number:
                yield Picture(find(_next(pictures, where)), draw)
            if piece.strip():
                yield piece.strip()
        return
    if not isinstance(content, list):
        raise UserError(f"{where}: expected a text or a list of parts")
    for position, part in enumerate(content):
        here = f"{where}[{position}]"
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            if isinstance(part.get("text"), str) and part["text"].strip():
                yield part["text"].strip()
        elif kind == "image":
            value = next((part[name] for name in ("image", "path", "url") if part.get(name)), None)
            flag = part.get("draw")
            yield Picture(
                find(_next(pictures, here) if value is None else value), draw if flag is None else bool(flag)
            )
        else:
            raise UserError(f"{here}.type: expected text or image, got {kind!r}")


def _next(pictures: Iterator[Any], where: str) -> Any:
    value = next(pictures, None)
    if value is None:
        raise UserError(f"{where}: more {MARK} marks than images")
    return value
